"""Weights on disk -> `VideoLLaMA2`, every tensor claimed once.

Names and shapes are checked from the headers before a weight is read, so that a wrong folder of
safetensors is refused in a moment, whatever its size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from .adapter import adapter_shapes, merge_adapter, read_adapter_config
from .checkpoint import Checkpoint
from .config import CheckpointConfig
from .errors import CheckpointError, describe
from .names import (
    AUDIO_PROJECTOR_PREFIX,
    AUDIO_TOWER_PREFIX,
    CONNECTOR_PREFIX,
    Place,
    find_places,
)
from .tensors import open_tensors, read_shapes
from .videollama2 import VideoLLaMA2

Shape = tuple[int, ...]
Settle = Callable[[str, nn.Module], None]

LANGUAGE_MODEL = "language_model."  # how the names of its parameters begin
LAYERS = "model.layers"  # of every language model here
DECODER_LAYER = re.compile(rf"{re.escape(LANGUAGE_MODEL)}({re.escape(LAYERS)}\.\d+)\.")


@dataclass(frozen=True)
class Claim:
    """A tensor of the model and where it lies."""

    path: Path
    name: str  # in that file
    public: str
    shape: Shape


def build_empty(config: CheckpointConfig) -> VideoLLaMA2:
    """Build the networks with parameters on the meta device and true buffers.

    Raises:
        CheckpointError: there is no such network.
    """
    try:
        with init_empty_weights():
            return VideoLLaMA2(config)
    except Exception as error:
        # a setting of the wrong size or name is met anywhere in transformers, as anything
        raise CheckpointError(
            f"'{config.folder}/config.json' or its tower's describes no network that can be built "
            f"({describe(error)[:200]}); take it from the original again"
        ) from error


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    settle: Settle | None = None,
) -> VideoLLaMA2:
    """Load the weights, ready for inference.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: what the weights are cast to; None leaves each as it is stored. A tensor of a
            safetensors file that already has its dtype stays memory-mapped on the CPU, unless the
            model has fused experts or its layers are settled.
        device: where they go, or the CPU with `settle`.
        settle: told each decoder layer of the language model and its name there, as soon as it is
            loaded and before the next file is read, to bring it to its final form and place.

    Raises:
        CheckpointError: a tensor is missing, foreign, of another shape, held twice or not finite,
            copies of one differ, or a file cannot be read; the message names key, shape found and
            shape wanted.
    """
    model = build_empty(checkpoint.config)
    claims = claim_tensors(checkpoint, model)
    layers = {f"{LAYERS}.{i}": layer for i, layer in enumerate(model.language_model.model.layers)}
    weights = _Weights(model, claims, dtype, torch.device(device), is_copied=settle is not None)
    for path, of_path in _by_path(claims).items():
        with open_tensors(path) as tensors:
            for claim in of_path:
                weights.take(claim, tensors.get(claim.name))
        if settle is not None and checkpoint.adapter is None:
            for name in [name for name in layers if weights.is_complete(name)]:
                layer = layers.pop(name)
                weights.assign(f"{LANGUAGE_MODEL}{name}.", layer)
                settle(name, layer.requires_grad_(False).eval())
    weights.assign("", model)
    model.requires_grad_(False).eval()
    if checkpoint.adapter is not None:
        _merge(checkpoint.adapter, model)
    if settle is None:
        return model.to(device)
    for name, layer in layers.items():
        settle(name, layer)
    return model


def load_front(checkpoint: Checkpoint) -> VideoLLaMA2:
    """Load towers and connectors in float32; the language model stays without weights, on "meta".

    Raises:
        CheckpointError: as `load_model`.
    """
    model = build_empty(checkpoint.config)
    claims = claim_tensors(checkpoint, model)
    weights = _Weights(model, claims, torch.float32, torch.device("cpu"), is_copied=False)
    for path, of_path in _by_path(claims).items():
        with open_tensors(path) as tensors:
            for claim in of_path:
                if not weights.places[claim.public].parameter.startswith(LANGUAGE_MODEL):
                    weights.take(claim, tensors.get(claim.name))
    weights.assign("", model)
    return model.requires_grad_(False).eval()


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
        places = find_places(model.state_dict())
        copies = _Copies(places)
        for path, of_path in _by_path(claims).items():
            with open_tensors(path) as tensors:
                for claim in of_path:
                    stored = tensors.get(claim.name)
                    _check_stored(claim, stored)
                    copies.check(claim, stored)
        if checkpoint.adapter is not None:
            _read_adapter(checkpoint.adapter)
    return sum(tensor.numel() for tensor in model.state_dict().values())


def claim_tensors(checkpoint: Checkpoint, model: VideoLLaMA2) -> list[Claim]:
    """Find every tensor of the model in the checkpoint's files, by their headers.

    Raises:
        CheckpointError: one line about the first that is missing, foreign, of another shape or
            held twice.
    """
    state = model.state_dict()
    places = find_places(state)
    wanted = {public: tuple(place.of(state).shape) for public, place in places.items()}
    claims: dict[str, Claim] = {}
    for layer in checkpoint.layers:
        found: dict[str, Claim] = {}
        for path in layer.files:
            for public, name, shape in layer.shapes(path):
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
    missing = [key for key, place in places.items() if key not in claims and not place.is_copy]
    if missing:
        raise CheckpointError(_missing(checkpoint.folder, missing, wanted))
    if checkpoint.adapter is not None:
        _check_adapter(checkpoint.adapter, model)
    # copies of a table count only beside the table itself: a layer above may have trained it on
    tables = {places[key].parameter: c for key, c in claims.items() if not places[key].is_copy}
    return [
        claim
        for key, claim in claims.items()
        if claim.path.parent == tables[places[key].parameter].path.parent or not places[key].is_copy
    ]


class _Weights:
    """The tensors of a model while they are read, under the model's own names."""

    def __init__(
        self,
        model: VideoLLaMA2,
        claims: Sequence[Claim],
        dtype: torch.dtype | None,
        device: torch.device,
        *,
        is_copied: bool,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.empty = model.state_dict()
        self.places = find_places(self.empty)
        self.copies = _Copies(self.places)
        self.state: dict[str, Tensor] = {}
        # where most tensors are copied out of a file, nothing else may hold on to its pages
        has_parts = any(place.part is not None for place in self.places.values())
        self.is_copied = has_parts or is_copied
        self.waiting = Counter(_layer_of(self.places[claim.public]) for claim in claims)

    def take(self, claim: Claim, stored: Tensor) -> None:
        """Check and cast a tensor, and put it where it belongs."""
        place = self.places[claim.public]
        is_copied = self.is_copied and place.part is None
        _check_floats(claim, stored)
        tensor = stored.to(device=self.device, dtype=self.dtype or stored.dtype, copy=is_copied)
        _check_finite(claim, stored, tensor)
        self.copies.check(claim, stored)
        self.waiting[_layer_of(place)] -= 1
        if place.is_copy:
            return
        if place.part is None:
            self.state[place.parameter] = tensor
            return
        whole = self.state.get(place.parameter)
        if whole is None:
            shape = self.empty[place.parameter].shape
            whole = torch.empty(shape, dtype=tensor.dtype, device=self.device)
            self.state[place.parameter] = whole
        if whole.dtype != tensor.dtype:
            raise CheckpointError(
                f"'{claim.path}': tensor {claim.name} is {tensor.dtype}, other experts of its "
                f"layer are {whole.dtype}; give a --dtype"
            )
        place.of(self.state).copy_(tensor)

    def is_complete(self, layer: str) -> bool:
        """Tell whether nothing of a decoder layer is still to come."""
        return not self.waiting[layer]

    def assign(self, prefix: str, module: nn.Module) -> None:
        """Hand the tensors whose names begin so over to their module."""
        names = [name for name in self.state if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): self.state.pop(name) for name in names}
        # claimed one by one; what is absent here was handed over before
        unexpected = module.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
        assert not unexpected, f"no place for {unexpected}"


