"""Token ids of a checkpoint, as the slow tokenizer that its reference used makes them.

A text is cut at its special tokens, and each part between them is encoded by itself: by
sentencepiece for the Llama kind (Mistral, Mixtral), by byte pairs for the Qwen2 kind.

transformers 5 has only fast tokenizers. Its Llama one puts no dummy prefix before a text that
begins with a space; its Qwen2 one composes characters after the cut, not before it, so that a
combining mark behind a special token gives other ids. So their libraries are called directly.

Source: transformers 4.40.0, tokenization_utils.py, models/llama/tokenization_llama.py
(`legacy=True`) and models/qwen2/tokenization_qwen2.py, as upstream VideoLLaMA2@c0bb03a calls them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InTurn

from vla2_models.files import read_json
from vla2cli.errors import ModelError

LLAMA, QWEN2 = "LlamaTokenizer", "Qwen2Tokenizer"  # `tokenizer_class`, with or without "Fast"

PREFIX = "▁"  # sentencepiece's mark of a space

# where Qwen2 cuts a text before it looks for byte pairs; one digit at a time
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# GPT-2's visible characters, as the files spell bytes, and the bytes that they stand for
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(sorted({*range(0x100)} - {*VISIBLE}))}

# what `clean_up_tokenization_spaces` replaces, in this order
CLEAN_UPS = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"}
CLEAN_UPS |= {f" {ending}": ending for ending in ("n't", "'m", "'s", "'ve", "'re")}


@dataclass(frozen=True)
class LlamaPieces:
    """Pieces of a sentencepiece model."""

    SPACE: ClassVar[str] = PREFIX

    model: SentencePieceProcessor

    @property
    def num_ids(self) -> int:
        """One more than the largest id of a piece."""
        return len(self.model)

    def normalise(self, text: str) -> str:
        """Return the text itself: sentencepiece normalises each part."""
        return text

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, with a dummy prefix of its own."""
        ids: list[int] = self.model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, without the dummy prefix."""
        tokens = [self.model.id_to_piece(i) for i in ids if i < self.num_ids]
        if tokens and tokens[0].startswith(PREFIX):
            tokens[0] = tokens[0][len(PREFIX) :]
        text: str = self.model.decode(tokens)
        return text

    def spelling(self, id_: int) -> str:
        """Return how a piece is written in the vocabulary."""
        text: str = self.model.id_to_piece(id_)
        return text

    def find(self, spelling: str) -> int | None:
        """Find the piece that is written so."""
        id_ = self.model.piece_to_id(spelling)
        return None if id_ == self.model.unk_id() else id_


@dataclass(frozen=True)
class Qwen2Pieces:
    """Pieces of bytes, joined pair by pair."""

    SPACE: ClassVar[str] = "Ġ"  # GPT-2's character for its byte

    byte_pairs: tokenizers.Tokenizer
    bytes_of: dict[int, bytes]  # of each id that is spoken
    num_ids: int

    def normalise(self, text: str) -> str:
        """Compose characters and their marks (NFC)."""
        return unicodedata.normalize("NFC", text)

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids."""
        return self.byte_pairs.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text; bytes that are no UTF-8 become replacement marks."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode(errors="replace")

    def spelling(self, id_: int) -> str:
        """Return how a piece is written in the vocabulary."""
        return self.byte_pairs.id_to_token(id_) or ""

    def find(self, spelling: str) -> int | None:
        """Find the piece that is written so."""
        return self.byte_pairs.token_to_id(spelling)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, with the checkpoint's chat template and special tokens."""

    pieces: LlamaPieces | Qwen2Pieces  # know no special token
    added_ids: dict[str, int]  # every special or added token -> its id
    silent_ids: frozenset[int]  # those of them that are not spoken
    bos_token: str  # "" where there is none
    eos_token: str
    chat_template: str  # Jinja source
    is_cleaned_up: bool  # no space before a full stop and the like

    @property
    def num_tokens(self) -> int:
        """One more than the largest id that a text can have."""
        return max(self.pieces.num_ids, *(i + 1 for i in self.added_ids.values()))

    @property
    def eos_token_id(self) -> int:
        """The id that ends an answer."""
        return self.added_ids[self.eos_token]

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids; nothing is put in front or behind."""
        ids: list[int] = []
        for part in self._cut(self.pieces.normalise(text)):
            if part in self.added_ids:
                ids.append(self.added_ids[part])
            elif part:
                ids += self.pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn generated ids into text, without special tokens."""
        # a padded vocabulary has rows that no piece belongs to: `pieces` skips them
        text = self.pieces.decode([i for i in ids if i not in self.silent_ids])
        if self.is_cleaned_up:
            for found, wanted in CLEAN_UPS.items():
                text = text.replace(found, wanted)
        return text

    def whole_word(self, word: str) -> list[int]:
        """List the pieces that are a whole word, with a space before it or without."""
        found = (self.pieces.find(space + word) for space in ("", self.pieces.SPACE))
        return [id_ for id_ in found if id_ is not None]

    def splits(self, id_: int) -> list[tuple[int, int]]:
        """List the pairs of pieces that join to a piece of letters, none for any other id."""
        if not 0 <= id_ < self.pieces.num_ids:
            return []
        if not self.pieces.decode([id_]).strip(" ").isalpha():
            return []
        spelling = self.pieces.spelling(id_)
        cuts = (
            (self.pieces.find(spelling[:at]), self.pieces.find(spelling[at:]))
            for at in range(1, len(spelling))
        )
        return [(left, right) for left, right in cuts if left is not None and right is not None]

    def _cut(self, text: str) -> list[str]:
        longest_first = sorted(self.added_ids, key=len, reverse=True)
        return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)


