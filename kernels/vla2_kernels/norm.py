"""Channel LayerNorm, scale, residual and SiLU in one pass, one program a row of channels.

    y = SiLU(LayerNorm(x) * scale + residual)

Without scale and residual it is what follows the first 1x1 convolution of a RegStage block; with a
residual, what ends the block. A scale a frame and channel is where the gate of a
squeeze-and-excitation stands when the norm comes before it.
All arithmetic is in float32, and only y is rounded to x.dtype.

Source: LayerNorm, Ba et al. 2016, arXiv:1607.06450; its place, timm's `regnet.Bottleneck`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor
from torch.nn import functional

from vla2_kernels.custom import check_input, check_kernel_dtype, check_shape, register_operator
from vla2_kernels.jit import Kernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


def norm_scale_residual_silu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalise each position over its channels, scale it, add the residual, apply SiLU.

    Args:
        x: (F, H, W, C) float; a strided view is copied first.
        norm_weight: (C,).
        norm_bias: (C,).
        eps: added to the variance.
        scale: (F, C), the same at every position of a frame; none is 1.
        residual: (F, H, W, C); none is 0.

    Returns:
        (F, H, W, C) contiguous, x.dtype.

    Raises:
        ValueError: a shape does not fit, or CUDA is asked for a dtype that it has no kernel for.
    """
    return cast(Tensor, _operator(x, norm_weight, norm_bias, eps, scale, residual))


def norm_scale_residual_silu_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Define the operator, in the dtype of its inputs."""
    y = functional.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    if scale is not None:
        y = y * scale[:, None, None]
    if residual is not None:
        y = y + residual
    return functional.silu(y)


@Kernel
def _norm_kernel(
    x_ptr,  # (rows, channels)
    norm_weight_ptr,  # (channels,)
    norm_bias_ptr,  # (channels,)
    scale_ptr,  # (frames, channels), or None
    residual_ptr,  # (rows, channels), or None
    y_ptr,  # (rows, channels)
    num_positions,  # rows of a frame
    channels,
    eps,
    BLOCK: tl.constexpr,  # power of two >= channels
):
    row = tl.program_id(0).to(tl.int64)  # int64: row * channels passes 2**31 on long batches
    channel = tl.arange(0, BLOCK)
    is_channel = channel < channels
    x = tl.load(x_ptr + row * channels + channel, mask=is_channel, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / channels
    centred = tl.where(is_channel, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / channels + eps)
    gain = tl.load(norm_weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    y = centred * rstd * gain + shift
    if scale_ptr is not None:
        frame = row // num_positions
        scale = tl.load(scale_ptr + frame * channels + channel, mask=is_channel, other=0.0)
        y = y * scale.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * channels + channel, mask=is_channel, other=0.0)
        y = y + residual.to(tl.float32)
    y = y * tl.sigmoid(y)
    tl.store(y_ptr + row * channels + channel, y, mask=is_channel)


def launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Launch the Triton kernel. Arguments as in `norm_scale_residual_silu`."""
    _check(x, norm_weight, norm_bias, scale, residual)
    check_kernel_dtype(x)
    num_frames, height, width, channels = x.shape
    x = x.contiguous()
    y = x.new_empty(x.shape)
    block = next_power_of_2(channels)
    _norm_kernel[(num_frames * height * width,)](
        x,
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        None if scale is None else scale.contiguous(),
        None if residual is None else residual.contiguous(),
        y,
        height * width,
        channels,
        eps,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )
    return y


def _on_cpu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Run in PyTorch's operators; each step rounds to x.dtype."""
    _check(x, norm_weight, norm_bias, scale, residual)
    y = functional.layer_norm(x.contiguous(), norm_weight.shape, norm_weight, norm_bias, eps)
    if scale is not None:
        y.mul_(scale[:, None, None])
    if residual is not None:
        y.add_(residual)
    return functional.silu(y, inplace=True)


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


def _check(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, scale: Tensor | None, residual: Tensor | None
) -> None:
    check_input(x, "F H W C")
    num_frames, _, _, channels = x.shape
    check_shape("norm_weight", norm_weight, (channels,), x)
    check_shape("norm_bias", norm_bias, (channels,), x)
    if scale is not None:
        check_shape("scale", scale, (num_frames, channels), x)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), x)


_operator = register_operator("norm_scale_residual_silu", cpu=_on_cpu, cuda=launch, fake=_fake)
