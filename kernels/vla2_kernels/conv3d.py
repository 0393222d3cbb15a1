"""3D convolution with kernel 2 and stride 2, then bias and SiLU, as an implicit GEMM.

    y[o] = SiLU(bias + sum over taps of x[2 o - padding + tap] @ weight[tap])

Blocks do not overlap, so each input position meets one tap and one output. With padding 1 an output
at an end of an axis has taps that fall on zeros: of 8 x 24 x 24 frames 32 % of all products would
be with zeros. None is computed here: outputs with the same real taps form groups, a tile of the
GEMM has outputs of one group, and goes over the taps of that group alone. (Rows that fill up the
tiles of small groups cost about as much with a single clip, and a third of it with eight.)

Source: VideoLLaMA 2, arXiv:2406.07476, section 2.1, the downsampler of the STC connector.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

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
from vla2_kernels.jit import Kernel

if TYPE_CHECKING:
    import triton.language as tl

NUM_TAPS = 8  # tap = 4 * time + 2 * row + column


def conv3d_silu(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Convolve blocks of 2 x 2 x 2 positions and apply SiLU.

    What does not fill a block at the end of an axis is left out, as `nn.Conv3d` does.

    Args:
        x: (B, T, H, W, C) float; a strided view is copied first.
        weight: (2, 2, 2, C, D), from `relay_conv3d_weight`.
        bias: (D,).
        padding: zeros around time, height and width, 0 or 1.

    Returns:
        (B, T', H', W', D) contiguous, x.dtype, with n' = (n + 2 padding) // 2; summed in float32.

    Raises:
        ValueError: a shape or dtype does not fit, no block is filled, or CUDA is asked for a
            dtype that it has no kernel for.
    """
    return cast(Tensor, _operator(x, weight, bias, padding))


def relay_conv3d_weight(weight: Tensor) -> Tensor:
    """Re-lay the (D, C, 2, 2, 2) weight of a checkpoint as (2, 2, 2, C, D), contiguous."""
    return weight.permute(2, 3, 4, 1, 0).contiguous()


