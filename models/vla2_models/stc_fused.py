"""The STC connector laid out for speed: channels last, on the fused operators of `vla2_kernels`.

Patch features come as (frames, rows, columns, channels) and stay so: a 1x1 convolution is a linear
layer, a norm over the channels runs along memory, and nothing is transposed. A 3D convolution,
whose blocks do not overlap, is one linear layer for each tap, so that the zeros around a clip are
never multiplied. The definition is `STCConnector` in stc.py; tests hold this one to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from vla2_kernels.conv3d import conv3d_silu, relay_conv3d_weight
from vla2_kernels.depthwise import (
    depthwise_norm_silu_pool,
    depthwise_norm_silu_pool_reference,
    relay_depthwise_weight,
)
from vla2_kernels.norm import norm_scale_residual_silu, norm_scale_residual_silu_reference

from .stc import STCConnector, grid_side
from .videollama2 import VideoLLaMA2

MakeLinear = Callable[[Tensor, Tensor | None], nn.Module]  # weight, bias -> layer
MakeConv = Callable[[nn.Conv3d], nn.Module]  # 3D convolution -> the same with SiLU, channels last


@dataclass(frozen=True)
class Operators:
    """What a stage computes beside its linear layers."""

    depthwise_norm_silu_pool: Callable[..., tuple[Tensor, Tensor]]
    norm_scale_residual_silu: Callable[..., Tensor]


FUSED = Operators(depthwise_norm_silu_pool, norm_scale_residual_silu)
# of PyTorch's own operators, for an exporter that knows no others
PLAIN = Operators(depthwise_norm_silu_pool_reference, norm_scale_residual_silu_reference)


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a linear layer of given weights, without a copy."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _frozen(weight)
    if bias is not None:
        layer.bias = _frozen(bias)
    return layer


def fuse_connector(model: VideoLLaMA2) -> VideoLLaMA2:
    """Copy a model with its connector on the fused operators; all else is the same.

    Raises:
        ValueError: it is no STC connector.
    """
    connector = model.mm_projector
    if not isinstance(connector, STCConnector):
        raise ValueError(f"there are no fused operators for a {model.config.projector_type}")
    clone = copy.copy(model)
    clone._modules = {
        **model._modules,
        "mm_projector": FusedSTC(connector, plain_linear, _kernel_conv),
    }
    return clone


class FusedSTC(nn.Module):
    """An STC connector for inference that shares its weights with the plain one.

    Args:
        connector: the plain one, loaded.
        make_linear: what 1x1 convolutions and linear layers become.
        make_conv: what a 3D convolution becomes.
        operators: the fused ones, or `PLAIN`.
    """

    def __init__(
        self,
        connector: STCConnector,
        make_linear: MakeLinear,
        make_conv: MakeConv,
        operators: Operators = FUSED,
    ) -> None:
        super().__init__()
        self.design = connector.design
        self.s1 = _fuse_stage(connector.s1, make_linear, operators)
        sampler = connector.sampler
        conv = sampler[0]
        self.sampler = make_conv(conv) if isinstance(conv, nn.Conv3d) else ChannelsFirst(sampler)
        self.s2 = _fuse_stage(connector.s2, make_linear, operators)
        self.readout = nn.Sequential(
            *(
                make_linear(layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer
                for layer in connector.readout
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        """Connect the frames of each clip: (B, T, N, C) to tokens, as `STCConnector.forward`."""
        num_clips, num_frames, num_patches, _ = features.shape
        self.design.count_tokens(num_frames, num_patches)  # refuses a clip that leaves no token
        x = rearrange(features, "b t (h w) c -> (b t) h w c", h=grid_side(num_patches))
        x = self.s1(x)
        x = self.sampler(rearrange(x, "(b t) h w d -> b t h w d", b=num_clips))
        x = self.s2(rearrange(x, "b t h w d -> (b t) h w d"))
        tokens: Tensor = self.readout(rearrange(x, "(b t) h w d -> b (t h w) d", b=num_clips))
        return tokens


class FusedBlock(nn.Module):
    """One `Bottleneck` of timm's RegNet: 1x1, depthwise 3x3, squeeze and excite, 1x1, shortcut."""

    def __init__(self, block: Any, make_linear: MakeLinear, operators: Operators) -> None:
        super().__init__()
        self.operators = operators

        def pointwise(conv: nn.Conv2d) -> nn.Module:
            return make_linear(conv.weight.flatten(1), conv.bias)

        self.conv1, self.norm1 = pointwise(block.conv1.conv), _norm(block.conv1.bn)
        self.depthwise = _frozen(relay_depthwise_weight(block.conv2.conv.weight))
        self.norm2 = _norm(block.conv2.bn)
        self.squeeze, self.excite = pointwise(block.se.fc1), pointwise(block.se.fc2)
        self.conv3, self.norm3 = pointwise(block.conv3.conv), _norm(block.conv3.bn)
        self.shortcut: nn.Module = nn.Identity()
        if not isinstance(block.downsample, nn.Identity):
            conv, norm = block.downsample.conv, block.downsample.bn
            self.shortcut = nn.Sequential(pointwise(conv), _norm(norm))

    def forward(self, x: Tensor) -> Tensor:
        """Turn (F, H, W, C) into (F, H, W, D)."""
        ops = self.operators
        y = ops.norm_scale_residual_silu(self.conv1(x), *_affine(self.norm1))
        y, mean = ops.depthwise_norm_silu_pool(y, self.depthwise, *_affine(self.norm2))
        # of four axes, since exporters have another operator for two, which int8 cannot be had of
        mean = mean.to(x.dtype)[:, None, None]
        gate = self.excite(functional.silu(self.squeeze(mean))).sigmoid()
        y = self.conv3(y.mul_(gate))
        return ops.norm_scale_residual_silu(y, *_affine(self.norm3), residual=self.shortcut(x))


