"""A file with BEATs alone -> `BEATs`: as its authors publish it, or as its training here left it.

Source: upstream VideoLLaMA2@8cedfbd (branch audio_visual), model/videollama2_arch.py,
`initialize_audio_modules`, which takes the second kind without looking for what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .beats import BEATs
from .beats_design import BIAS_NAME, MAX_DISTANCE, BEATsDesign, read_design
from .errors import CheckpointError
from .loading import is_finite
from .names import AUDIO_TOWER_PREFIX
from .tensors import open_tensors, read_parts

# what this network computes, where a `cfg` says it; upstream's defaults are the same
_FIXED: Mapping[str, Any] = {
    "layer_norm_first": False,
    "deep_norm": True,
    "gru_rel_pos": True,
    "relative_position_embedding": True,
    "conv_bias": False,
    "activation_fn": "gelu",
    "max_distance": MAX_DISTANCE,
}


def load_beats(path: Path) -> BEATs:
    """Load BEATs from a file of its own, in float32, ready for inference.

    Args:
        path: `.pt` or `.pth` for a pickle of {cfg, model} and perhaps more settings;
            `.bin` or `.safetensors` for tensors whose names begin with `model.audio_tower.`, as
            training writes them to audio_tower.bin.

    Raises:
        CheckpointError: the file cannot be read, or holds another network, or not the whole of
            one; one line with the value found and what was expected.
    """
    cfg, tensors = _read(path)
    try:
        design = read_design({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except CheckpointError as error:
        raise CheckpointError(f"'{path}': {error}") from error
    _check_cfg(path, cfg, design)
    with torch.device("meta"):
        model = BEATs(design)
    copies = {BIAS_NAME.format(i) for i in range(1, design.num_layers)} & tensors.keys()
    own = {name: tensor for name, tensor in tensors.items() if name not in copies}
    _check_shapes(path, own, model.state_dict())
    state = {name: _to_float32(path, name, tensor) for name, tensor in own.items()}
    _check_copies(path, tensors, sorted(copies))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.suffix in (".pt", ".pth"):
        settings, tensors = read_parts(path, "model")
        cfg = settings.get("cfg")
        if not isinstance(cfg, dict):
            found = "none" if cfg is None else f"a {type(cfg).__name__}"
            raise CheckpointError(f"'{path}': cfg: found {found}, expected a dict of settings")
        return cfg, tensors
    with open_tensors(path) as file:
        names = file.keys()
        foreign = [name for name in names if not name.startswith(AUDIO_TOWER_PREFIX)]
        if foreign:
            raise CheckpointError(
                f"'{path}' holds tensor {foreign[0]!r:.100}, expected only names that begin with "
                f"'{AUDIO_TOWER_PREFIX}'"
            )
        return {}, {name.removeprefix(AUDIO_TOWER_PREFIX): file.get(name) for name in names}


def _check_cfg(path: Path, cfg: Mapping[str, Any], design: BEATsDesign) -> None:
    of_shapes: dict[str, Any] = {
        "input_patch_size": design.patch_size,
        "embed_dim": design.embed_dim,
        "encoder_layers": design.num_layers,
        "encoder_embed_dim": design.hidden_size,
        "encoder_ffn_embed_dim": design.intermediate_size,
        "encoder_attention_heads": design.num_heads,
        "num_buckets": design.num_buckets,
        "conv_pos": design.conv_pos,
        "conv_pos_groups": design.conv_pos_groups,
        "finetuned_model": design.num_classes is not None,
    }
    if design.num_classes is not None:
        of_shapes["predictor_class"] = design.num_classes
    for wanted, reason in (
        (_FIXED, "which is all that this BEATs computes"),
        (of_shapes, "as the file's tensors have it"),
    ):
        for name, value in wanted.items():
            if name in cfg and cfg[name] != value:
                raise CheckpointError(
                    f"'{path}': cfg has {name} {cfg[name]!r:.100}, expected {value!r}, {reason}"
                )


def _check_copies(path: Path, tensors: Mapping[str, Tensor], copies: Sequence[str]) -> None:
    for name in copies:
        if not torch.equal(tensors[name], tensors[BIAS_NAME.format(0)]):
            raise CheckpointError(
                f"'{path}': tensor {name} differs from that of layer 0, expected copies of one "
                "table that all layers share"
            )


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        found = f"'{path}': tensor {name!r:.100} {list(tensor.shape)!s:.100}"
        if name not in wanted:
            raise CheckpointError(f"{found} has no place in BEATs, expected none of that name")
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(f"{found} does not fit, expected {list(wanted[name].shape)}")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(
            f"'{path}': tensor {missing[0]} is missing, expected {list(wanted[missing[0]].shape)}; "
            "the file is incomplete"
        )


def _to_float32(path: Path, name: str, stored: Tensor) -> Tensor:
    if not stored.is_floating_point():
        raise CheckpointError(f"'{path}': tensor {name} holds {stored.dtype}, expected floats")
    tensor = stored.float()
    if not is_finite(tensor):
        raise CheckpointError(
            f"'{path}': tensor {name} holds NaN or infinite values; the file is damaged, fetch it "
            "again"
        )
    return tensor