@dataclass(frozen=True)
class _AddedToken:
    text: str
    id: int
    is_special: bool


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer_config.json and the pieces beside it.

    The Llama kind has its pieces in tokenizer.model, the Qwen2 kind in vocab.json and merges.txt,
    which its slow tokenizer reads, or else in tokenizer.json.

    Raises:
        CheckpointError: a JSON file is absent or unreadable.
        ModelError: the kind is unknown, another file cannot be used, or there is no chat template.
    """
    settings = read_json(folder / "tokenizer_config.json")
    load = _load_qwen2 if _kind_of(folder, settings) == QWEN2 else _load_llama
    return load(folder, settings)


def _kind_of(folder: Path, settings: dict[str, Any]) -> str:
    name = settings.get("tokenizer_class")
    if name is None:
        has_byte_pairs = any((folder / file).exists() for file in ("vocab.json", "tokenizer.json"))
        return QWEN2 if has_byte_pairs and not (folder / "tokenizer.model").exists() else LLAMA
    kind = str(name).removesuffix("Fast")
    if kind not in (LLAMA, QWEN2):
        raise ModelError(
            f"'{folder}': tokenizer_class {name!r} of tokenizer_config.json is not known; "
            f"expected '{LLAMA}' or '{QWEN2}'"
        )
    return kind


def _load_llama(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.model"
    if not path.exists():
        raise ModelError(f"'{folder}' has no tokenizer.model")
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"'{path}' is not a sentencepiece model") from error
    bos_token = _token_text(settings.get("bos_token")) or "<s>"
    eos_token = _token_text(settings.get("eos_token")) or "</s>"
    unk_token = _token_text(settings.get("unk_token"))
    added_ids = {token.text: token.id for token in _added_tokens(folder, settings)}
    if unk_token:
        added_ids.setdefault(unk_token, model.unk_id())
    for token in (bos_token, eos_token):
        if token not in added_ids and model.piece_to_id(token) == model.unk_id():
            raise ModelError(f"'{folder}': the token {token!r} of tokenizer_config.json has no id")
        added_ids.setdefault(token, model.piece_to_id(token))
    return Tokenizer(
        LlamaPieces(model),
        added_ids,
        frozenset(added_ids.values()),
        bos_token,
        eos_token,
        _chat_template(folder, settings),
        is_cleaned_up=bool(settings.get("clean_up_tokenization_spaces")),
    )


def _load_qwen2(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    vocab, merges = _read_byte_pairs(folder)
    added = _added_tokens(folder, settings)
    added_ids = {token.text: token.id for token in added}
    eos_token = _token_text(settings.get("eos_token")) or "<|endoftext|>"
    others = (_token_text(settings.get(f"{name}_token")) for name in ("bos", "unk", "pad"))
    named = {eos_token, *filter(None, others)}
    for token in named & vocab.keys():
        added_ids.setdefault(token, vocab[token])
    if eos_token not in added_ids:
        raise ModelError(f"'{folder}': the eos_token {eos_token!r} has no id")
    silent_ids = {token.id for token in added if token.is_special}
    silent_ids |= {added_ids[token] for token in named & added_ids.keys()}
    return Tokenizer(
        _qwen2_pieces(vocab, merges, added),
        added_ids,
        frozenset(silent_ids),
        _token_text(settings.get("bos_token")) or "",
        eos_token,
        _chat_template(folder, settings),
        is_cleaned_up=bool(settings.get("clean_up_tokenization_spaces")),
    )


def _qwen2_pieces(
    vocab: dict[str, int], merges: list[tuple[str, str]], added: list[_AddedToken]
) -> Qwen2Pieces:
    byte_pairs = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges))
    cut = Split(tokenizers.Regex(WORD), behavior="isolated")
    byte_pairs.pre_tokenizer = InTurn([cut, ByteLevel(add_prefix_space=False, use_regex=False)])
    bytes_of = {i: bytes(BYTE_OF[c] for c in piece) for piece, i in vocab.items()}
    bytes_of |= {token.id: token.text.encode() for token in added}
    return Qwen2Pieces(byte_pairs, bytes_of, max(vocab.values()) + 1)


def _read_byte_pairs(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read the pieces with their ids, and the pairs that are joined, first ones first."""
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    if vocab_path.exists() and merges_path.exists():
        vocab: Any = read_json(vocab_path)
        merges: Any = _read_merges(merges_path)
    else:
        vocab_path = merges_path = folder / "tokenizer.json"
        if not vocab_path.exists():
            raise ModelError(
                f"'{folder}' has no tokenizer.json, and not both of vocab.json and merges.txt"
            )
        vocab, merges = _read_fast_model(vocab_path)
    _check_vocab(vocab, vocab_path)
    return vocab, _check_merges(merges, vocab, merges_path)


