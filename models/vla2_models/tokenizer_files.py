"""A Llama-type tokenizer trained on a few texts, as the files that a public checkpoint has."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from .files import write_json

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
NUM_UNSPEAKABLE = len(SPECIAL_TOKENS) + 256  # they and the bytes come first in the vocabulary

# takes no notice of a system message, as the released VideoLLaMA2-7B is reported to do
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train byte-pair pieces on texts; bytes stand for what no piece covers.

    Args:
        folder: gets tokenizer.model and tokenizer_config.json.
        texts: no longer than about 4,000 bytes each; longer ones are not looked at.
        vocab_size: at most so many pieces, the special tokens and the bytes among them; few texts
            give fewer.
    """
    pieces = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=pieces,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(pieces.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True} for i, token in enumerate(SPECIAL_TOKENS)
        },
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
