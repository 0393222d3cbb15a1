"""Networks whose weights are laid out once for the processor's matrix products.

PyTorch gives a float32 product on the CPU to MKL, which on other processors than Intel's keeps to
half of their width, and lays a bfloat16 weight out anew for every call. oneDNN, which PyTorch
brings as well, takes weights that it has laid out before. Its operators here are those that
PyTorch's own compiler puts in (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from .beats import GatedAttention
from .stc import STCConnector
from .stc_fused import FusedSTC, TapConv3d
from .videollama2 import VideoLLaMA2

# the C library gives blocks above 32 MiB back to the system at once, and to touch fresh pages takes
# longer than what is done to them
GROUP_BYTES = 20 * 2**20
# of which a product for each head would cost more to start than to compute
FEW_POSITIONS = 128


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether this processor has packed products of a dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_front(model: VideoLLaMA2) -> VideoLLaMA2:
    """Copy a model with its towers and connectors packed; the language model is the same one."""
    clone = copy.copy(model)
    clone._modules = {
        name: part if part is model.language_model else part and pack(part)
        for name, part in model._modules.items()
    }
    return clone


def pack(module: nn.Module) -> Any:
    """Copy a network for inference with its linear layers and attention packed.

    Everything else in the copy shares its weights with the original.
    """
    replace = _REPLACEMENTS.get(type(module))
    if replace is not None:
        return replace(module)
    return _pack_children(module)


def pack_in_place(module: nn.Module) -> None:
    """Pack the linear layers of a network one after the other; none is held twice."""
    # by their names: `named_children` holds all that it has given until it is over
    for name in [name for name, _ in module.named_children()]:
        child = getattr(module, name)
        if type(child) is nn.Linear:
            setattr(module, name, _pack_linear(child))
        else:
            pack_in_place(child)


def linear_bytes(module: nn.Module) -> int:
    """Count the bytes of what `pack_in_place` lays out."""
    layers = (layer for layer in module.modules() if type(layer) is nn.Linear)
    return sum(layer.weight.nbytes for layer in layers)


class PackedLinear(nn.Module):
    """A linear layer whose weight has oneDNN's own layout.

    Args:
        weight: (out_features, in_features), on a device and of a dtype that `can_pack`.
        bias: (out_features,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Turn (..., in_features) into (..., out_features)."""
        return _product(x, self.weight, self.bias)


class PackedAttention(nn.Module):
    """The self-attention of CLIP and SigLIP, with one packed product for queries, keys, values."""

    def __init__(self, attention: CLIPAttention | SiglipAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = PackedLinear(
            torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        )
        self.out_proj = pack(attention.out_proj)

    def forward(self, hidden_states: Tensor, attention_mask: None = None) -> tuple[Tensor, None]:
        """Attend over all of (F, N, C); the second value stands for weights, as transformers'."""
        q, k, v = rearrange(
            self.qkv(hidden_states), "f n (three h d) -> three f h n d", three=3, h=self.num_heads
        )
        return self.out_proj(attend(q, k, v)), None


class InPlaceQuickGELU(nn.Module):
    """CLIP's activation, x * sigmoid(1.702 x), where x lies: fresh memory would cost more."""

    def forward(self, x: Tensor) -> Tensor:
        """Overwrite x with its activation."""
        return functional.silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """Attend with scores in float32, over many positions head by head.

    PyTorch's own function computes these products by MKL, and those of bfloat16 no faster.

    Args:
        q: (B, H, N, d).
        k: (B, H, N, d).
        v: (B, H, N, d).
        bias: (H, N, N), added to the scores.
        gate: (B, H, N, 1), by which each query scales its bias.

    Returns:
        (B, N, H * d), of the dtype of `v`.
    """
    scale = q.shape[-1] ** -0.5
    if q.shape[2] <= FEW_POSITIONS:
        scores = (q.float() * scale) @ k.float().transpose(-1, -2)
        if bias is not None and gate is not None:
            scores += bias * gate
        attended: Tensor = scores.softmax(-1).to(v.dtype) @ v
        return attended.transpose(1, 2).flatten(2)
    q, k = (
        tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for tensor in (q, k)
    )
    q.mul_(scale)
    values = v.transpose(-1, -2).contiguous()  # (B, H, d, N), as a weight
    out = v.new_empty(v.shape[0], v.shape[2], v.shape[1], v.shape[3])
    for row in range(v.shape[0]):
        for head in range(v.shape[1]):
            scores = _product(q[row, head], k[row, head])
            if bias is not None and gate is not None:
                scores.addcmul_(bias[head], gate[row, head])
            out[row, :, head] = _product(scores.softmax(-1).to(v.dtype), values[row, head])
    return out.flatten(2)


class Grouped(nn.Module):
    """Run a stage of the connector on a few frames at a time, so that no activation is large.

    Args:
        stage: makes of each frame one frame, by itself.
        width: the most channels in it.
    """

    def __init__(self, stage: nn.Module, width: int) -> None:
        super().__init__()
        self.stage = stage
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Turn (F, H, W, C) into (F, H, W, D)."""
        frame_bytes = x[0, ..., 0].numel() * self.width * x.itemsize
        return torch.cat([self.stage(frames) for frames in in_groups(x, frame_bytes)])


def in_groups(frames: Tensor, frame_bytes: int) -> tuple[Tensor, ...]:
    """Split (F, ...) into what is best run together, by the largest activation of one frame."""
    return torch.split(frames, max(1, GROUP_BYTES // frame_bytes))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # what is not contiguous would be multiplied a thousand times slower
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return y


def _pack_children(module: nn.Module) -> Any:
    clone = copy.copy(module)
    clone._modules = {name: child and pack(child) for name, child in module._modules.items()}
    return clone


def _pack_linear(linear: nn.Linear) -> PackedLinear:
    return PackedLinear(linear.weight, linear.bias)


def _pack_gated_attention(attention: GatedAttention) -> GatedAttention:
    packed: GatedAttention = _pack_children(attention)
    packed.attend = attend  # type: ignore[method-assign]  # no bias of all heads is written
    return packed


def _pack_connector(connector: STCConnector) -> FusedSTC:
    fused = FusedSTC(connector, PackedLinear, partial(TapConv3d, make_linear=PackedLinear))
    if connector.design.has_stages:
        fused.s1, fused.s2 = (Grouped(stage, connector.width) for stage in (fused.s1, fused.s2))
    return fused


_REPLACEMENTS: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: _pack_linear,
    CLIPAttention: PackedAttention,
    SiglipAttention: PackedAttention,
    QuickGELUActivation: lambda activation: InPlaceQuickGELU(),
    GatedAttention: _pack_gated_attention,
    STCConnector: _pack_connector,
}