def _read_merges(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}") from error
    if lines[0].startswith("#version:"):
        del lines[0]
    return [line for line in lines if line]


def _read_fast_model(path: Path) -> tuple[Any, Any]:
    """Return vocabulary and merges of a tokenizer.json, unchecked."""
    content = read_json(path)
    try:
        model, cut = content["model"], content["pre_tokenizer"]["pretokenizers"][0]
        found = model["vocab"], model["merges"]
        pattern = cut["pattern"]["Regex"]
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(f"'{path}' is not the tokenizer.json of a {QWEN2}") from error
    # later models of the family share the class and cut otherwise
    if pattern != WORD:
        raise ModelError(f"'{path}' cuts a text otherwise than Qwen2; its pattern is {pattern!r}")
    return found


def _check_vocab(vocab: Any, path: Path) -> None:
    if not isinstance(vocab, dict):
        raise ModelError(f"'{path}' holds no vocabulary")
    for piece, i in vocab.items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise ModelError(
                f"'{path}': the piece {piece!r} has the id {i!r}, expected a whole number"
            )
    if missing := BYTE_OF.keys() - vocab.keys():
        raise ModelError(f"'{path}' has pieces for {256 - len(missing)} of the 256 bytes")
    if strange := set("".join(vocab)) - BYTE_OF.keys():
        raise ModelError(f"'{path}': {min(strange)!r} in a piece stands for no byte")


def _check_merges(merges: Any, vocab: dict[str, int], path: Path) -> list[tuple[str, str]]:
    if not isinstance(merges, list) or not merges:
        raise ModelError(f"'{path}' has no merges")
    pairs = []
    for merge in merges:
        # tokenizer.json has pairs, older ones have lines as in merges.txt
        pair = merge.split() if isinstance(merge, str) else merge
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise ModelError(f"'{path}': the merge {merge!r:.80} is no pair of pieces")
        first, second = pair
        for piece in (first, second, first + second):
            if piece not in vocab:
                raise ModelError(
                    f"'{path}': the merge {merge!r:.80} needs {piece!r:.80}, which is no piece"
                )
        pairs.append((first, second))
    return pairs


def _added_tokens(folder: Path, settings: dict[str, Any]) -> list[_AddedToken]:
    """List the tokens beside the pieces; transformers 5 writes them to tokenizer.json only."""
    where, entries = "added_tokens_decoder of tokenizer_config.json", []
    try:
        if settings.get("added_tokens_decoder"):
            added = settings["added_tokens_decoder"]
            entries = [{**entry, "id": int(i)} for i, entry in added.items()]
        elif (folder / "tokenizer.json").exists():
            where = "added_tokens of tokenizer.json"
            entries = read_json(folder / "tokenizer.json")["added_tokens"]
        return [_added_token(entry) for entry in entries]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"'{folder}': {where} is not understood") from error


def _added_token(entry: dict[str, Any]) -> _AddedToken:
    text, id_ = entry["content"], entry["id"]
    if not isinstance(text, str) or not text or type(id_) is not int or id_ < 0:
        raise ValueError(text, id_)
    return _AddedToken(text, id_, bool(entry.get("special", True)))


def _token_text(token: Any) -> str | None:
    """Return the text of a token that is written plainly or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    path = folder / "chat_template.jinja"
    if template is None and path.exists():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(template, str):
        raise ModelError(
            f"'{folder}' has no chat template in tokenizer_config.json; without it the prompt "
            "would be a guess"
        )
    return template
