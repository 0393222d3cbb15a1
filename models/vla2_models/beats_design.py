"""The sizes of one BEATs, read off the shapes of its tensors: no checkpoint states them elsewhere.

Source: BEATs, arXiv:2212.09058; upstream VideoLLaMA2@8cedfbd (branch audio_visual), model/beats,
whose class has the public model's sizes as its defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import CheckpointError

Shape = tuple[int, ...]

NUM_MEL_BINS = 128
MAX_DISTANCE = 800  # tokens; all that are farther apart share one bucket. No shape tells it
GATE_WIDTH = 8  # outputs of the gate's linear layer: two gates of four each

# one table of biases serves every layer, and only layer 0 has it as a parameter; the public
# checkpoints hold a copy of it for each layer
BIAS_NAME = "encoder.layers.{}.self_attn.relative_attention_bias.weight"

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.", re.ASCII)

# what a number may be; far beyond any real tower, so that a slip is met before it fills the memory
_WIDTH, _COUNT = range(1, 2**20), range(1, 2**10)
_TAPS = range(1, 2**12)
_BUCKETS = range(4, 4 * MAX_DISTANCE)  # else the logarithmic half of them is empty


@dataclass(frozen=True)
class BEATsDesign:
    """The sizes of one BEATs."""

    patch_size: int  # frames, and mel bins, of a patch
    embed_dim: int  # width of a patch before the encoder
    hidden_size: int  # width of a token in the encoder
    intermediate_size: int  # width inside the feed-forward part of a layer
    num_layers: int
    num_heads: int
    num_buckets: int  # of relative positions, both directions together
    conv_pos: int  # taps of the positional convolution, in tokens
    conv_pos_groups: int
    num_classes: int | None  # of the fine-tuned head ("predictor"); None where there is none

    def count_tokens(self, num_frames: int) -> int:
        """Count the tokens of a filter bank of `num_frames` frames; what fills no patch is cut."""
        return (num_frames // self.patch_size) * (NUM_MEL_BINS // self.patch_size)


def read_design(shapes: Mapping[str, Shape]) -> BEATsDesign:
    """Read the sizes off the shapes of a checkpoint's tensors.

    Args:
        shapes: by name, without `model.audio_tower.`.

    Raises:
        CheckpointError: one line about the tensor that is missing or cannot be, with no path.
    """
    embed_dim, _, patch_size, _ = _sizes(shapes, "patch_embedding.weight", 4)
    _check_number("patch_embedding.weight", shapes, patch_size, range(1, NUM_MEL_BINS + 1))
    _check_shape(shapes, "patch_embedding.weight", (embed_dim, 1, patch_size, patch_size))
    (hidden_size,) = _sizes(shapes, "encoder.layer_norm.weight", 1)
    if embed_dim != hidden_size:
        _check_shape(shapes, "post_extract_proj.weight", (hidden_size, embed_dim))

    num_buckets, num_heads = _sizes(shapes, BIAS_NAME.format(0), 2)
    _check_number(BIAS_NAME.format(0), shapes, num_buckets, _BUCKETS)
    _check_number(BIAS_NAME.format(0), shapes, num_heads, _COUNT)
    _check_divides(BIAS_NAME.format(0), shapes, num_heads, hidden_size)

    _, group_size, conv_pos = _sizes(shapes, "encoder.pos_conv.0.weight_v", 3)
    _check_shape(shapes, "encoder.pos_conv.0.weight_v", (hidden_size, group_size, conv_pos))
    _check_number("encoder.pos_conv.0.weight_v", shapes, conv_pos, _TAPS)
    _check_divides("encoder.pos_conv.0.weight_v", shapes, group_size, hidden_size)

    intermediate_size, _ = _sizes(shapes, "encoder.layers.0.fc1.weight", 2)
    num_layers = _count_layers(shapes)
    for i in range(num_layers):
        layer = f"encoder.layers.{i}"
        _check_shape(shapes, f"{layer}.fc1.weight", (intermediate_size, hidden_size))
        _check_shape(shapes, f"{layer}.self_attn.q_proj.weight", (hidden_size, hidden_size))
        gate = (GATE_WIDTH, hidden_size // num_heads)
        _check_shape(shapes, f"{layer}.self_attn.grep_linear.weight", gate)

    num_classes = None
    if "predictor.weight" in shapes:
        num_classes, _ = _sizes(shapes, "predictor.weight", 2)
        _check_shape(shapes, "predictor.weight", (num_classes, hidden_size))
    return BEATsDesign(
        patch_size=patch_size,
        embed_dim=embed_dim,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_buckets=num_buckets,
        conv_pos=conv_pos,
        conv_pos_groups=hidden_size // group_size,
        num_classes=num_classes,
    )


def _sizes(shapes: Mapping[str, Shape], name: str, num_axes: int) -> Shape:
    if name not in shapes:
        raise CheckpointError(f"tensor {name} is missing from the audio tower")
    shape = shapes[name]
    if len(shape) != num_axes or not all(size in _WIDTH for size in shape):
        raise CheckpointError(
            f"tensor {name} is {_show(shape)}, expected {num_axes} sizes of 1 to {_WIDTH[-1]:,}"
        )
    return shape


def _check_shape(shapes: Mapping[str, Shape], name: str, wanted: Shape) -> None:
    if _sizes(shapes, name, len(wanted)) != wanted:
        raise CheckpointError(
            f"tensor {name} is {_show(shapes[name])}, the audio tower's other tensors need "
            f"{list(wanted)}"
        )


def _check_number(name: str, shapes: Mapping[str, Shape], found: int, allowed: range) -> None:
    if found not in allowed:
        raise CheckpointError(
            f"tensor {name} is {_show(shapes[name])}, expected {allowed[0]} to {allowed[-1]:,} "
            f"where it has {found}"
        )


def _check_divides(name: str, shapes: Mapping[str, Shape], found: int, whole: int) -> None:
    if whole % found:
        raise CheckpointError(
            f"tensor {name} is {_show(shapes[name])}, its {found} does not divide the audio "
            f"tower's width {whole}"
        )


def _count_layers(shapes: Mapping[str, Shape]) -> int:
    found = {match[1] for name in shapes if (match := _LAYER.match(name))}
    # the text first: Python makes no number of thousands of digits
    numbers = [int(text) if len(text) < 10 else _COUNT.stop for text in found]
    num_layers = max(numbers) + 1
    if num_layers not in _COUNT:
        raise CheckpointError(
            f"the audio tower has tensors of a layer beyond {_COUNT[-1] - 1:,}, expected 1 to "
            f"{_COUNT[-1]:,} layers"
        )
    return num_layers


def _show(shape: Shape) -> str:
    return f"{list(shape)!s:.100}"
