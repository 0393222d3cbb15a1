"""Weights of the decoder layers in 4 or 8 bits, by bitsandbytes.

    4bit  nf4 in blocks of 64 with double quantisation: 4.127 bits a weight
    8bit  LLM.int8: int8 with one scale a row; inputs above 6 are multiplied in full

Embeddings, norms, the head and a router stay as they are.

Source: Dettmers et al. 2023, arXiv:2305.14314 (nf4) and 2022, arXiv:2208.07339 (LLM.int8);
the choices are those of upstream VideoLLaMA2@c0bb03a, model/__init__.py.
"""

from __future__ import annotations

import importlib.util
import logging
from types import ModuleType
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from .errors import CheckpointError
from .imports import nothing_from_the_hub

QUANTIZATIONS = ("4bit", "8bit")

# LLM.int8: columns of the input with a value above it are no int8; transformers' default
OUTLIER_THRESHOLD = 6.0
# the least compute capability that bitsandbytes has int8 products for
INT8_CAPABILITY = (7, 5)
BLOCK = 64  # weights with one scale in nf4


def check_quantization(
    name: str, language_model_config: PreTrainedConfig, device: torch.device
) -> None:
    """Check that a model can be quantized for a device, before a weight is read.

    Raises:
        ValueError: there is no such quantization, here or on this device.
        CheckpointError: this kind of model cannot have it.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"unknown quantization '{name}', expected {' or '.join(QUANTIZATIONS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{name} weights need bitsandbytes: pip install bitsandbytes")
    if name == "8bit" and getattr(language_model_config, "num_local_experts", None):
        raise CheckpointError(
            f"8bit weights cannot be had for the experts of a {language_model_config.model_type} "
            "model; take 4bit"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} weights cannot be had on '{device}', expected cpu or cuda")
    if device.type == "cuda":
        _check_cuda(name, device)


def quantize_layer(
    layer: nn.Module, name: str, *, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Replace the linear layers of a decoder layer, one at a time, by quantized ones.

    Args:
        layer: weights on the CPU; what is not quantized stays there.
        name: one of `QUANTIZATIONS`, for which `check_quantization` had nothing to say.
        compute_dtype: what 4-bit weights are multiplied in. On a CPU with AVX512-BF16, bfloat16 is
            many times as fast as others. Fused experts take the dtype of their weights.
        device: where the quantized weights go, and stay: scales of experts follow no `.to`.

    On the CPU bitsandbytes takes up to seven times a bfloat16 weight while it packs it.
    """
    bitsandbytes = _import_bitsandbytes()

    def make(linear: nn.Linear) -> nn.Linear:
        if name == "4bit":
            return _make_4bit(bitsandbytes, linear, compute_dtype, device)
        return _make_8bit(bitsandbytes, linear, device)

    # names, not modules: whoever holds a module keeps its weight in full size
    for path in [path for path, part in layer.named_modules() if type(part) is nn.Linear]:
        layer.set_submodule(path, make(cast("nn.Linear", layer.get_submodule(path))))
    for path in [path for path, weight in layer.named_parameters() if weight.ndim == 3]:
        _quantize_experts(layer, path, device)


def _make_4bit(
    bitsandbytes: ModuleType, linear: nn.Linear, compute_dtype: torch.dtype, device: torch.device
) -> nn.Linear:
    choices = {"compress_statistics": True, "quant_type": "nf4"}
    shape = linear.in_features, linear.out_features
    quantized = bitsandbytes.nn.Linear4bit(
        *shape, bias=False, compute_dtype=compute_dtype, device="meta", **choices
    )
    weight = bitsandbytes.nn.Params4bit(linear.weight.data, module=quantized, **choices)
    quantized.weight = weight.to(device)
    # bitsandbytes' AVX512 path computes in bfloat16 whatever was asked for, and asserts its blocks
    fits = linear.in_features % BLOCK == 0 and linear.out_features % 32 == 0
    quantized.support_avx512bf16_for_cpu &= compute_dtype == torch.bfloat16 and fits
    return _finish(quantized, linear, device)


def _make_8bit(bitsandbytes: ModuleType, linear: nn.Linear, device: torch.device) -> nn.Linear:
    shape = linear.in_features, linear.out_features
    quantized = bitsandbytes.nn.Linear8bitLt(
        *shape, bias=False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    # bitsandbytes quantizes on the way from the CPU only
    weight = bitsandbytes.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False)
    quantized.weight = weight.to(device)
    return _finish(quantized, linear, device)


def _finish(quantized: nn.Linear, linear: nn.Linear, device: torch.device) -> nn.Linear:
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    # in training, bitsandbytes multiplies in other ways
    return quantized.train(linear.training)


def _quantize_experts(layer: nn.Module, path: str, device: torch.device) -> None:
    """Quantize one fused weight of all experts; it is unpacked whole in each forward pass."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    parent, _, name = path.rpartition(".")
    experts = layer.get_submodule(parent)
    experts.get_parameter(name).data = experts.get_parameter(name).data.to(device)
    replace_parameter_4bit(experts, name, compress_statistics=True, quant_type="nf4")
    experts.train(experts.training)


def _check_cuda(name: str, device: torch.device) -> None:
    if not _import_bitsandbytes().cextension.lib.compiled_with_cuda:
        raise ValueError(
            f"{name} weights on '{device}': this bitsandbytes has no library for CUDA "
            f"{torch.version.cuda}; `python -m bitsandbytes` says more"
        )
    capability = torch.cuda.get_device_capability(device)
    if name == "8bit" and capability < INT8_CAPABILITY:
        found, wanted = (".".join(map(str, pair)) for pair in (capability, INT8_CAPABILITY))
        raise ValueError(
            f"8bit weights on '{device}': its compute capability is {found}, expected {wanted} or "
            "more; take 4bit"
        )


def _import_bitsandbytes() -> ModuleType:
    with nothing_from_the_hub():
        import bitsandbytes

    # says at every product that it takes float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes
