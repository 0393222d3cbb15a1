"""The Spatial-Temporal Convolution connector: frames of patch features -> visual tokens.

    s1       RegStage, each frame alone: patch width C -> model width D
    sampler  3D convolution or mean over blocks of time, height and width, then SiLU
    s2       RegStage on each of the new time slots
    readout  linear layers with GELU between them, applied to every position

Which of these there are, and how large the blocks, a `ConnectorDesign` says.

Source: VideoLLaMA 2, arXiv:2406.07476, section 2.1, Algorithm 1; upstream VideoLLaMA2@c0bb03a,
model/projector.py, `STCConnector`. Weights are keyed by upstream's names, which are timm's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from einops import rearrange
from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

STAGE_DEPTH = 4  # blocks in each RegStage


@dataclass(frozen=True)
class ConnectorDesign:
    """What a connector is made of; its widths are not part of it."""

    kernel: tuple[int, int, int] | None  # time, height, width; the stride too; None: mean over time
    is_convolution: bool  # else the sampler is the mean over each block
    padding: int = 0  # zeros around time, height and width, before a convolution
    has_stages: bool = True  # a RegStage before the sampler and one after it
    readout_depth: int = 2  # linear layers

    def __post_init__(self) -> None:
        if self.padding and not self.is_convolution:
            raise ValueError(f"padding is {self.padding}, only a convolution has any")
        if self.kernel is None and (self.is_convolution or self.has_stages):
            raise ValueError("kernel is None, so there can be no convolution and no stages")

    @property
    def min_frames(self) -> int:
        """The fewest frames that leave a token."""
        if self.kernel is None:
            return 1
        return max(1, self.kernel[0] - 2 * self.padding)

    def count_tokens(self, num_frames: int, num_patches: int) -> int:
        """Count the visual tokens of a clip of `num_frames` frames of `num_patches` patches each.

        Raises:
            ValueError: no token would be left, or the patches form no square where they have to.
        """
        if num_frames < self.min_frames:
            raise ValueError(
                f"num_frames is {num_frames}, this connector needs at least {self.min_frames}; "
                "with fewer no visual token is left"
            )
        if self.kernel is None:
            return num_patches
        side = grid_side(num_patches)
        # what does not fill a block at the end is left out: 5 frames in blocks of 2 give 2 slots
        slots, rows, columns = (
            (n + 2 * self.padding) // size for n, size in zip((num_frames, side, side), self.kernel)
        )
        if not rows * columns:
            raise ValueError(
                f"{num_patches} patches are a grid of {side} x {side}, less than one block of "
                f"{self.kernel[1]} x {self.kernel[2]}; no visual token is left"
            )
        return slots * rows * columns


# padding 1 on all three axes: 8 x 24 x 24 becomes 5 x 13 x 13, and the first and last time slot
# each mix one real frame with zeros; the later `stc_connector_v35` has the same shapes unpadded
STC_CONNECTOR = ConnectorDesign(kernel=(2, 2, 2), is_convolution=True, padding=1)


def grid_side(num_patches: int) -> int:
    """Return the side of the square grid that the patches of a frame form."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches a frame form no square")
    return side


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


def build_sampler(in_channels: int, out_channels: int, design: ConnectorDesign) -> nn.Sequential:
    """Build the downsampler, whose blocks do not overlap, and the SiLU after it."""
    if design.kernel is None:
        raise ValueError("kernel is None, a sampler needs the size of its blocks")
    if not design.is_convolution:
        return nn.Sequential(nn.AvgPool3d(design.kernel), nn.SiLU())
    conv = nn.Conv3d(
        in_channels,
        out_channels,
        kernel_size=design.kernel,
        stride=design.kernel,
        padding=design.padding,
    )
    return nn.Sequential(conv, nn.SiLU())


def build_readout(in_features: int, out_features: int, depth: int) -> nn.Sequential:
    """Build `depth` linear layers with GELU between them; the keys are `0`, `2`, and so on."""
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)


class STCConnector(nn.Module):
    """Turn the patch features of T frames into T' slots of visual tokens.

    Args:
        mm_hidden_size: width C of the vision tower.
        hidden_size: width D of the language model.
        design: the blocks and stages; that of the first release where none is given.
    """

    def __init__(
        self, mm_hidden_size: int, hidden_size: int, design: ConnectorDesign = STC_CONNECTOR
    ) -> None:
        super().__init__()
        self.design = design
        self.width = hidden_size  # of the stages, and of the tokens
        # the first part with weights goes from C to D: s1, else a convolution, else the readout
        before = hidden_size if design.has_stages else mm_hidden_size
        after = hidden_size if design.is_convolution else before
        self.s1 = build_stage(mm_hidden_size, before) if design.has_stages else nn.Identity()
        self.sampler = build_sampler(before, after, design)
        self.s2 = build_stage(after, after) if design.has_stages else nn.Identity()
        self.readout = build_readout(after, hidden_size, design.readout_depth)

    def forward(self, features: Tensor) -> Tensor:
        """Connect the frames of each clip.

        Args:
            features: (B, T, N, C) patch features, N a square number, rows of the grid in order.

        Returns:
            (B, T' * H' * W', D) tokens: time slot after time slot, each row by row;
            `design.count_tokens(T, N)` of them.

        Raises:
            ValueError: as `count_tokens`.
        """
        num_clips, num_frames, num_patches, _ = features.shape
        self.design.count_tokens(num_frames, num_patches)  # refuses a clip that leaves no token
        side = grid_side(num_patches)
        x = rearrange(features, "b t (h w) c -> (b t) c h w", h=side, w=side)
        x = self.s1(x)  # (B*T, D, H, W); still C wide without stages
        x = rearrange(x, "(b t) d h w -> b d t h w", b=num_clips)
        x = self.sampler(x)  # (B, D, T', H', W'); still C wide after a pool without stages
        x = rearrange(x, "b d t h w -> (b t) d h w")
        x = self.s2(x)
        x = rearrange(x, "(b t) d h w -> b (t h w) d", b=num_clips)
        tokens: Tensor = self.readout(x)
        return tokens
