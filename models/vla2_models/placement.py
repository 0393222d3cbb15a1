"""A language model that is larger than one device: plan what lies where, then spread it.

Accelerate's hooks bring inputs, and weights that lie on the CPU or in files, to the device that
computes. Towers and connectors stay whole on the main device; the text goes in and the logits come
out there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

# where weights lie between two uses; every other device computes
OFFLOADED = ("cpu", "disk")


def plan_placement(
    language_model: PreTrainedModel,
    dtype: torch.dtype,
    *,
    max_memory: Mapping[int | str, int] | None,
    reserved: int = 0,
    headroom: int = 0,
) -> dict[str, int | str]:
    """Say on which device each part of a language model belongs.

    Args:
        language_model: parameters may be on the meta device; a decoder layer is never split.
        dtype: what the weights will be held in.
        max_memory: bytes that weights may take on each device, GPUs by their number and "cpu";
            one that is not named takes none. None: what is free now on all of them.
        reserved: bytes of the first device that stay free, for towers and connectors.
        headroom: bytes that stay free on each device that computes, for activations, keys and
            values; nothing else is kept for those.

    Returns:
        Module name to GPU number, "cpu" or "disk". GPUs come first, as balanced as whole layers
        allow, then "cpu", then "disk"; where weights come and go, the largest layer has room
        besides.
    """
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    limits = get_max_memory(None if max_memory is None else dict(max_memory))
    computing = [device for device in limits if device not in OFFLOADED] or list(limits)[:1]
    for device in computing:
        kept = headroom + (reserved if device == computing[0] else 0)
        limits[device] = max(0, limits[device] - kept)
    whole = sorted(language_model._no_split_modules or ())
    balanced = get_balanced_memory(
        language_model, limits, no_split_module_classes=whole, dtype=dtype
    )
    with warnings.catch_warnings():
        # the buffers it has in mind are the frequencies of the rotary embedding, some hundred bytes
        warnings.filterwarnings("ignore", message="Current model requires")
        return dict(
            infer_auto_device_map(
                language_model, balanced, no_split_module_classes=whole, dtype=dtype
            )
        )


class Placement:
    """A plan that is carried out, part by part as the weights are loaded, then as a whole.

    Parts on "cpu" are computed there when no GPU takes part; otherwise they wait there, and are
    copied to the main device for each use. Parts on "disk" are written out and read for each use.

    Args:
        device_map: from `plan_placement`; names every parameter once, or a module above it.
        offload_dir: gets a file for each weight on "disk"; for this model alone, and needed as
            long as it runs.
    """

    def __init__(self, device_map: Mapping[str, int | str], offload_dir: Path) -> None:
        self.device_map = dict(device_map)
        self.offload_dir = offload_dir
        self._written: dict[str, Any] = {}  # accelerate's index of the files

    @property
    def main_device(self) -> torch.device:
        """The device of towers, connectors, ids, embeddings and logits."""
        return (
            torch.device("cuda", self._main)
            if isinstance(self._main, int)
            else torch.device(self._main)
        )

    def settle(self, name: str, part: nn.Module) -> None:
        """Put a part of the language model, just loaded on the CPU, where the plan says.

        Args:
            name: of the part in the language model; all of it lies on one device.
            part: its weights are dropped here once they are on "disk".
        """
        device = self._device_of(name)
        if device == "disk":
            self._write(name, part)
        elif device != "cpu":
            part.to(device)

    def spread(self, language_model: PreTrainedModel) -> None:
        """Put what has not been settled where the plan says, and hook the model to run from there.

        Args:
            language_model: its other weights are on the CPU, perhaps memory-mapped.
        """
        from accelerate import dispatch_model
        from accelerate.utils import save_offload_index

        device_map = self.device_map
        if "" in device_map:
            # accelerate would find no weight under the empty name
            device_map = {name: device_map[""] for name, _ in language_model.named_children()}
        for name, device in device_map.items():
            if device == "disk":
                self._write(name, language_model.get_submodule(name))
        if self._written:
            save_offload_index(self._written, self.offload_dir)
        with _without_remark():
            dispatch_model(
                language_model,
                device_map,
                # its own choice among several GPUs is the first of a set
                main_device=self._main,
                offload_dir=self.offload_dir,
                # keys and values stay with their layer
                skip_keys=sorted(language_model._skip_keys_device_placement or ()),
            )

    def _write(self, name: str, part: nn.Module) -> None:
        from accelerate.utils import offload_weight, set_module_tensor_to_device

        self.offload_dir.mkdir(parents=True, exist_ok=True)
        for key, weight in list(part.named_parameters(remove_duplicate=False)):
            if not weight.is_meta:
                offload_weight(weight, f"{name}.{key}", self.offload_dir, self._written)
                set_module_tensor_to_device(part, key, "meta")

    def _device_of(self, name: str) -> int | str:
        while name not in self.device_map and name:
            name = name.rpartition(".")[0]
        return self.device_map[name]

    @property
    def _main(self) -> int | str:
        gpus = [device for device in self.device_map.values() if device not in OFFLOADED]
        for name in ("model.embed_tokens", "model", ""):
            if self.device_map.get(name) in gpus:
                return self.device_map[name]
        return gpus[0] if gpus else "cpu"


@contextmanager
def _without_remark() -> Iterator[None]:
    """Keep accelerate from saying on stderr that weights were offloaded, which was asked for."""
    logger = logging.getLogger("accelerate.big_modeling")

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Some parameters are on the meta device")

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
