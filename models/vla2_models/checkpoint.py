"""Weights on disk -> `VideoLLaMA2`, every tensor claimed once; and back.

Names, shapes and files are checked from the headers before a single weight is read, so that a
wrong folder is refused in a moment, whatever its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import CheckpointConfig, read_config, tower_name
from .errors import CheckpointError
from .files import read_json
from .hub import TOWER_FILES, Located, Source, locate, shard_names
from .videollama2 import VideoLLaMA2, public_name

# buffers that older releases of transformers wrote and that are computed, not loaded
COMPUTED_BUFFERS = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk whose configuration is understood; no weight is read yet."""

    located: Located
    config: CheckpointConfig

    @property
    def folder(self) -> Path:
        """The folder that holds config.json and the weights."""
        return self.located.folder

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(path.stat().st_size for path in self.weight_files())

    def weight_files(self) -> list[Path]:
        """List the weight files, in the order of their names.

        Raises:
            CheckpointError: there is none, or one that the index names is absent.
        """
        names = shard_names(self.folder)
        if not names and (self.folder / "model.safetensors").exists():
            names = ["model.safetensors"]
        if not names:
            raise CheckpointError(f"'{self.folder}' holds no safetensors weights{self._pickles()}")
        for name in names:
            if not (self.folder / name).exists():
                raise CheckpointError(
                    f"'{self.folder}' lacks '{name}', which its index names; fetch it again"
                )
        return [self.folder / name for name in names]

    def _pickles(self) -> str:
        pickles = sorted(path.name for path in self.folder.glob("*.bin"))
        return f", only pickles such as '{pickles[0]}', which are not read" if pickles else ""


def open_checkpoint(
    name: str, source: Source | None = None, *, revision: str | None = None
) -> Checkpoint:
    """Find a checkpoint and its tower and read their configuration.

    Args:
        name: a folder, or a hub id.
        source: where to look for it and for the tower that its config.json names.
        revision: commit, tag or branch on the hub.

    Raises:
        CheckpointError: it is nowhere, or is not understood.
    """
    source = source or Source()
    located = locate(name, source, revision=revision)
    raw = read_json(located.folder / "config.json")
    if "videollama2" not in str(raw.get("model_type")):
        raise CheckpointError(
            f"'{located.folder}' holds a model of type {raw.get('model_type')!r}, "
            "expected a VideoLLaMA 2 checkpoint (videollama2_…)"
        )
    tower = locate(tower_name(located.folder, raw), source, files=TOWER_FILES)
    return Checkpoint(located, read_config(located.folder, tower.folder))


def build_empty(config: CheckpointConfig) -> VideoLLaMA2:
    """Build the networks with parameters on the meta device and true buffers."""
    with init_empty_weights():
        return VideoLLaMA2(config)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VideoLLaMA2:
    """Load the weights, ready for inference.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: what the weights are cast to; a tensor that already has it stays memory-mapped.
        device: where they go.

    Raises:
        CheckpointError: a tensor is missing, foreign, of another shape or held twice, or a file
            cannot be read; the message names key, shape found and shape wanted.
    """
    model = build_empty(checkpoint.config)
    check_weights(checkpoint, model)
    wanted = {public_name(name): name for name in model.state_dict()}
    for path in checkpoint.weight_files():
        with _open(path) as tensors:
            state = {
                wanted[key]: tensors.get_tensor(key).to(device=device, dtype=dtype)
                for key in tensors.keys()  # noqa: SIM118  safe_open is no mapping
                if key in wanted
            }
        model.load_state_dict(state, strict=False, assign=True)
    return model.requires_grad_(False).to(device).eval()


def check_weights(checkpoint: Checkpoint, model: VideoLLaMA2 | None = None) -> int:
    """Check names and shapes of all tensors by the headers of the weight files.

    Args:
        checkpoint: from `open_checkpoint`.
        model: built for its config; made here, without memory, when not given.

    Returns:
        The number of parameters.

    Raises:
        CheckpointError: as `load_model`.
    """
    model = model or build_empty(checkpoint.config)
    state = model.state_dict()
    check_shapes(
        {public_name(name): tuple(tensor.shape) for name, tensor in state.items()},
        {path: read_shapes(path) for path in checkpoint.weight_files()},
        checkpoint,
    )
    return sum(tensor.numel() for tensor in state.values())


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[Path, Mapping[str, tuple[int, ...]]],
    checkpoint: Checkpoint,
) -> None:
    """Check that every wanted tensor is held once, in its shape, and that no other is held.

    Raises:
        CheckpointError: one line about the first that is not so.
    """
    holder: dict[str, Path] = {}
    for path, shapes in found.items():
        for key, shape in shapes.items():
            if key in holder:
                raise CheckpointError(
                    f"'{checkpoint.folder}': tensor {key} is held twice, "
                    f"by '{holder[key].name}' and '{path.name}'"
                )
            holder[key] = path
            if key not in wanted:
                raise CheckpointError(
                    f"'{checkpoint.folder}': tensor {key} {list(shape)} in '{path.name}' has no "
                    f"place in a {checkpoint.config.model_type} model, found {list(shape)}, "
                    "wanted none"
                )
            if shape != wanted[key]:
                raise CheckpointError(
                    f"'{checkpoint.folder}': tensor {key} is {list(shape)}, this config's "
                    f"{_part(key)} needs {list(wanted[key])}; the folder mixes two models"
                )
    missing = [key for key in wanted if key not in holder]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(
            f"'{checkpoint.folder}': tensor {missing[0]}{more} missing, found none, "
            f"wanted {list(wanted[missing[0]])}; the checkpoint is incomplete"
        )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes in a weight file's header; computed buffers are left out."""
    with _open(path) as tensors:
        return {
            key: tuple(tensors.get_slice(key).get_shape())
            for key in tensors.keys()  # noqa: SIM118  safe_open is no mapping
            if not COMPUTED_BUFFERS.search(key)
        }


def save_weights(model: VideoLLaMA2, path: Path) -> None:
    """Write the weights as one safetensors file under the names of the public checkpoints."""
    tensors = {public_name(name): t.contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{path}' is not a whole safetensors file: {error}") from error


def _part(key: str) -> str:
    # the shapes of the connector's first block follow the tower's width
    if ".vision_tower." in key or ".mm_projector.s1.b1." in key:
        return "tower"
    return "connector" if ".mm_projector." in key else "language model"
