"""A language model that is larger than one device: plan what lies where, then spread it.

Accelerate's hooks bring inputs, and weights that lie on the CPU or in files, to the device that
computes. The tower and the connector stay whole on the main device; the text goes in and the
logits come out there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.modeling_utils import PreTrainedModel

# where weights lie between two uses; every other device computes
OFFLOADED = ("cpu", "disk")


def plan_placement(
    language_model: PreTrainedModel,
    dtype: torch.dtype,
    *,
    max_memory: Mapping[int | str, int] | None,
    reserved: int = 0,
) -> dict[str, int | str]:
    """Say on which device each part of a language model belongs.

    Args:
        language_model: parameters may be on the meta device; a decoder layer is never split.
        dtype: what the weights will be held in.
        max_memory: bytes that weights may take on each device, GPUs by their number and "cpu";
            one that is not named takes none. None: what is free now on all of them.
        reserved: bytes of the first device that stay free, for the tower, the connector and
            activations; nothing else is kept for those.

    Returns:
        Module name to GPU number, "cpu" or "disk". GPUs come first and share evenly, then "cpu",
        then "disk"; where weights come and go, the largest layer has room besides.
    """
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    limits = get_max_memory(None if max_memory is None else dict(max_memory))
    for first in list(limits)[:1]:
        limits[first] = max(0, limits[first] - reserved)
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


def spread(
    language_model: PreTrainedModel, device_map: Mapping[str, int | str], offload_dir: Path
) -> None:
    """Put loaded weights where the map says and hook the model so that it runs from there.

    Parts on "cpu" are computed there when no GPU takes part; otherwise they wait there, and are
    copied to the main device for each use. Parts on "disk" are written out and read for each use.

    Args:
        language_model: weights on the CPU, perhaps memory-mapped, in their final dtype; quantized
            ones cannot be on "disk", nor on "cpu" beside a GPU.
        device_map: from `plan_placement`; names every parameter once, or a module above it.
        offload_dir: gets a file for each weight on "disk", and is left alone without any; for this
            model alone, and needed as long as it runs.
    """
    from accelerate import dispatch_model

    if "" in device_map:
        # accelerate would find no weight under the empty name, and write none to "disk"
        device_map = {name: device_map[""] for name, _ in language_model.named_children()}
    if "disk" in device_map.values():
        # accelerate writes nothing where it finds an index, even that of another model
        (offload_dir / "index.json").unlink(missing_ok=True)
    with _without_remark():
        dispatch_model(
            language_model,
            dict(device_map),
            # its own choice among several GPUs is the first of a set
            main_device=_main(device_map),
            offload_dir=offload_dir,
            # keys and values stay with their layer
            skip_keys=sorted(language_model._skip_keys_device_placement or ()),
        )


def main_device(device_map: Mapping[str, int | str]) -> torch.device:
    """Return the device of the tower, the connector, ids, embeddings and logits."""
    main = _main(device_map)
    return torch.device("cuda", main) if isinstance(main, int) else torch.device(main)


def _main(device_map: Mapping[str, int | str]) -> int | str:
    gpus = [device for device in device_map.values() if device not in OFFLOADED]
    for name in ("model.embed_tokens", "model", ""):
        if device_map.get(name) in gpus:
            return device_map[name]
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
