"""The Spatial-Temporal Convolution connector: frames of patch features -> visual tokens.

    s1       RegStage, each frame alone: patch width C -> model width D
    sampler  Conv3d, kernel 2 and stride 2 in time, height and width, then SiLU
    s2       RegStage on each of the new time slots
    readout  two linear layers, applied to every position

Source: VideoLLaMA 2, arXiv:2406.07476, section 2 and Table 1; upstream VideoLLaMA2@c0bb03a,
model/projector.py, `STCConnector`. Weights are keyed by upstream's names, which are timm's.
"""

from __future__ import annotations

import math

from einops import rearrange
from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

STAGE_DEPTH = 4  # blocks in each RegStage
READOUT_DEPTH = 2  # linear layers after the second stage
SAMPLER_STRIDE = 2  # in time, height and width
# padding 1 on all three axes: 8 x 24 x 24 becomes 5 x 13 x 13, and the first and last time slot
# each mix one real frame with zeros; the later `stc_connector_v35` has the same shapes unpadded
SAMPLER_PADDING = 1


def build_stage(in_channels: int, out_channels: int) -> RegStage:
    """Build one RegStage as the checkpoints hold it.

    `LayerNorm2d` makes timm's LayerNormAct2d with eps 1e-5; `nn.LayerNorm` would build as well,
    with another epsilon.
    """
    return RegStage(
        STAGE_DEPTH,
        in_channels,
        out_channels,
        stride=1,
        dilation=1,
        act_layer=nn.SiLU,
        norm_layer=LayerNorm2d,
    )


def build_readout(hidden_size: int) -> nn.Sequential:
    """Build Linear, GELU, Linear, all `hidden_size` wide; the keys are `0` and `2`."""
    layers: list[nn.Module] = [nn.Linear(hidden_size, hidden_size)]
    for _ in range(1, READOUT_DEPTH):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


class STCConnector(nn.Module):
    """Turn the patch features of T frames into floor(T/2)+1 slots of visual tokens.

    Args:
        mm_hidden_size: width C of the vision tower.
        hidden_size: width D of the language model.
    """

    def __init__(self, mm_hidden_size: int, hidden_size: int) -> None:
        super().__init__()
        self.s1 = build_stage(mm_hidden_size, hidden_size)
        self.sampler = nn.Sequential(
            nn.Conv3d(
                hidden_size,
                hidden_size,
                kernel_size=SAMPLER_STRIDE,
                stride=SAMPLER_STRIDE,
                padding=SAMPLER_PADDING,
            ),
            nn.SiLU(),
        )
        self.s2 = build_stage(hidden_size, hidden_size)
        self.readout = build_readout(hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Connect the frames of each clip.

        Args:
            features: (B, T, N, C) patch features, N a square number, rows of the grid in order.

        Returns:
            (B, T' * H' * W', D) tokens: time slot after time slot, each row by row, where n
            positions along an axis become floor(n/2)+1.
        """
        num_clips, _, num_patches, _ = features.shape
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(f"features have {num_patches} patches a frame, which is no square")
        x = rearrange(features, "b t (h w) c -> (b t) c h w", h=side, w=side)
        x = self.s1(x)  # (B*T, D, H, W)
        x = rearrange(x, "(b t) d h w -> b d t h w", b=num_clips)
        x = self.sampler(x)  # (B, D, T', H', W')
        num_slots = x.shape[2]
        x = rearrange(x, "b d t h w -> (b t) d h w")
        x = self.s2(x)
        x = rearrange(x, "(b t) d h w -> b (t h w) d", t=num_slots)
        tokens: Tensor = self.readout(x)
        return tokens


def count_tokens(num_frames: int, num_patches: int) -> int:
    """Count the visual tokens of a clip of `num_frames` frames with `num_patches` patches each."""
    side = math.isqrt(num_patches)
    slots, rows = (
        (n + 2 * SAMPLER_PADDING - SAMPLER_STRIDE) // SAMPLER_STRIDE + 1 for n in (num_frames, side)
    )
    return slots * rows * rows
