"""A LoRA adapter in the public form, merged into the language model that it was trained on.

    W = W + scaling * B A,  scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

peft decides which layers an adapter belongs to and does the product; what stands here keeps it
strict: nothing is guessed, fetched or left out, and what is no plain LoRA is refused. peft takes
seconds to import, so it is imported by the functions, for those who have an adapter.

Source: Hu et al. 2021, arXiv:2106.09685; files as upstream VideoLLaMA2@c0bb03a, train.py, has them
written by peft 0.4.0.
"""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from .errors import CheckpointError, one_line
from .files import is_count, read_json
from .hub import ADAPTER_CONFIG
from .imports import nothing_from_the_hub
from .names import PEFT_PREFIX

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraModel
    from transformers import PreTrainedModel

PARTS = ("lora_A", "lora_B")
ADAPTER = "default"  # peft's name for the only adapter

# starts that leave the base weights as they are; others (pissa, olora, loftq, …) train on the rest
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")

# fields that, when set, mean other tensors or another formula than W + scaling * B A
OTHER_METHODS = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read what the folder's adapter_config.json says about the merge.

    Fields without influence on it (lora_dropout, auto_mapping, whatever other releases of peft
    write) are left alone, so that none of them can import or fetch anything.

    Raises:
        CheckpointError: it is absent, unreadable, of a wrong kind, or describes no plain LoRA.
    """
    with nothing_from_the_hub():
        from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    raw = read_json(path)
    _refuse_other_methods(path, raw)
    fields = {name: value for name, value in raw.items() if name in KINDS and value is not None}
    for name, (is_kind, wanted) in KINDS.items():
        if name in (fields.keys() | REQUIRED) and not is_kind(raw.get(name)):
            found = json.dumps(raw.get(name))
            raise CheckpointError(f"'{path}': {name} is {found}, expected {wanted}")
    try:
        return LoraConfig(**fields, inference_mode=True, init_lora_weights=False)
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not understood: {one_line(error)}") from error


def adapter_shapes(
    language_model: PreTrainedModel, config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """Name the tensors that the adapter's file must hold for this language model.

    Args:
        language_model: is only looked at; its weights may be on the meta device.
        config: from `read_adapter_config`.

    Returns:
        Names as in adapter_model.bin or .safetensors -> shapes: (r, in) for A, (out, r) for B.

    Raises:
        CheckpointError: the config fits no layer of the model, or one that cannot be merged.
    """
    with init_empty_weights():
        skeleton = type(language_model)(copy.deepcopy(language_model.config))
    _inject(skeleton, config)
    return {
        _key(name, part): tuple(getattr(layer, part)[ADAPTER].weight.shape)
        for name, layer in _adapted_layers(skeleton, config).items()
        for part in PARTS
    }


def merge_adapter(
    language_model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Add the adapter to the weights in place; the model is a plain one before and after.

    The product is made in float32 and each sum rounded once to the weight's dtype. Memory-mapped
    weights are copied as they are written to: their file stays as it is.

    Args:
        language_model: with its weights loaded; is frozen and in eval mode afterwards.
        config: from `read_adapter_config`.
        tensors: all that `adapter_shapes` names, of any floating dtype.

    Raises:
        CheckpointError: as `adapter_shapes`; the model is untouched then.
    """
    wanted = adapter_shapes(language_model, config)
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert found == wanted, f"differ: {sorted(found.items() ^ wanted.items())}"
    tuner = _inject(language_model, config)
    for name, layer in _adapted_layers(language_model, config).items():
        device = layer.get_base_weight().device
        for part in PARTS:
            weight = tensors[_key(name, part)].detach().to(device, torch.float32)
            getattr(layer, part)[ADAPTER].load_state_dict({"weight": weight}, assign=True)
        # not `merge_and_unload`, which changes the model's config where embeddings are tied
        with torch.no_grad():
            layer.merge()
    tuner.unload()
    language_model.requires_grad_(False)
    language_model.train(False)


