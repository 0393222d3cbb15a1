"""Depthwise 3x3 convolution, channel LayerNorm, SiLU, and the mean over positions in one pass.

    y = SiLU(LayerNorm over C(depthwise 3x3(x))),   mean = mean of y over H and W

It is the middle of a RegStage block: the convolution reads each input once from memory instead of
writing its result for the norm to read, and the squeeze-and-excitation finds its mean ready.
One program has a run of positions of a frame with all their channels, and adds its y up in float32;
the sums of the programs are added in a fixed order, so that two runs give the same bits.
All arithmetic is in float32, and only y is rounded to x.dtype.

Source: RegNet, Radosavovic et al. 2020, arXiv:2003.13678; timm's `regnet.Bottleneck`, conv2 and se.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from vla2_kernels.custom import (
    check_dtype,
    check_input,
    check_kernel_dtype,
    check_shape,
    register_operator,
)
from vla2_kernels.jit import Kernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

TILE_SIZE = 4096  # elements that a program holds at a time, or one row: 16 for each thread
NUM_STEPS = 4  # times a program does so; each halving doubles the partial sums


def depthwise_norm_silu_pool(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own 3x3 filter, normalise over channels, apply SiLU, pool.

    The convolution has stride 1, zero padding 1 and no bias.

    Args:
        x: (F, H, W, C) float; a strided view is copied first.
        weight: (3, 3, C), from `relay_depthwise_weight`.
        norm_weight: (C,).
        norm_bias: (C,).
        eps: added to the variance.

    Returns:
        y: (F, H, W, C) contiguous, x.dtype.
        mean: (F, C) float32 (float64 for a float64 x), of y over H and W.

    Raises:
        ValueError: a shape or dtype does not fit, or CUDA is asked for a dtype that it has no
            kernel for.
    """
    return cast(tuple[Tensor, Tensor], _operator(x, weight, norm_weight, norm_bias, eps))


def relay_depthwise_weight(weight: Tensor) -> Tensor:
    """Re-lay the (C, 1, 3, 3) weight of a checkpoint as (3, 3, C), contiguous."""
    return weight.squeeze(1).permute(1, 2, 0).contiguous()


def depthwise_norm_silu_pool_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Define the operator, in the dtype of its inputs."""
    filters = weight.permute(2, 0, 1).unsqueeze(1)  # (C, 1, 3, 3)
    z = functional.conv2d(x.permute(0, 3, 1, 2), filters, padding=1, groups=weight.shape[2])
    z = z.permute(0, 2, 3, 1)  # (F, H, W, C)
    y = functional.silu(functional.layer_norm(z, norm_weight.shape, norm_weight, norm_bias, eps))
    return y.contiguous(), y.to(_mean_dtype(x)).mean((1, 2))


@Kernel
def _depthwise_kernel(
    x_ptr,  # (frames, height, width, channels)
    weight_ptr,  # (9, channels)
    norm_weight_ptr,  # (channels,)
    norm_bias_ptr,  # (channels,)
    y_ptr,  # (frames, height, width, channels)
    partial_ptr,  # (frames, tiles, channels) float32: sums of y over the positions of a tile
    height,
    width,
    channels,
    eps,
    STEPS: tl.constexpr,  # a tile is STEPS times BLOCK_P positions
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,  # power of two >= channels
):
    frame = tl.program_id(0).to(tl.int64)  # int64: the offsets pass 2**31 on long batches
    tile = tl.program_id(1)
    channel = tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    total = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(STEPS):
        position = (tile * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        is_position = position < height * width
        z = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for tap in tl.static_range(9):
            row = position // width + tap // 3 - 1
            column = position % width + tap % 3 - 1
            is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            source = (frame * height + row) * width + column
            x = tl.load(
                x_ptr + source[:, None] * channels + channel[None, :],
                mask=is_inside[:, None] & is_channel[None, :],
                other=0.0,
            )
            weight = tl.load(weight_ptr + tap * channels + channel, mask=is_channel, other=0.0)
            z += x.to(tl.float32) * weight.to(tl.float32)[None, :]
        mean = tl.sum(z, axis=1) / channels
        centred = tl.where(is_channel[None, :], z - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / channels + eps)
        gain = tl.load(norm_weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        y = centred * rstd[:, None] * gain[None, :] + shift[None, :]
        y = y * tl.sigmoid(y)
        target = frame * height * width + position
        tl.store(
            y_ptr + target[:, None] * channels + channel[None, :],
            y,
            mask=is_position[:, None] & is_channel[None, :],
        )
        # past the last position y is SiLU(shift), which is not zero
        total += tl.sum(tl.where(is_position[:, None], y, 0.0), axis=0)
    partial = frame * tl.num_programs(1) + tile
    tl.store(partial_ptr + partial * channels + channel, total, mask=is_channel)


def launch(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the Triton kernel. Arguments as in `depthwise_norm_silu_pool`."""
    _check(x, weight, norm_weight, norm_bias)
    check_kernel_dtype(x)
    num_frames, height, width, channels = x.shape
    x = x.contiguous()
    y = x.new_empty(x.shape)
    block_c = next_power_of_2(channels)
    block_p = min(4, max(1, TILE_SIZE // block_c))
    num_tiles = -(-height * width // (block_p * NUM_STEPS))
    partial = x.new_empty((num_frames, num_tiles, channels), dtype=torch.float32)
    _depthwise_kernel[(num_frames, num_tiles)](
        x,
        weight.contiguous(),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        y,
        partial,
        height,
        width,
        channels,
        eps,
        STEPS=NUM_STEPS,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=min(16, max(4, block_p * block_c // 512)),
    )
    return y, partial.sum(1) / (height * width)


def _on_cpu(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Run in PyTorch's operators; each step rounds to x.dtype."""
    _check(x, weight, norm_weight, norm_bias)
    # contiguous: the CPU's depthwise convolution took three times as long on a strided filter
    filters = weight.permute(2, 0, 1).unsqueeze(1).contiguous()
    # a contiguous (F, H, W, C) permuted is channels-last, which the convolution keeps
    z = functional.conv2d(x.contiguous().permute(0, 3, 1, 2), filters, padding=1, groups=x.shape[3])
    z = z.permute(0, 2, 3, 1).contiguous()
    y = functional.silu(
        functional.layer_norm(z, norm_weight.shape, norm_weight, norm_bias, eps), inplace=True
    )
    return y, y.mean((1, 2), dtype=_mean_dtype(x))


def _fake(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], x.shape[3]), dtype=_mean_dtype(x))
    return x.new_empty(x.shape), mean


def _mean_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> None:
    check_input(x, "F H W C")
    channels = x.shape[3]
    check_shape("weight", weight, (3, 3, channels), x)
    check_dtype("weight", weight, x)
    check_shape("norm_weight", norm_weight, (channels,), x)
    check_shape("norm_bias", norm_bias, (channels,), x)


_operator = register_operator("depthwise_norm_silu_pool", cpu=_on_cpu, cuda=launch, fake=_fake)
