"""The public checkpoints: what each is made of, and the room it needs.

The facts are in `specs/`, one YAML per checkpoint. They are for people who choose a checkpoint;
what runs is decided by the checkpoint's own files (`config.py`).
Source of the counts: the shapes of upstream VideoLLaMA2@c0bb03a, built at these sizes; with ears
those of its branch audio_visual at 8cedfbd.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

# the only one that hears
WITH_EARS = "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV"

# names of two checkpoints differ in so little that a lower bar would catch other families
MIN_LIKENESS = 0.8


@dataclass(frozen=True)
class PublicCheckpoint:
    """The facts about one public checkpoint; memory is that of the weights alone."""

    id: str  # on the hub
    form: Literal["whole", "projector"]  # projector: to be joined to language_model and tower
    model_type: str  # as in config.json
    language_model: str  # hub id of what it was trained from
    tower: str  # hub id
    connector: str  # mm_projector_type in config.json
    num_frames: int  # of a video, as trained
    image_size: int  # pixels on each side of a frame
    grid_size: int  # patches on each side of a frame
    visual_tokens: int  # of a video of num_frames
    num_parameters: int  # language model, tower and connector, and what hears
    num_language_parameters: int  # with the embeddings and lm_head
    num_tower_parameters: int  # with the blocks that are not used
    num_connector_parameters: int
    disk_gb: float  # 10**9 bytes of weight files; where form is projector, of its file alone
    memory_float32_gb: float  # 10**9 bytes
    memory_bfloat16_gb: float  # and float16
    # in the next two only the decoder's linear layers are quantised, the rest is bfloat16
    memory_8bit_gb: float | None  # a byte a weight, a float32 scale a row; None: not available
    memory_4bit_gb: float  # nf4 with double quantisation: 4.127 bits a weight
    # of those with ears alone
    audio_tokens: int = 0  # of any recording
    num_audio_parameters: int = 0  # audio tower and its projector


@cache
def public_checkpoints() -> tuple[PublicCheckpoint, ...]:
    """List the public checkpoints by family, size and frames, each before its projector.

    Raises:
        TypeError: a YAML lacks a field, or has one too many.
    """
    import yaml

    files = [path for path in (resources.files(__package__) / "specs").iterdir() if path.is_file()]
    found = [PublicCheckpoint(**yaml.safe_load(path.read_text(encoding="utf-8"))) for path in files]
    return tuple(sorted(found, key=_order))


def find_public(id: str) -> PublicCheckpoint | None:
    """Return the public checkpoint with this very id."""
    return next((public for public in public_checkpoints() if public.id == id), None)


def suggest(name: str, known: Collection[str] = ()) -> str | None:
    """Find the id that a mistyped `name` was most likely meant to be.

    Args:
        name: what was typed: with or without owner, in any case.
        known: ids beside the public ones, such as those on this disk.

    Returns:
        None where nothing is near, or where `name` is such an id already.
    """
    ids = [public.id for public in public_checkpoints()] + sorted(known)
    if name in ids:
        return None
    # the owner is often left out or wrong: it only decides between equal names
    near = [id for id in ids if _likeness(_last(name), _last(id)) >= MIN_LIKENESS]
    return max(near, key=lambda id: _rank(name, id), default=None)


def _rank(name: str, id: str) -> tuple[bool, bool, float, float]:
    # "VideoLLaMA2.1-7B" has more letters in common with 2-7B than with 2.1-7B-16F, and most of all
    # with 2.1-7B-AV, but who means ears says so
    is_start = _last(id).lower().startswith(_last(name).lower())
    is_plain = is_start and id != WITH_EARS
    return is_plain, is_start, _likeness(_last(name), _last(id)), _likeness(name, id)


def _order(public: PublicCheckpoint) -> tuple[str, int, int, bool]:
    family = _last(public.id).split("-")[0]
    return family, public.num_parameters, public.num_frames, public.form == "projector"


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()
