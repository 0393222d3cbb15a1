"""What is here: this machine, and the checkpoints on its disk."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vla2_models.checkpoint import open_checkpoint
from vla2_models.errors import CheckpointError
from vla2_models.files import read_json
from vla2_models.hub import Source
from vla2_models.stc import count_tokens
from vla2cli.console import format_size
from vla2cli.engine import Engine
from vla2cli.errors import ModelError


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
    for name, folder in sorted({**_in_cache(), **_in_hub_dir(source.hub_dir)}.items()):
        try:
            raw = read_json(folder / "config.json")
        except CheckpointError as error:
            yield {"id": name, "folder": str(folder), "usable": False, "why": str(error)}
            continue
        if "videollama2" not in str(raw.get("model_type")):
            continue
        try:
            # by its folder: the name may mean another one, seen from the current folder
            offline = Source(source.hub_dir, offline=True)
            yield {**describe_checkpoint(str(folder), offline), "id": name}
        except (CheckpointError, ModelError) as error:
            yield {"id": name, "folder": str(folder), "usable": False, "why": str(error)}


def describe_checkpoint(name: str, source: Source, revision: str | None = None) -> dict[str, Any]:
    """Check a checkpoint by its headers and state its facts.

    Raises:
        CheckpointError, ModelError: it is nowhere, or would not load.
    """
    checkpoint = open_checkpoint(name, source, revision=revision)
    num_parameters = Engine(checkpoint, device="cpu").check()
    config = checkpoint.config
    return {
        "id": name,
        "folder": str(checkpoint.folder),
        "revision": checkpoint.located.revision,
        "usable": True,
        "model_type": config.model_type,
        "tower": config.mm_vision_tower,
        "connector": config.projector_type,
        "num_frames": config.num_frames,
        "visual_tokens": count_tokens(config.num_frames, config.num_patches),
        "parameters": num_parameters,
        "size": format_size(checkpoint.size_bytes),
    }


def describe_places(source: Source) -> str:
    """Say where `find_checkpoints` looks."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = [HF_HUB_CACHE, source.hub_dir]
    return " and ".join(f"'{place}'" for place in places if place)


def _in_hub_dir(hub_dir: Path | None) -> dict[str, Path]:
    if hub_dir is None:
        return {}
    folders = [path.parent for path in hub_dir.glob("*/*/config.json")]
    return {folder.relative_to(hub_dir).as_posix(): folder for folder in folders}


def _in_cache() -> dict[str, Path]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return {}
    newest = {
        repo.repo_id: max(repo.revisions, key=lambda revision: revision.last_modified)
        for repo in cache.repos
        if repo.repo_type == "model" and repo.revisions
    }
    return {name: revision.snapshot_path for name, revision in newest.items()}
