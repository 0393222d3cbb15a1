"""One line of the ledger: which fields a record has, and in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vla2cli import __version__
from vla2cli.config import GenerationSettings
from vla2cli.errors import InputError
from vla2cli.inputs import Item, encode_name
from vla2cli.media.records import Clip, FileState

if TYPE_CHECKING:
    from vla2cli.prompt import Turn

FIELDS = (
    "id",
    "path",
    "size_bytes",
    "mtime_ns",
    "sha256",
    "task",
    "modality",
    "question",
    "history",
    "segment",
    "text",
    "error",
    "file",
    "tensors",
    "choice",
    "finish_reason",
    "flags",
    "tokens",
    "logprob_mean",
    "frames",
    "sound",
    "model",
    "decoder",
    "frontend",
    "engine",
    "dtype",
    "quant",
    "generation",
    "seed",
    "timings_s",
    "vla2_version",
    "created",
)
# fields that only some records have
OPTIONAL_FIELDS = ("text", "error", "history", "file", "tensors", "sound")


def make_record(**fields: Any) -> dict[str, Any]:
    """Put the fields of a record in order; those that are not given are null.

    A record has `text`, `error`, or the `file` and `tensors` of features; `history` only in a
    conversation, `sound` only where something was heard.
    """
    fields = {"vla2_version": __version__, "created": now(), **fields}
    unknown = fields.keys() - set(FIELDS)
    assert not unknown, f"a record has no fields {sorted(unknown)}"
    return {
        name: fields.get(name) for name in FIELDS if name in fields or name not in OPTIONAL_FIELDS
    }


def file_fields(item: Item, state: FileState | None) -> dict[str, Any]:
    """Describe an item's file; what is not known of it is null."""
    return {
        "id": item.id,
        "path": encode_name(item.path),
        "size_bytes": state.size_bytes if state else None,
        "mtime_ns": state.mtime_ns if state else None,
        "sha256": state.sha256 if state and state.sha256 else None,
    }


def generation_fields(
    settings: GenerationSettings, num_frames: int | None, decoder: str | None
) -> dict[str, Any]:
    """Describe what decided the tokens: `generation` and `seed`.

    The seed of a greedy run decides nothing and is null. `decoder` is the one asked for; null
    where there is no choice.
    """
    generation = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.is_sampled,
        "temperature": settings.temperature if settings.is_sampled else None,
        "top_p": settings.top_p if settings.is_sampled else None,
        "top_k": settings.top_k if settings.is_sampled else None,
        "repetition_penalty": settings.repetition_penalty,
        "eos_token_ids": list(settings.eos_token_ids),
        "num_frames": num_frames,
        "decoder": decoder,
    }
    return {"generation": generation, "seed": settings.seed if settings.is_sampled else None}


def clip_fields(clip: Clip) -> dict[str, Any]:
    """Describe what of the file was looked at and listened to."""
    fields: dict[str, Any] = {"modality": clip.kind, "decoder": clip.decoder}
    if clip.is_seen:
        fields["frames"] = {
            "indices": list(clip.indices),
            "timestamps_s": [round(t, 6) for t in clip.timestamps_s],
        }
    if clip.sound is not None:
        fields["sound"] = {
            "duration_s": round(clip.sound.duration_s, 6),
            "spans_s": [[round(t, 6) for t in span] for span in clip.sound.spans_s],
        }
        if clip.kind == "video":
            fields["modality"] = "av"
    return fields


def error_field(error: InputError) -> dict[str, str]:
    """Describe why there is no text."""
    return {"kind": error.kind, "stage": error.stage, "message": str(error)}


def history_field(history: Sequence[Turn]) -> list[dict[str, str]]:
    """Describe the turns before this one."""
    return [{"question": turn.question, "text": turn.text} for turn in history]


def row_seed(seed: int, record: Mapping[str, Any]) -> int:
    """Derive the seed of one row from the run's seed and the record's key.

    Neither the batch nor the order of the items has a part in it.
    """
    questions = [turn["question"] for turn in record.get("history") or []]
    key = [seed, *(record[name] for name in ("id", "task", "question", "segment")), questions]
    digest = hashlib.sha256(json.dumps(key, ensure_ascii=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits


def now() -> str:
    """Return the present moment, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
