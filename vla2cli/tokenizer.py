"""Token ids of a Llama-type checkpoint, as the slow legacy tokenizer makes them.

transformers 5 has only the fast tokenizer, which puts no dummy prefix before a text that begins
with a space; the reference's slow one does. So sentencepiece is called directly: the text is cut
at its special tokens and each piece between them is encoded by itself.

Source: transformers 4.40.0, tokenization_utils.py and models/llama/tokenization_llama.py
(`legacy=True`), as upstream VideoLLaMA2@c0bb03a calls them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from vla2_models.files import read_json
from vla2cli.errors import ModelError

PREFIX = "▁"  # sentencepiece's mark of a space


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, with the checkpoint's chat template and special tokens."""

    pieces: SentencePieceProcessor
    special_ids: dict[str, int]  # every special or added token -> its id
    bos_token: str
    eos_token: str
    chat_template: str  # Jinja source

    @property
    def num_tokens(self) -> int:
        """One more than the largest id that a text can have."""
        return max(len(self.pieces), *(i + 1 for i in self.special_ids.values()))

    @property
    def eos_token_id(self) -> int:
        """The id that ends an answer."""
        return self.special_ids[self.eos_token]

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids; nothing is put in front or behind."""
        ids: list[int] = []
        for part in self._cut(text):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            elif part:
                ids += self.pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn generated ids into text, without special tokens and outer white space."""
        # a padded vocabulary has rows that no piece belongs to
        skipped = {*self.special_ids.values(), *range(len(self.pieces), max(ids, default=0) + 1)}
        tokens = [self.pieces.id_to_piece(i) for i in ids if i not in skipped]
        if tokens and tokens[0].startswith(PREFIX):
            tokens[0] = tokens[0][len(PREFIX) :]
        text: str = self.pieces.decode(tokens)
        return text

    def _cut(self, text: str) -> list[str]:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.model and tokenizer_config.json.

    Raises:
        CheckpointError: tokenizer_config.json is absent or unreadable.
        ModelError: tokenizer.model is, or there is no chat template.
    """
    settings = read_json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.model"
    if not path.exists():
        raise ModelError(f"'{folder}' has no tokenizer.model")
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"'{path}' is not a sentencepiece model") from error
    bos_token = _token_text(settings.get("bos_token")) or "<s>"
    eos_token = _token_text(settings.get("eos_token")) or "</s>"
    special_ids = _special_ids(folder, settings, pieces)
    for token in (bos_token, eos_token):
        special_ids.setdefault(token, pieces.piece_to_id(token))
    return Tokenizer(pieces, special_ids, bos_token, eos_token, _chat_template(folder, settings))


def _special_ids(
    folder: Path, settings: dict[str, Any], pieces: SentencePieceProcessor
) -> dict[str, int]:
    added = settings.get("added_tokens_decoder") or {}
    try:
        ids = {str(entry["content"]): int(i) for i, entry in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"'{folder}': added_tokens_decoder of tokenizer_config.json is not understood"
        ) from error
    unk_token = _token_text(settings.get("unk_token"))
    if unk_token:
        ids.setdefault(unk_token, pieces.unk_id())
    return ids


def _token_text(token: Any) -> str | None:
    """Return the text of a token that is written plainly or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if template is None and (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(template, str):
        raise ModelError(
            f"'{folder}' has no chat template in tokenizer_config.json; without it the prompt "
            "would be a guess"
        )
    return template
