"""`VideoLLaMA2` -> a checkpoint's folder as the public ones are, whole and by itself.

Source of the layout: what `save_pretrained` of transformers 4.40.0 writes. transformers 5 is not
asked to write it, because it would leave out `rope_theta` and `torch_dtype`, without which the
public code computes with its defaults, and would rename tensors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .files import UNFINISHED, read_json, write_json
from .hub import TOWER_FACTS, WHOLE_FILE, own_tower
from .names import find_places
from .videollama2 import VideoLLaMA2

MAX_SHARD_BYTES = 5 * 10**9
TEXT_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def save_checkpoint(
    model: VideoLLaMA2,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a loaded checkpoint, with its tower, tokenizer and settings, to a new folder.

    Args:
        model: from `load_model`.
        checkpoint: what it was loaded from.
        folder: must not exist, or be empty; it has no config.json until all is written.
        max_shard_bytes: weight files are no larger, unless one tensor is.

    Raises:
        CheckpointError: the folder is not empty, or cannot be written.
    """
    check_folder(folder)
    fill_folder(folder, lambda aside: _write(model, checkpoint, aside, max_shard_bytes))


def fill_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let a checkpoint be written aside and appear in a folder as a whole, config.json last.

    Args:
        folder: is made; what it holds under other names stays, a config.json of before goes first.
            What a run that was killed has left unfinished goes as well.
        write: is given an empty folder to write into.

    Raises:
        CheckpointError: the folder cannot be written; nothing of the checkpoint is in it then.
    """
    is_new = not folder.exists()
    moved: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{UNFINISHED}*/"):
            shutil.rmtree(left)
        try:
            # within the folder itself, which may be a link or a disk of its own
            with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as aside:
                write(Path(aside))
                (folder / "config.json").unlink(missing_ok=True)
                # without a config.json the folder is no checkpoint: it comes last
                for path in sorted(Path(aside).iterdir(), key=lambda p: p.name == "config.json"):
                    if path.is_dir():  # which takes the place of an empty one alone
                        shutil.rmtree(folder / path.name, ignore_errors=True)
                    moved.append(path.replace(folder / path.name))
        except BaseException:
            for path in moved:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # what went wrong first is what counts
                    folder.rmdir()
            raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{folder}' cannot be written: {error}") from error


def _write(model: VideoLLaMA2, checkpoint: Checkpoint, folder: Path, max_shard_bytes: int) -> None:
    dtype = model.language_model.lm_head.weight.dtype
    write_json(folder / "config.json", public_config(checkpoint, dtype))
    copy_text_files(checkpoint, folder)
    save_weights(model.state_dict(), folder, max_shard_bytes=max_shard_bytes)


def copy_text_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, settings of generation and what describes a tower, if it lies there too."""
    for name in TEXT_FILES:
        if (checkpoint.text_folder / name).exists():
            shutil.copyfile(checkpoint.text_folder / name, folder / name)
    copy_own_tower(checkpoint.config.mm_vision_tower, checkpoint.folder, folder)


def copy_own_tower(name: str, source: Path, folder: Path) -> None:
    """Copy what describes a tower that lies inside the folder of a checkpoint; others are named.

    Args:
        name: of the tower, as config.json has it.
        source: the checkpoint's folder.
        folder: gets the copy.
    """
    tower = own_tower(name, source)
    if tower is not None:
        (folder / name).mkdir(parents=True)
        for file in TOWER_FACTS:
            shutil.copyfile(tower / file, folder / name / file)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something or cannot be written, before anything is read.

    Raises:
        CheckpointError: naming it.
    """
    try:
        if folder.is_dir():
            names = [path.name for path in folder.iterdir()]
            is_left = all(name.startswith(UNFINISHED) for name in names)
        else:
            names, is_left = [folder.name] * os.path.lexists(folder), False
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise CheckpointError(f"'{folder}' cannot be written: {error.strerror}") from error
    if names:
        left = ", with what an interrupted run left" if is_left else ""
        raise CheckpointError(
            f"'{folder}' exists already{left}; give a new folder, or empty it first"
        )
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"'{folder}' cannot be written: '{above}' takes no files")


def public_config(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """Return the checkpoint's config.json as it reads for a whole model of that dtype."""
    raw = read_json(checkpoint.folder / "config.json")
    # weights that were loaded are no longer quantised
    for key in ("quantization_config", "dtype", "rope_parameters"):
        raw.pop(key, None)
    rope = dict(checkpoint.config.language.rope_parameters or {})
    config = {
        **raw,
        "rope_theta": rope.pop("rope_theta"),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tune_mm_mlp_adapter": False,
    }
    if rope.get("rope_type", "default") != "default":
        # the older key for the kind is "type"
        config["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    return config


def save_weights(
    state: Mapping[str, Tensor], folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a `VideoLLaMA2.state_dict()` as public checkpoints are, with an index if sharded."""
    # safetensors has no two names for one tensor: a copy is one
    tensors = {
        name: place.of(state).clone() if place.is_copy else place.of(state)
        for name, place in find_places(state).items()
    }
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _save(tensors, folder / WHOLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _save({name: tensors[name] for name in names}, folder / file)
    index = {
        "metadata": {"total_size": sum(map(_size, tensors.values()))},
        "weight_map": weight_map,
    }
    write_json(folder / f"{WHOLE_FILE}.index.json", index)


def _shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + _size(tensor) > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += _size(tensor)
    yield names


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # what the umask gives; safetensors would leave it to us alone
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(mode)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