class KernelConv3d(nn.Module):
    """A 3D convolution of 2 x 2 x 2 and SiLU as one fused operator; its weight is re-laid once."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        assert conv.bias is not None, "a sampler has a bias"
        self.weight, self.bias = _frozen(relay_conv3d_weight(conv.weight)), _frozen(conv.bias)
        self.padding = int(conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        """Turn (B, T, H, W, C) into (B, T', H', W', D)."""
        return conv3d_silu(x, self.weight, self.bias, self.padding)


class TapConv3d(nn.Module):
    """A 3D convolution of blocks that do not overlap, as one linear layer for each tap, and SiLU.

    Each position of the input belongs to one block and one tap, so that the layers together
    multiply each once, and no zero of the padding.
    """

    def __init__(self, conv: nn.Conv3d, make_linear: MakeLinear) -> None:
        super().__init__()
        assert conv.bias is not None, "a sampler has a bias"
        self.bias = _frozen(conv.bias)
        self.kernel, self.padding = conv.kernel_size, cast("tuple[int, ...]", conv.padding)
        self.offsets = list(product(*(range(size) for size in conv.kernel_size)))
        self.taps = nn.ModuleList(
            make_linear(conv.weight[:, :, t, h, w], None) for t, h, w in self.offsets
        )

    def forward(self, x: Tensor) -> Tensor:
        """Turn (B, T, H, W, C) into (B, T', H', W', D)."""
        axes = list(zip(x.shape[1:4], self.kernel, self.padding))
        blocks = [(n + 2 * padding) // size for n, size, padding in axes]
        # summed in float32: eight sums rounded to bfloat16 lose as much again as their products
        wide = torch.promote_types(x.dtype, torch.float32)
        y = self.bias.to(wide).expand(x.shape[0], *blocks, -1).clone()
        for offsets, tap in zip(self.offsets, self.taps):
            seen = [_reach(*axis, offset) for axis, offset in zip(axes, offsets)]
            positions, of_blocks = ((slice(None), *slices) for slices in zip(*seen))
            if x[positions].numel():
                y[of_blocks] += tap(x[positions])
        return functional.silu(y, inplace=True).to(x.dtype)


class ChannelsFirst(nn.Module):
    """A sampler of another kind, as it stands."""

    def __init__(self, sampler: nn.Module) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(self, x: Tensor) -> Tensor:
        """Turn (B, T, H, W, C) into (B, T', H', W', C)."""
        y: Tensor = self.sampler(rearrange(x, "b t h w c -> b c t h w"))
        return rearrange(y, "b c t h w -> b t h w c")


def _reach(n: int, size: int, padding: int, offset: int) -> tuple[slice, slice]:
    """Find what a tap sees along one axis of `n` positions: those, and their blocks.

    Block i covers `size` positions from i * size - padding on; the tap is the one at `offset`.
    """
    first = -((offset - padding) // size)  # the first block whose tap is not before the start
    start = first * size + offset - padding
    num_blocks = (n + 2 * padding) // size
    count = max(0, min(num_blocks - first, len(range(start, n, size))))
    return slice(start, start + count * size, size), slice(first, first + count)


def _kernel_conv(conv: nn.Conv3d) -> nn.Module:
    is_cube = conv.kernel_size == (2, 2, 2)
    return KernelConv3d(conv) if is_cube else TapConv3d(conv, plain_linear)


def _fuse_stage(stage: nn.Module, make_linear: MakeLinear, operators: Operators) -> nn.Module:
    if isinstance(stage, nn.Identity):
        return stage
    return nn.Sequential(*(FusedBlock(block, make_linear, operators) for block in stage.children()))


def _norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """Return the norm alone, over the last axis; timm's turns the axes and may activate."""
    plain = nn.LayerNorm(norm.normalized_shape, norm.eps, device="meta")
    plain.weight, plain.bias = _frozen(norm.weight), _frozen(norm.bias)
    return plain


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
