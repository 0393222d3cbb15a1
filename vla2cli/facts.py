"""What is here: this machine, and the checkpoints on its disk."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vla2_models.checkpoint import Checkpoint, open_checkpoint
from vla2_models.errors import one_line
from vla2_models.files import read_json
from vla2_models.hub import Source, folders_on_disk
from vla2_models.public import find_public, public_checkpoints
from vla2cli.console import format_size
from vla2cli.engine import Engine


def describe_machine() -> list[str]:
    """Say which torch, which devices and which model cache a run would use."""
    import torch
    import transformers
    from huggingface_hub.constants import HF_HUB_CACHE

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        f"CUDA: {', '.join(devices) or 'none'}; {torch.get_num_threads()} CPU threads",
        f"model cache: {HF_HUB_CACHE}",
    ]


def find_checkpoints(source: Source) -> Iterator[dict[str, Any]]:
    """Look for VideoLLaMA 2 checkpoints in the local hub folder and in the hub cache.

    Yields:
        The facts of each, as `describe_checkpoint`; one that cannot be used says `why`.
    """
    for name, folder in sorted(folders_on_disk(source.hub_dir).items()):
        try:
            raw = read_json(folder / "config.json")
            if "videollama2" not in str(raw.get("model_type")):
                continue
            # by its folder: the name may mean another one, seen from the current folder
            checkpoint, num_parameters = check_headers(
                str(folder), Source(source.hub_dir, offline=True)
            )
            yield describe_checkpoint(name, checkpoint, num_parameters)
        except Exception as error:  # one folder must not end the list
            yield _unusable(name, folder, error)


def missing_public(here: Collection[str]) -> Iterator[dict[str, Any]]:
    """State the facts of the public checkpoints that are not on this disk."""
    for public in public_checkpoints():
        if public.id not in here:
            yield {
                "id": public.id,
                "on_disk": False,
                "form": public.form,
                "model_type": public.model_type,
                "language_model": public.language_model,
                "tower": public.tower,
                "connector": public.connector,
                "num_frames": public.num_frames,
                "visual_tokens": public.visual_tokens,
                "audio_tokens": public.audio_tokens,
                "parameters": public.num_parameters,
                "disk_gb": public.disk_gb,
                "memory_gb": _memory(public.id, public.num_parameters),
            }


def check_headers(name: str, source: Source, revision: str | None = None) -> tuple[Checkpoint, int]:
    """Find a checkpoint and check all its files, without reading its weights.

    Returns:
        It, and the number of its parameters.

    Raises:
        CheckpointError, ModelError: it is nowhere, or would not load.
    """
    checkpoint = open_checkpoint(name, source, revision=revision)
    return checkpoint, Engine(checkpoint, device="cpu").check()


def describe_checkpoint(name: str, checkpoint: Checkpoint, num_parameters: int) -> dict[str, Any]:
    """State the facts of a checkpoint, which is called `name` here."""
    config = checkpoint.config
    return {
        "id": name,
        "on_disk": True,
        "folder": str(checkpoint.folder),
        "revision": checkpoint.located.revision,
        "usable": True,
        "form": checkpoint.form,
        "model_type": config.model_type,
        "language_model": None if checkpoint.form == "whole" else str(checkpoint.text_folder),
        "tower": config.mm_vision_tower,
        "connector": config.projector_type,
        "num_frames": config.num_frames,
        "visual_tokens": config.visual_tokens,
        "audio_tokens": config.audio.audio_tokens if config.audio else 0,
        "audio_window_s": config.audio.window.duration_s if config.audio else None,
        "parameters": num_parameters,
        "disk_gb": round(checkpoint.size_bytes / 1e9, 4),
        "memory_gb": _memory(name, num_parameters),
    }


def describe_line(found: Mapping[str, Any]) -> str:
    """Write the facts of one checkpoint as a line for people."""
    if not found.get("usable", True):
        return f"{found['id']}  cannot be used: {found['why']}"
    memory = found["memory_gb"]
    size = format_size(found["disk_gb"] * 1e9)
    place = f"here, {size}" if found["on_disk"] else f"not here, {size}"
    form = "" if found["form"] == "whole" else f"{found['form']} only, "
    ears = f", sound {found['audio_tokens']} tokens" if found["audio_tokens"] else ""
    return (
        f"{found['id']}  {place}; {form}{found['num_frames']} frames, {found['visual_tokens']} "
        f"tokens{ears}, {found['parameters'] / 1e9:.1f} B; memory "
        + ", ".join(f"{gb} GB in {dtype}" for dtype, gb in memory.items())
    )


def _unusable(name: str, folder: Path, error: Exception) -> dict[str, Any]:
    why = one_line(error) or type(error).__name__
    return {"id": name, "on_disk": True, "folder": str(folder), "usable": False, "why": why}


def _memory(name: str, num_parameters: int) -> dict[str, float]:
    """State the room that the weights take, by dtype, in 10**9 bytes."""
    public = find_public(name)
    if public is None:
        return {
            "float32": float(f"{num_parameters * 4 / 1e9:.3g}"),
            "bfloat16": float(f"{num_parameters * 2 / 1e9:.3g}"),
        }
    memory = {
        "float32": public.memory_float32_gb,
        "bfloat16": public.memory_bfloat16_gb,
        "8bit": public.memory_8bit_gb,
        "4bit": public.memory_4bit_gb,
    }
    return {dtype: gb for dtype, gb in memory.items() if gb is not None}


def describe_places(source: Source) -> str:
    """Say where `find_checkpoints` looks."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = [HF_HUB_CACHE, source.hub_dir]
    return " and ".join(f"'{place}'" for place in places if place)
