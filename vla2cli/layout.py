"""How a language model that is too large for one device is held: quantised, or spread."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vla2cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vla2_models.checkpoint import Checkpoint
    from vla2_models.config import LanguageConfig
    from vla2_models.videollama2 import VideoLLaMA2

# kept free on every device that computes: activations, keys and values of a batch
HEADROOM_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Layout:
    """Where and how the language model's weights are held; by default whole, on one device."""

    load_in: str | None = None  # 4bit or 8bit
    device_map: str | None = None  # auto: over all CUDA devices, the CPU and the disk
    max_memory: Mapping[int | str, int] | None = None  # bytes on each device, for `device_map`

    def check(self, language: LanguageConfig, device: torch.device) -> None:
        """Refuse what cannot be had here, before a weight is read.

        Raises:
            UsageError: naming the flag and the way out.
        """
        if self.load_in and self.device_map:
            raise UsageError(
                "'--load-in' puts the model on one device and '--device-map' on several; give one"
            )
        if self.device_map not in (None, "auto"):
            raise UsageError(f"'--device-map {self.device_map}': expected auto")
        if self.load_in is not None:
            from vla2_models.errors import CheckpointError
            from vla2_models.quantize import check_quantization

            try:
                check_quantization(self.load_in, language, device)
            except (CheckpointError, ValueError) as error:
                raise UsageError(f"'--load-in {self.load_in}': {error}") from error

    def load(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> VideoLLaMA2:
        """Load a checkpoint, each decoder layer into its final form and place as it is read.

        Args:
            checkpoint: what to load.
            dtype: of what is not quantised.
            device: of towers and connectors, which stay whole; with `device_map`, accelerate's
                first.

        Raises:
            CheckpointError: the checkpoint is not sound.
        """
        from vla2_models.loading import load_model

        if self.load_in is not None:
            from vla2_models.quantize import quantize_layer

            def settle(_name: str, layer: nn.Module) -> None:
                quantize_layer(layer, bits, compute_dtype=dtype, device=device)

            bits = self.load_in
            return load_model(checkpoint, dtype=dtype, settle=settle).to(device)
        if self.device_map is not None:
            return self._spread(checkpoint, dtype)
        return load_model(checkpoint, dtype=dtype, device=device)

    def _spread(self, checkpoint: Checkpoint, dtype: torch.dtype) -> VideoLLaMA2:
        from vla2_models.loading import build_empty, load_model
        from vla2_models.placement import Placement, plan_placement

        empty = build_empty(checkpoint.config)
        front_size = sum(
            parameter.numel() for part in empty.front for parameter in part.parameters()
        )
        device_map = plan_placement(
            empty.language_model,
            dtype,
            max_memory=self.max_memory,
            reserved=front_size * dtype.itemsize,
            headroom=HEADROOM_BYTES,
        )
        # holds what fits on no device; lives as long as the process
        offload = tempfile.TemporaryDirectory(prefix="vla2-offload-")
        atexit.register(offload.cleanup)
        placement = Placement(device_map, Path(offload.name))
        model = load_model(checkpoint, dtype=dtype, settle=placement.settle)
        placement.spread(model.language_model)
        for part in model.front:
            part.to(placement.main_device)
        return model
