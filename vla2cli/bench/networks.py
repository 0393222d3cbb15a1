"""The networks that are measured: a checkpoint's, or random ones of a public checkpoint's size.

They are built in two parts, the front (towers and connectors) and the language model, each when its
stages come: both in several dtypes at once would not fit. What a part lacks is on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from vla2_models.config import CheckpointConfig
from vla2_models.loading import LANGUAGE_MODEL, build_empty
from vla2_models.public import PublicCheckpoint, public_checkpoints, suggest
from vla2_models.random_weights import random_state
from vla2_models.sizes import full_size_config
from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.errors import ModelError, UsageError
from vla2cli.memory import free_bytes


class Networks:
    """Makes the parts of one model, in any dtype.

    Args:
        config: its language model may have fewer layers than the weights.
        device: where the parts go.
        stored: the weights by name; None for random ones.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        device: torch.device,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.stored = stored

    def front(self, dtype: torch.dtype) -> VideoLLaMA2:
        """Make towers and connectors; the language model stays on the meta device."""
        return self._build(lambda name: not name.startswith(LANGUAGE_MODEL), dtype)

    def language(self, dtype: torch.dtype) -> PreTrainedModel:
        """Make the language model alone."""
        return self._build(lambda name: name.startswith(LANGUAGE_MODEL), dtype).language_model

    def _build(self, is_wanted: Callable[[str], bool], dtype: torch.dtype) -> VideoLLaMA2:
        model = build_empty(self.config)
        wanted = {name: meta for name, meta in model.state_dict().items() if is_wanted(name)}
        self._check_room(wanted, dtype)
        if self.stored is None:
            state = random_state(wanted, dtype, self.device)
        else:
            state = {name: self.stored[name].to(self.device, dtype) for name in wanted}
        model.load_state_dict(state, strict=False, assign=True)
        for part in model.children():
            if not any(parameter.is_meta for parameter in part.parameters()):
                part.to(self.device)  # its buffers
        return model.requires_grad_(False).eval()

    def _check_room(self, wanted: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        # a CPU that runs out of memory ends the process without a word
        needed = sum(
            meta.numel() * dtype.itemsize
            for name, meta in wanted.items()
            if self.stored is None or not self._is_shared(self.stored[name], dtype)
        )
        free = free_bytes(self.device)
        if free is not None and needed > free:
            raise ModelError(
                f"'{self.config.folder}' needs {needed / 1e9:.1f} GB more in "
                f"{str(dtype).removeprefix('torch.')}, {free / 1e9:.1f} GB of {self.device} are "
                "free; give fewer --layers, --stages or --dtype"
            )

    def _is_shared(self, stored: Tensor, dtype: torch.dtype) -> bool:
        return stored.dtype == dtype and stored.device == self.device


def cut_layers(config: CheckpointConfig, num_layers: int | None) -> CheckpointConfig:
    """Leave the language model its first layers only; None leaves all.

    Raises:
        UsageError: it has fewer.
    """
    if num_layers is None:
        return config
    most = config.language.num_hidden_layers
    if not 1 <= num_layers <= most:
        raise UsageError(f"'--layers {num_layers}': the language model has 1 to {most}")
    language = copy.deepcopy(config.language)
    language.num_hidden_layers = num_layers
    kinds = getattr(language, "layer_types", None)  # one for each layer, where there are several
    if kinds is not None:
        language.layer_types = kinds[:num_layers]
    return replace(config, language=language)


def find_spec(name: str) -> PublicCheckpoint:
    """Find a public checkpoint by its name, with or without the owner's.

    Raises:
        UsageError: there is none; the line names the nearest.
    """
    known = {public.id: public for public in public_checkpoints()}
    by_name = {id.rpartition("/")[2]: public for id, public in known.items()}
    found = known.get(name) or by_name.get(name)
    if found is None:
        near = suggest(name)
        hint = f"did you mean {near.rpartition('/')[2]}?" if near else "vla2 models lists them"
        raise UsageError(f"'--spec {name}' is no public checkpoint; {hint}")
    return found


def spec_config(name: str) -> CheckpointConfig:
    """Describe a public checkpoint at its full size.

    Raises:
        UsageError: there is none of that name.
    """
    return full_size_config(find_spec(name))
