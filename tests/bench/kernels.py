"""Time each Triton kernel on a CUDA device, at the sizes of the public checkpoints.

    python tests/bench/kernels.py [DTYPE]            # bfloat16

A line for each launch: its time, the same in PyTorch's operators (for the convolution also as one
GEMM for each tap), the bytes that have to be moved (inputs and outputs once) and the operations
that the result needs (no product with a padding zero), each as a rate. Times are medians of
`triton.testing.do_bench`, with the cache cleared before each run. At the end the two limits: a
product of two 8192 x 8192 matrices, and a copy.
"""
# ruff: noqa: T201  it prints a table for people

import sys
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional
from triton.testing import do_bench

from vla2_kernels import conv3d, depthwise, norm

# frames, rows, columns, channels
STAGES = {
    "7B s1": (8, 24, 24, 4096),
    "7B s2": (5, 13, 13, 4096),
    "2.1-7B s1": (16, 27, 27, 3584),
    "72B s1": (8, 24, 24, 8192),
}
# clips, frames, rows, columns, channels; padding
CONVOLUTIONS = {
    "7B, 8 frames": ((1, 8, 24, 24, 4096), 1),
    "7B, 16 frames": ((1, 16, 24, 24, 4096), 1),
    "7B, 8 clips": ((8, 8, 24, 24, 4096), 1),
    "2.1-7B, 16 frames": ((1, 16, 27, 27, 3584), 0),
}
EDGE = 8192
COPY_BYTES = 2**30


def main(dtype: torch.dtype) -> None:
    """Print one line after the other."""
    print(f"{torch.cuda.get_device_name()}, {dtype}, torch {torch.__version__}")
    print(f"{'':38} {'kernel':>9} {'PyTorch':>9} {'taps':>9}  µs     GB/s  TFLOP/s")
    for name, shape in STAGES.items():
        time_stage(name, shape, dtype)
    for name, (shape, padding) in CONVOLUTIONS.items():
        time_convolution(name, shape, padding, dtype)
    print_limits(dtype)


def time_stage(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Time the two operators of a RegStage on frames of `shape`."""
    x, residual, filters = randn(shape, dtype), randn(shape, dtype), randn((3, 3, shape[3]), dtype)
    gain, shift = randn(shape[3:], dtype), randn(shape[3:], dtype)
    scale = randn((shape[0], shape[3]), dtype)
    args = (x, filters, gain, shift, 1e-6)
    report(
        f"depthwise {name}",
        lambda: depthwise.launch(*args),
        lambda: depthwise.depthwise_norm_silu_pool_reference(*args),
        num_bytes=2 * x.nbytes,
    )
    for label, extra, passes in (
        ("", (None, None), 2),
        (", scale, residual", (scale, residual), 3),
    ):
        report(
            f"norm{label} {name}",
            lambda extra=extra: norm.launch(x, gain, shift, 1e-6, *extra),
            lambda extra=extra: norm.norm_scale_residual_silu_reference(
                x, gain, shift, 1e-6, *extra
            ),
            num_bytes=passes * x.nbytes,
        )


def time_convolution(name: str, shape: tuple[int, ...], padding: int, dtype: torch.dtype) -> None:
    """Time the 3D convolution on clips of `shape`."""
    channels = shape[4]
    x, bias = randn(shape, dtype), randn((channels,), dtype)
    weight = randn((2, 2, 2, channels, channels), dtype) / channels**0.5
    # as a checkpoint holds it, and what the plain connector gives it
    plain = weight.permute(4, 3, 0, 1, 2).contiguous()
    clip = x.permute(0, 4, 1, 2, 3).contiguous()
    tiles = conv3d.plan_tiles(shape[:4], padding, 64)
    num_real = ((tiles.rows[..., 0] >= 0).sum(1) * tiles.taps[:, 0]).sum().item()
    y = conv3d.launch(x, weight, bias, padding)
    report(
        f"conv3d {name}",
        lambda: conv3d.launch(x, weight, bias, padding),
        lambda: functional.silu(functional.conv3d(clip, plain, bias, stride=2, padding=padding)),
        lambda: conv3d._on_cpu(x, weight, bias, padding),
        num_bytes=x.nbytes + weight.nbytes + y.nbytes,
        flops=2 * num_real * channels**2,
    )


def report(
    name: str,
    kernel: Callable[[], object],
    pytorch: Callable[[], object],
    taps: Callable[[], object] | None = None,
    *,
    num_bytes: int,
    flops: int = 0,
) -> None:
    """Measure and print one line."""
    times = [median_us(run) if run else None for run in (kernel, pytorch, taps)]
    cells = [f"{time:9.1f}" if time else f"{'-':>9}" for time in times]
    rates = f"{num_bytes / times[0] / 1e3:9.0f} {flops / times[0] / 1e6 or 0:8.1f}"
    print(f"{name:38}", *cells, rates, flush=True)


def print_limits(dtype: torch.dtype) -> None:
    """Print what a large product and a copy reach."""
    a, b = randn((EDGE, EDGE), dtype), randn((EDGE, EDGE), dtype)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product = 2 * EDGE**3 / median_us(lambda: a @ b) / 1e6
    copy = 2 * COPY_BYTES / median_us(lambda: target.copy_(source)) / 1e3
    print(f"product {product:.1f} TFLOP/s, copy {copy:.0f} GB/s")


def median_us(run: Callable[[], object]) -> float:
    """Return the median time of a function in microseconds."""
    with torch.inference_mode():
        return 1e3 * do_bench(run, return_mode="median")


def randn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw on the device."""
    return torch.randn(prod(shape), dtype=dtype, device="cuda").view(shape)


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "bfloat16"))
