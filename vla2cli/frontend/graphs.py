"""The parts of a front-end as graphs for export: what goes in, what comes out, which axes vary.

    tower      frames (F, 3, S, S) -> features (F, N, C) of the selected layer, no class token
    connector  features (B, T, N, C) -> tokens (B, num_tokens, D)
    sound      fbank (B, R, 128), R whole patches -> features (B, M, A) and tokens (B, M, D)

F, B, T and R vary. Inputs and outputs have the graph's dtype; the fbank is always float32, because
float16 has too few digits for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vla2_models.beats import MEL_MEAN, MEL_STD, BEATs, find_buckets
from vla2_models.beats_design import MAX_DISTANCE, NUM_MEL_BINS
from vla2_models.config import CheckpointConfig
from vla2_models.stc import STCConnector
from vla2_models.stc_fused import PLAIN, ChannelsFirst, FusedSTC, plain_linear
from vla2_models.videollama2 import VideoLLaMA2

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """One network to export.

    The sizes of the example are above 1, since the exporter takes a 1 for a constant; a graph is
    checked at two others.
    """

    name: str  # of its file, without suffix
    module: nn.Module
    plain: nn.Module  # what it has to compute
    input: str
    outputs: tuple[str, ...]
    axes: dict[int, Any]  # of the input; those that vary, and what they are called
    example: Shape
    checks: tuple[Shape, Shape]
    sample: Callable[[Shape], Tensor]  # an input like those it will be given, float32
    always_float32: bool = False  # the input

    def half(self) -> nn.Module:
        """Return a copy of the network in float16."""
        return copy.deepcopy(self.module).half()


class TowerGraph(nn.Module):
    """The tower up to the selected layer."""

    def __init__(self, front: VideoLLaMA2) -> None:
        super().__init__()
        self.front = front

    def forward(self, frames: Tensor) -> Tensor:
        """Turn (F, 3, S, S) frames into (F, N, C) features."""
        return self.front.encode_frames(frames)


class SoundGraph(nn.Module):
    """BEATs with its projector, and its position biases looked up beforehand.

    All pairs of tokens that are `MAX_DISTANCE` or more apart share a bias, so one short row has
    them all; a logarithm that rounds elsewhere than torch's has no say in which bucket a pair is.
    """

    def __init__(self, tower: BEATs, projector: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        table = tower.encoder.bias_table.detach()
        relative = torch.arange(-MAX_DISTANCE, MAX_DISTANCE + 1, device="cpu")
        row = table[find_buckets(relative, len(table)).to(table.device)].T
        self.register_buffer("row", row.contiguous())  # (num_heads, 2 * MAX_DISTANCE + 1)

    def forward(self, fbank: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a (B, R, 128) fbank into (B, M, A) features and (B, M, D) tokens."""
        x = self.tower.embed(fbank)
        places = torch.arange(x.shape[1], device=x.device)
        relative = places[None, :] - places[:, None]  # key minus query
        near = relative.clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE
        features = self.tower.encoder(x, self.get_buffer("row")[:, near])
        return features, self.projector(features)


def list_graphs(model: VideoLLaMA2) -> Iterator[Graph]:
    """List what is exported of a model in float32 on the CPU.

    Args:
        model: its language model takes no part and may be without weights.
    """
    config, front = model.config, _without_language_model(model)
    side: int = config.vision.image_size  # type: ignore[assignment]  # checked to be a number

    @cache
    @torch.inference_mode()
    def some_features() -> Tensor:
        return front.encode_frames(_noise((3, 3, side, side)))

    def clips(shape: Shape) -> Tensor:
        # what a tower makes has large values in few places, unlike noise
        frames = torch.arange(shape[0] * shape[1]) % len(some_features())
        return some_features()[frames].view(shape)

    tower = TowerGraph(front)
    yield Graph(
        name="tower",
        module=tower,
        plain=tower,
        input="frames",
        outputs=("features",),
        axes={0: "num_frames"},
        example=(3, 3, side, side),
        checks=((1, 3, side, side), (2, 3, side, side)),
        sample=_noise,
    )
    fewest, patches = config.connector.min_frames, (config.num_patches, config.mm_hidden_size)
    yield Graph(
        name="connector",
        module=_of_linears(model.mm_projector),
        plain=model.mm_projector,
        input="features",
        outputs=("tokens",),
        axes={0: "num_clips", 1: "num_frames"},
        example=(3, fewest + 3, *patches),
        checks=((1, fewest, *patches), (2, fewest + 1, *patches)),
        sample=clips,
    )
    if model.audio_tower is not None and model.mm_projector_a is not None:
        size = model.audio_tower.design.patch_size
        # more rows than any bucket tells apart: tokens stand in columns of 128 mels
        many = (MAX_DISTANCE * size // NUM_MEL_BINS + 1) * size
        sound = SoundGraph(model.audio_tower, model.mm_projector_a)
        yield Graph(
            name="sound",
            module=sound,
            plain=sound,
            input="fbank",
            outputs=("features", "tokens"),
            axes={0: Dim("num_sounds"), 1: size * Dim("num_slots")},
            example=(2, 6 * size, NUM_MEL_BINS),
            checks=((3, size, NUM_MEL_BINS), (1, many, NUM_MEL_BINS)),
            sample=lambda shape: MEL_MEAN + MEL_STD * _noise(shape),
            always_float32=True,
        )


def frame_bytes(config: CheckpointConfig, itemsize: int) -> int:
    """Estimate the memory that one frame takes while it is in the tower.

    Of the block in hand: scores and probabilities of its attention, the wide layer before and
    after its activation, and six arrays as wide as the tower (input, norm, q, k, v, sum).
    """
    vision = config.vision
    num_tokens = config.num_patches + 1
    attention = 2 * vision.num_attention_heads * num_tokens
    return (
        itemsize * num_tokens * (attention + 2 * vision.intermediate_size + 6 * vision.hidden_size)
    )


def _of_linears(connector: nn.Module) -> nn.Module:
    """Return a connector whose 1x1 convolutions are matrix products, which int8 can be had of."""
    if not isinstance(connector, STCConnector):
        return connector
    return FusedSTC(connector, plain_linear, lambda conv: ChannelsFirst(connector.sampler), PLAIN)


def _without_language_model(model: VideoLLaMA2) -> VideoLLaMA2:
    # the exporter looks at every weight of a module, used or not
    front = copy.copy(model)
    front._modules = {
        name: part for name, part in model.named_children() if part is not model.language_model
    }
    return front


def _noise(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
