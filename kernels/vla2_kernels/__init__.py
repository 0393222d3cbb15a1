"""Fused operators of the STC connector: one operator a file, beside its plain reference.

Each is a PyTorch operator `torch.ops.vla2.*` on channels-last tensors, with a plain implementation
for the CPU and a Triton kernel for CUDA; `*_reference` is its slow definition, and what an exporter
takes it apart into. Importing this package imports neither PyTorch nor Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla2_kernels.conv3d import conv3d_silu, conv3d_silu_reference, relay_conv3d_weight
    from vla2_kernels.depthwise import (
        depthwise_norm_silu_pool,
        depthwise_norm_silu_pool_reference,
        relay_depthwise_weight,
    )
    from vla2_kernels.norm import norm_scale_residual_silu, norm_scale_residual_silu_reference

__all__ = [
    "conv3d_silu",
    "conv3d_silu_reference",
    "depthwise_norm_silu_pool",
    "depthwise_norm_silu_pool_reference",
    "norm_scale_residual_silu",
    "norm_scale_residual_silu_reference",
    "relay_conv3d_weight",
    "relay_depthwise_weight",
]

_HOMES = {"conv3d": "conv3d", "depthwise": "depthwise", "norm": "norm_scale"}


def __getattr__(name: str) -> Any:
    """Import the file of an operator when one of its names is asked for."""
    if name in __all__:
        for module, part in _HOMES.items():
            if part in name:
                return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