def _refuse_other_methods(path: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        found = json.dumps(raw.get("peft_type"))
        raise CheckpointError(f"'{path}': peft_type is {found}, expected \"LORA\"")
    # trained biases are whole tensors of the base model, not products: no public adapter has them
    if raw.get("bias", "none") not in ("none", None):
        found = json.dumps(raw["bias"])
        raise CheckpointError(f"'{path}': bias {found} is not supported, expected \"none\"")
    if raw.get("init_lora_weights") not in PLAIN_STARTS:
        found = json.dumps(raw["init_lora_weights"])
        raise CheckpointError(
            f"'{path}': init_lora_weights {found} trains beside changed base weights, which is not "
            "supported; save the adapter as a plain LoRA"
        )
    for name in OTHER_METHODS:
        if raw.get(name):
            raise CheckpointError(
                f"'{path}': {name} {json.dumps(raw[name])} is not supported, "
                "only plain LoRA on linear layers"
            )


def _inject(model: PreTrainedModel, config: LoraConfig) -> LoraModel:
    with nothing_from_the_hub():
        from peft import NoMatchingPeftModuleError
        from peft.tuners.lora import LoraModel

    try:
        with warnings.catch_warnings():
            # about fields that go unused; what matters shows up in names and shapes
            warnings.simplefilter("ignore")
            # a copy, since peft writes into it; parameters on meta, since their values come later
            return LoraModel(model, copy.deepcopy(config), ADAPTER, low_cpu_mem_usage=True)
    except NoMatchingPeftModuleError as error:
        raise _misfit(model, config) from error
    except (ValueError, TypeError, re.error) as error:
        raise CheckpointError(
            f"the adapter cannot be put on a {type(model).__name__}: {one_line(error)}"
        ) from error


def _adapted_layers(model: PreTrainedModel, config: LoraConfig) -> dict[str, LoraLinear]:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        # peft turns targets such as Mixtral's "w1" into wrappers around all experts at once
        if not (isinstance(layer, LoraLinear) and isinstance(base, nn.Linear)):
            raise CheckpointError(
                f"the adapter changes '{name}' of a {type(model).__name__}, a "
                f"{type(base).__name__}, and only linear layers can be merged"
            )
        if model.config.tie_word_embeddings and layer is model.get_submodule("lm_head"):
            raise CheckpointError(
                f"the adapter changes '{name}' of a {type(model).__name__}, which is tied to the "
                "embeddings: both would change"
            )
        layers[name] = layer
    if not layers:
        raise _misfit(model, config)
    return layers


def _misfit(model: PreTrainedModel, config: LoraConfig) -> CheckpointError:
    targets = config.target_modules
    # peft holds names as a set, whose order changes from run to run
    shown = targets if isinstance(targets, str) else sorted(targets or ())
    return CheckpointError(
        f"the adapter's target_modules {json.dumps(shown)} fit no layer of a {type(model).__name__}"
    )


def _key(module_name: str, part: str) -> str:
    return f"{PEFT_PREFIX}{module_name}.{part}.weight"


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not _is_bool(value) and math.isfinite(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(values: Any, is_kind: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(is_kind, values))


def _is_table(values: Any, is_kind: Callable[[Any], bool]) -> bool:
    return isinstance(values, dict) and all(map(is_kind, values.values()))


def _is_names(value: Any) -> bool:
    return _is_name(value) or _is_list(value, _is_name)


# the fields with influence on the merge -> what they hold, in code and in words
KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number from 1"),
    "lora_alpha": (_is_number, "a number"),
    "target_modules": (_is_names, "a list of names, or a pattern"),
    "exclude_modules": (_is_names, "a list of names, or a pattern"),
    "layers_to_transform": (lambda v: is_count(v) or _is_list(v, is_count), "numbers of layers"),
    "layers_pattern": (_is_names, "a list of names, or a name"),
    "rank_pattern": (lambda v: _is_table(v, _is_rank), "an object of whole numbers from 1"),
    "alpha_pattern": (lambda v: _is_table(v, _is_number), "an object of numbers"),
    "use_rslora": (_is_bool, "true or false"),
    "fan_in_fan_out": (_is_bool, "true or false"),  # of Conv1D: peft ignores it on linear layers
}
REQUIRED = ("r", "lora_alpha", "target_modules")
