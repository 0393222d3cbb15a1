"""Weights on disk -> `VideoLLaMA2`, every tensor claimed once.

Names, shapes and files are checked from the headers before a single weight is read, so that a
wrong folder is refused in a moment, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor

from .checkpoint import Checkpoint
from .config import CheckpointConfig
from .errors import CheckpointError
from .names import CONNECTOR_PREFIX, find_places
from .tensors import Tensors, open_tensors, read_shapes
from .videollama2 import VideoLLaMA2

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """A tensor of the model and where it lies."""

    path: Path
    name: str  # in that file
    public: str
    shape: Shape


def build_empty(config: CheckpointConfig) -> VideoLLaMA2:
    """Build the networks with parameters on the meta device and true buffers."""
    with init_empty_weights():
        return VideoLLaMA2(config)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> VideoLLaMA2:
    """Load the weights, ready for inference.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: what the weights are cast to; None leaves each as it is stored. A tensor that
            already has its dtype stays memory-mapped on the CPU.
        device: where they go.

    Raises:
        CheckpointError: a tensor is missing, foreign, of another shape, held twice or not finite,
            or a file cannot be read; the message names key, shape found and shape wanted.
    """
    model = build_empty(checkpoint.config)
    claims = claim_tensors(checkpoint, model)
    empty = model.state_dict()
    places = find_places(empty)
    state: dict[str, Tensor] = {}
    # where parts are copied out of a file, nothing else may hold on to its pages
    has_parts = any(place.part is not None for place in places.values())

    def convert(claim: Claim, tensor: Tensor) -> Tensor:
        is_copied = has_parts and places[claim.public].part is None
        return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=is_copied)

    def fill(claim: Claim, tensor: Tensor) -> None:
        place = places[claim.public]
        if place.part is None:
            state[place.parameter] = tensor
            return
        if place.parameter not in state:
            whole = empty[place.parameter]
            state[place.parameter] = torch.empty(whole.shape, dtype=tensor.dtype, device=device)
        place.of(state).copy_(tensor)

    _read(claims, convert, fill)
    model.load_state_dict(state, assign=True)
    if checkpoint.adapter is not None:
        _merge(checkpoint.adapter, model)
    return model.requires_grad_(False).to(device).eval()


def check_weights(checkpoint: Checkpoint, *, values: bool = False) -> int:
    """Check the weight files without keeping a weight.

    Args:
        checkpoint: from `open_checkpoint`.
        values: whether every weight is read, to see that it is finite; otherwise names and shapes
            are checked by the headers.

    Returns:
        The number of parameters.

    Raises:
        CheckpointError: as `load_model`.
    """
    model = build_empty(checkpoint.config)
    claims = claim_tensors(checkpoint, model)
    if values:
        _read(claims, lambda _, tensor: tensor, lambda _claim, _tensor: None)
    return sum(tensor.numel() for tensor in model.state_dict().values())


def claim_tensors(checkpoint: Checkpoint, model: VideoLLaMA2) -> list[Claim]:
    """Find every tensor of the model in the checkpoint's files, by their headers.

    Raises:
        CheckpointError: one line about the first that is missing, foreign, of another shape or
            held twice.
    """
    state = model.state_dict()
    wanted = {public: tuple(place.of(state).shape) for public, place in find_places(state).items()}
    claims: dict[str, Claim] = {}
    for layer in checkpoint.layers:
        found: dict[str, Claim] = {}
        for path in layer.files:
            for public, (name, shape) in layer.shapes(path).items():
                claim = Claim(path, name, public, shape)
                if public in found:
                    raise CheckpointError(_held_twice(found[public], claim))
                found[public] = claim
                if public in wanted and public not in claims:
                    _check_shape(claim, wanted[public])
                elif public not in wanted and layer.is_own:
                    raise CheckpointError(
                        f"'{path.parent}': tensor {name} {list(shape)} in '{path.name}' has no "
                        f"place in a {checkpoint.config.model_type} model, found {list(shape)}, "
                        "wanted none"
                    )
        claims = {**{key: c for key, c in found.items() if key in wanted}, **claims}
    missing = [key for key in wanted if key not in claims]
    if missing:
        raise CheckpointError(_missing(checkpoint.folder, missing, wanted))
    if checkpoint.adapter is not None:
        _check_adapter(checkpoint.adapter, model)
    return list(claims.values())


def _read(
    claims: list[Claim],
    convert: Callable[[Claim, Tensor], Tensor],
    take: Callable[[Claim, Tensor], None],
) -> None:
    """Read the claimed tensors file by file, so that only one file's pages are held at a time."""
    by_path: dict[Path, list[Claim]] = {}
    for claim in claims:
        by_path.setdefault(claim.path, []).append(claim)
    for path, of_path in by_path.items():
        with open_tensors(path) as tensors:
            for claim in of_path:
                take(claim, _finite(claim, tensors, convert))


