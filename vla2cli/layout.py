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

    from vla2_models.config import LanguageConfig
    from vla2_models.videollama2 import VideoLLaMA2

# kept free on the first device, beside tower and connector: what a batch of clips passes through
ACTIVATION_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Layout:
    """Where and how the language model's weights are held; by default whole, on one device."""

    load_in: str | None = None  # 4bit or 8bit
    device_map: str | None = None  # auto: over all CUDA devices, the CPU and the disk
    max_memory: Mapping[int | str, int] | None = None  # bytes on each device, for `device_map`

    @property
    def is_plain(self) -> bool:
        """Whether one device holds the weights as they are."""
        return self.load_in is None and self.device_map is None

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

    def apply(self, model: VideoLLaMA2, device: torch.device) -> None:
        """Bring a model that was loaded on the CPU to its devices.

        Args:
            model: tower and connector stay whole, on the first device.
            device: the first device.
        """
        if self.load_in is not None:
            from vla2_models.quantize import quantize

            quantize(model.language_model, self.load_in, compute_dtype=model.dtype, device=device)
            model.to(device)
        elif self.device_map is not None:
            self._spread(model)

    def _spread(self, model: VideoLLaMA2) -> None:
        from vla2_models.placement import main_device, plan_placement, spread

        front: list[nn.Module] = [model.vision_tower, model.mm_projector]
        front_bytes = sum(
            parameter.numel() * parameter.element_size()
            for part in front
            for parameter in part.parameters()
        )
        device_map = plan_placement(
            model.language_model,
            model.dtype,
            max_memory=self.max_memory,
            reserved=front_bytes + ACTIVATION_BYTES,
        )
        # holds what fits on no device; lives as long as the process
        offload = tempfile.TemporaryDirectory(prefix="vla2-offload-")
        atexit.register(offload.cleanup)
        spread(model.language_model, device_map, Path(offload.name))
        for part in front:
            part.to(main_device(device_map))