def conv3d_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Define the operator, in the dtype of its inputs."""
    filters = weight.permute(4, 3, 0, 1, 2)  # (D, C, 2, 2, 2)
    y = functional.conv3d(x.permute(0, 4, 1, 2, 3), filters, bias, stride=2, padding=padding)
    return functional.silu(y).permute(0, 2, 3, 4, 1).contiguous()


@Kernel
def _conv3d_kernel(
    x_ptr,  # (positions of all clips, C)
    weight_ptr,  # (8, C, D)
    bias_ptr,  # (D,)
    y_ptr,  # (outputs of all clips, D)
    rows_ptr,  # (tiles, BLOCK_M, 2) int32, from `plan_tiles`
    taps_ptr,  # (tiles, 9) int32, from `plan_tiles`
    height,
    width,
    C,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    row_ptr = rows_ptr + (tile * BLOCK_M + tl.arange(0, BLOCK_M)) * 2
    target = tl.load(row_ptr).to(tl.int64)  # int64: the offsets pass 2**31 on long batches
    origin = tl.load(row_ptr + 1).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.load(taps_ptr + tile * 9)):
        tap = tl.load(taps_ptr + tile * 9 + 1 + i)
        source = origin + ((tap // 4) * height + tap // 2 % 2) * width + tap % 2
        a_ptr = x_ptr + source[:, None] * C + k[None, :]
        b_ptr = weight_ptr + (tap.to(tl.int64) * C + k[:, None]) * D + n[None, :]
        for start in range(0, C, BLOCK_K):
            is_k = k < C - start
            a = tl.load(a_ptr + start, mask=is_k[None, :], other=0.0)
            b = tl.load(b_ptr + start * D, mask=is_k[:, None] & (n < D)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    y = acc * tl.sigmoid(acc)
    is_stored = (target >= 0)[:, None] & (n < D)[None, :]
    tl.store(y_ptr + target[:, None] * D + n[None, :], y, mask=is_stored)


class Tiles(NamedTuple):
    """Which outputs each tile of the GEMM has, and the taps that all of them have."""

    rows: Tensor  # (tiles, BLOCK_M, 2) int32: output or -1; input under tap 0, maybe in the padding
    taps: Tensor  # (tiles, 9) int32: number of taps, the taps, then unused


def plan_tiles(shape: tuple[int, int, int, int], padding: int, block_m: int) -> Tiles:
    """Spread the outputs of clips of `shape` (B, T, H, W) over tiles with the same taps.

    A tile that its group does not fill repeats the first input of the tile, so that every address
    it reads is right, and marks the output with -1, so that none is written.
    Tiles with many taps come first: the short ones fill the end.
    """
    has_tap, origin = _find_taps(shape, padding)
    patterns, group = torch.unique(has_tap, dim=0, return_inverse=True)
    rows, taps = [], []
    for i in patterns.sum(1).argsort(descending=True, stable=True).tolist():
        (members,) = (group == i).nonzero(as_tuple=True)
        for tile in torch.split(torch.stack([members, origin[members]], dim=1), block_m):
            fill = torch.stack([torch.tensor(-1), tile[0, 1]]).expand(block_m - len(tile), 2)
            rows.append(torch.cat([tile, fill]))
            (present,) = patterns[i].nonzero(as_tuple=True)
            count = torch.tensor([len(present)])
            taps.append(functional.pad(torch.cat([count, present]), (0, NUM_TAPS - len(present))))
    return Tiles(torch.stack(rows).int(), torch.stack(taps).int())


def _find_taps(shape: tuple[int, int, int, int], padding: int) -> tuple[Tensor, Tensor]:
    """Return which taps of each output are real, (outputs, 8), and the input under tap 0."""
    num_clips, T, H, W = shape
    # starts: where each block of an axis begins, -1 in the padding
    starts = [torch.arange((n + 2 * padding) // 2) * 2 - padding for n in (T, H, W)]
    is_real = [((start >= 0) & (start < n), (start + 1 < n)) for start, n in zip(starts, (T, H, W))]
    t, h, w = (torch.stack(pair, dim=1) for pair in is_real)  # (blocks, 2) each
    has_tap = (
        t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    )  # (T', H', W', 2, 2, 2)
    clips = torch.arange(num_clips)[:, None, None, None] * T
    origin = ((clips + starts[0][:, None, None]) * H + starts[1][:, None]) * W + starts[2]
    return has_tap.reshape(-1, NUM_TAPS).repeat(num_clips, 1), origin.flatten()


@lru_cache(maxsize=64)
def _planned(
    shape: tuple[int, int, int, int], padding: int, is_half: bool, device: torch.device
) -> Tiles:
    """Plan the tiles of a shape once for each device, as high as pays."""
    if not is_half:
        tiles = plan_tiles(shape, padding, 64)
    else:
        high, low = (plan_tiles(shape, padding, block_m) for block_m in (128, 64))
        # a high tile does more with each weight it reads, unless small groups leave it empty
        tiles = high if count_products(high) <= 1.25 * count_products(low) else low
    return Tiles(tiles.rows.to(device), tiles.taps.to(device))


def count_products(tiles: Tiles) -> int:
    """Count the products of a row of x with a weight (C, D), those that fill tiles included."""
    return int(tiles.taps[:, 0].sum()) * tiles.rows.shape[1]


def launch(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Launch the Triton kernel. Arguments as in `conv3d_silu`."""
    _check(x, weight, bias, padding)
    check_kernel_dtype(x)
    y = x.new_empty(_output_shape(x, weight, padding))
    num_clips, T, H, W, C = x.shape
    D = weight.shape[4]
    is_half = x.element_size() == 2
    tiles = _planned((num_clips, T, H, W), padding, is_half, x.device)
    # float32 has no tensor cores that keep its precision, and twice the bytes
    block_n, block_k = (128, 64) if is_half else (64, 32)
    num_tiles, block_m, _ = tiles.rows.shape
    # tiles along the first axis: programs at work at the same time read the same weights
    _conv3d_kernel[(num_tiles, -(-D // block_n))](
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        y,
        tiles.rows,
        tiles.taps,
        H,
        W,
        C,
        D,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3,
    )
    return y


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Run one GEMM a tap, over the inputs that have it, and add it to their outputs.

    In half precision each tap's sum is rounded to x.dtype and the eight are added in float32: the
    roundings are as large as that of y and fall independently, about 1.4 times its error.
    """
    _check(x, weight, bias, padding)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = bias.to(wide).repeat(*_output_shape(x, weight, padding)[:4], 1)
    for tap in range(NUM_TAPS):
        digits = (tap // 4, tap // 2 % 2, tap % 2)
        used = [_slices(n, digit, padding) for n, digit in zip(x.shape[1:4], digits)]
        inputs, outputs = zip(*used)
        block = y[:, *outputs]
        # rows made contiguous: on a strided view the product would be one GEMM a line of positions
        rows = x[:, *inputs].reshape(-1, x.shape[4])
        block += (rows @ weight[digits]).view(block.shape)
    return functional.silu(y, inplace=True).to(x.dtype)


def _slices(n: int, digit: int, padding: int) -> tuple[slice, slice]:
    """Return the inputs of an axis of length n that tap `digit` reads, and their outputs."""
    num_outputs = (n + 2 * padding) // 2
    first = 1 if digit < padding else 0  # output 0 has its tap 0 in the padding
    start = 2 * first - padding + digit
    count = min(num_outputs - first, max(0, (n - start + 1) // 2))
    return slice(start, start + 2 * count, 2), slice(first, first + count)


def _output_shape(x: Tensor, weight: Tensor, padding: int) -> tuple[int, ...]:
    return (x.shape[0], *((n + 2 * padding) // 2 for n in x.shape[1:4]), weight.shape[4])


def _fake(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return x.new_empty(_output_shape(x, weight, padding))


def _check(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> None:
    check_input(x, "B T H W C")
    if padding not in (0, 1):
        raise ValueError(f"padding is {padding}, expected 0 or 1")
    if min(x.shape[1:4]) + 2 * padding < 2:
        raise ValueError(f"x of shape {tuple(x.shape)} has no block of 2 x 2 x 2 to convolve")
    check_shape("weight", weight, (2, 2, 2, x.shape[4], weight.shape[-1]), x)
    check_dtype("weight", weight, x)
    check_shape("bias", bias, (weight.shape[4],), x)


_operator = register_operator("conv3d_silu", cpu=_on_cpu, cuda=launch, fake=_fake)