def _finite(claim: Claim, tensors: Tensors, convert: Callable[[Claim, Tensor], Tensor]) -> Tensor:
    stored = tensors.get(claim.name)
    tensor = convert(claim, stored)
    if is_finite(tensor):
        return tensor
    where = f"'{claim.path}': tensor {claim.name}"
    if is_finite(stored):
        raise CheckpointError(
            f"{where} holds values up to {float(stored.abs().max()):.3g}, which {tensor.dtype} "
            "cannot; use bfloat16 or float32"
        )
    kind = "NaN" if bool(stored.isnan().any()) else "infinite values"
    raise CheckpointError(f"{where} holds {kind}; the checkpoint is damaged, fetch it again")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity, in one pass and without a copy."""
    if not tensor.numel():
        return True
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def _check_shape(claim: Claim, wanted: Shape) -> None:
    if claim.shape != wanted:
        raise CheckpointError(
            f"'{claim.path.parent}': tensor {claim.name} is {list(claim.shape)}, this config's "
            f"{_part(claim.public)} needs {list(wanted)}; the folder mixes two models"
        )


def _held_twice(first: Claim, second: Claim) -> str:
    return (
        f"'{second.path.parent}': tensor {second.name} is held twice, by '{first.path.name}' and "
        f"'{second.path.name}'"
    )


def _missing(folder: Path, missing: list[str], wanted: Mapping[str, Shape]) -> str:
    more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
    return (
        f"'{folder}': tensor {missing[0]}{more} missing, found none, "
        f"wanted {list(wanted[missing[0]])}; the checkpoint is incomplete"
    )


def _part(public: str) -> str:
    # the shapes of the connector's first block follow the tower's width
    if ".vision_tower." in public or public.startswith(f"{CONNECTOR_PREFIX}s1.b1."):
        return "tower"
    return "connector" if public.startswith(CONNECTOR_PREFIX) else "language model"


def _check_adapter(path: Path, model: VideoLLaMA2) -> None:
    from .adapter import adapter_shapes, read_adapter_config

    config = read_adapter_config(path.parent)
    try:
        wanted = adapter_shapes(model.language_model, config)
    except CheckpointError as error:
        raise CheckpointError(f"'{path.parent}': {error}") from error
    found = read_shapes(path)
    for name, shape in found.items():
        if name not in wanted:
            raise CheckpointError(
                f"'{path}': tensor {name} {list(shape)} has no place in the adapter that "
                "adapter_config.json describes"
            )
        _check_shape(Claim(path, name, name, shape), wanted[name])
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(_missing(path, missing, wanted))


def _merge(path: Path, model: VideoLLaMA2) -> None:
    from .adapter import merge_adapter, read_adapter_config

    adapted: dict[str, Tensor] = {}
    shapes = read_shapes(path)
    claims = [Claim(path, name, name, shape) for name, shape in shapes.items()]
    _read(claims, lambda _, tensor: tensor, lambda claim, t: adapted.update({claim.name: t}))
    merge_adapter(model.language_model, read_adapter_config(path.parent), adapted)