class _Copies:
    """The tensors that a checkpoint may hold several times, and what the first was like."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = places
        self.shared = {place.parameter for place in places.values() if place.is_copy}
        self.first: dict[str, tuple[str, Tensor]] = {}

    def check(self, claim: Claim, stored: Tensor) -> None:
        """Refuse a copy that differs from the others; other tensors pass."""
        parameter = self.places[claim.public].parameter
        if parameter not in self.shared:
            return
        # cloned, so that it does not hold its file's pages
        name, first = self.first.setdefault(parameter, (claim.name, stored.clone()))
        if stored.dtype != first.dtype or not torch.equal(stored, first):
            raise CheckpointError(
                f"'{claim.path}': tensor {claim.name} differs from {name}, which is the same one; "
                "the checkpoint is damaged, fetch it again"
            )


def _layer_of(place: Place) -> str:
    """Name the decoder layer that a tensor belongs to, as in the language model; "" for none."""
    found = DECODER_LAYER.match(place.parameter)
    return found[1] if found else ""


def _by_path(claims: Sequence[Claim]) -> dict[Path, list[Claim]]:
    """Group claims by file, so that only one file's pages are held at a time."""
    by_path: dict[Path, list[Claim]] = {}
    for claim in claims:
        by_path.setdefault(claim.path, []).append(claim)
    return by_path


def _check_floats(claim: Claim, stored: Tensor) -> None:
    if not stored.is_floating_point() or stored.itemsize < 2:
        raise CheckpointError(
            f"'{claim.path}': tensor {claim.name} holds {stored.dtype}, expected floats; a "
            "quantised model cannot be read, only the one it was made from"
        )


def _check_stored(claim: Claim, stored: Tensor) -> None:
    _check_floats(claim, stored)
    _check_finite(claim, stored, stored)


def _check_finite(claim: Claim, stored: Tensor, tensor: Tensor) -> None:
    where = f"'{claim.path}': tensor {claim.name}"
    if is_finite(tensor):
        return
    if is_finite(stored):
        raise CheckpointError(
            f"{where} holds values up to {float(stored.abs().max()):.3g}, beyond what "
            f"{str(tensor.dtype).removeprefix('torch.')} can; use bfloat16 or float32"
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
    if public.startswith(AUDIO_TOWER_PREFIX):
        return "audio tower"
    if public.startswith(AUDIO_PROJECTOR_PREFIX):
        return "audio projector"
    # the shapes of the connector's first block follow the tower's width
    if ".vision_tower." in public or public.startswith(f"{CONNECTOR_PREFIX}s1.b1."):
        return "tower"
    return "connector" if public.startswith(CONNECTOR_PREFIX) else "language model"


def _check_adapter(path: Path, model: VideoLLaMA2) -> None:
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


def _read_adapter(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with open_tensors(path) as file:
        for name, shape in read_shapes(path).items():
            tensors[name] = file.get(name)
            _check_stored(Claim(path, name, name, shape), tensors[name])
    return tensors


def _merge(path: Path, model: VideoLLaMA2) -> None:
    config = read_adapter_config(path.parent)
    merge_adapter(model.language_model, config, _read_adapter(path))
    for name, weight in model.language_model.named_parameters():
        if not is_finite(weight):
            raise CheckpointError(
                f"'{path}': merged into {name}, it gives values that are not finite; use bfloat16 "
                "or float32"
            )
