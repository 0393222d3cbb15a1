"""Registration of a fused operator with PyTorch, and checks that all of them share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # those the Triton kernels take


def register_operator(
    name: str, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `torch.ops.vla2.<name>`; the signature of `cpu` becomes its schema.

    Args:
        name: of the operator.
        cpu: its implementation in PyTorch's own operators.
        cuda: the launcher of its Triton kernel; Triton launches on the current device, which is
            made that of the first argument.
        fake: makes empty outputs of the right shapes and dtypes, for tracing.
    """
    operator = torch.library.custom_op(f"vla2::{name}", cpu, mutates_args=(), device_types="cpu")

    def on_device(x: Tensor, *others: Any) -> Any:
        with torch.cuda.device(x.device):
            return cuda(x, *others)

    operator.register_kernel("cuda", on_device)
    operator.register_fake(fake)
    return operator


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], x: Tensor) -> None:
    """Refuse a tensor that does not fit x.

    Raises:
        ValueError: `tensor` has another shape than `expected`.
    """
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {expected} to match x of shape "
            f"{tuple(x.shape)}"
        )


def check_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuse a tensor that cannot be multiplied with x.

    Raises:
        ValueError: `tensor` has another dtype.
    """
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {x.dtype} as x is")


def check_input(x: Tensor, axes: str) -> None:
    """Refuse an x without the named axes, or without an element.

    Raises:
        ValueError: as said.
    """
    if x.dim() != len(axes.split()) or not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}, expected ({', '.join(axes.split())})")


def check_kernel_dtype(x: Tensor) -> None:
    """Refuse a dtype that the Triton kernels do not take.

    Raises:
        ValueError: as said.
    """
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"x is {x.dtype}, the Triton kernels take {names}")
