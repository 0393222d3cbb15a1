"""An adapter on the language model while it is trained; peft does the products.

Source: upstream VideoLLaMA2@c0bb03a, train.py, `find_all_linear_names`: all linear layers of the
language model but its head. Experts of a Mixtral are no linear layers here, and stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vla2_models.adapter import ADAPTER, PARTS
from vla2_models.files import write_json
from vla2_models.hub import ADAPTER_CONFIG, ADAPTER_FILES
from vla2_models.imports import nothing_from_the_hub
from vla2_models.names import PEFT_PREFIX
from vla2cli.train.config import Lora

HEAD = "lm_head"


def find_targets(language_model: nn.Module) -> list[str]:
    """Name the kinds of linear layers of a language model but its head, such as q_proj."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in language_model.named_modules()
            if isinstance(module, nn.Linear)
        }
        - {HEAD}
    )


def add_adapter(language_model: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Put an adapter on a language model in place; it alone takes gradients, in float32."""
    with nothing_from_the_hub():
        from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes floats too
        lora_dropout=lora.dropout,
        target_modules=find_targets(language_model),
        bias="none",
        task_type="CAUSAL_LM",
    )
    language_model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fields that go unused
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language_model, ADAPTER)
    for name, parameter in language_model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def is_adapter(name: str) -> bool:
    """Tell whether a parameter of a language model is one of the adapter."""
    return any(f".{part}.{ADAPTER}." in name for part in PARTS)


def merge_state(state: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Add an adapter to the weights of a state, which then reads as if it had never had one."""
    merged = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            down, up = (state[f"{layer}{part}.{ADAPTER}.weight"].float() for part in PARTS)
            tensor = tensor.float() + (up @ down) * (lora.alpha / lora.r)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def write_adapter(
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    targets: list[str],
    lora: Lora,
    base: str,
    folder: Path,
) -> None:
    """Write an adapter in the public form.

    Args:
        state: the language model's, with the adapter's tensors by peft's names.
        dtype: what they are written as.
        targets: from `find_targets`, of the model before it had an adapter.
        lora: the adapter's numbers.
        base: what the language model was loaded from.
        folder: gets adapter_config.json and adapter_model.bin.
    """
    tensors = {
        PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.to(dtype).contiguous()
        for name, tensor in state.items()
        if is_adapter(name)
    }
    torch.save(tensors, folder / ADAPTER_FILES[1])
    write_json(folder / ADAPTER_CONFIG, _adapter_config(targets, lora, base))


def _adapter_config(targets: list[str], lora: Lora, base: str) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
