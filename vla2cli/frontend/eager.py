"""The front-end as it is defined: the checkpoint's own networks in plain PyTorch, as they stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla2_models.videollama2 import VideoLLaMA2


class EagerFrontend:
    """Towers and connectors of a loaded checkpoint; the methods are those of `Frontend`."""

    name = "torch"

    def __init__(self, model: VideoLLaMA2) -> None:
        self.model = model

    @torch.inference_mode()
    def vision_features(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the tower on the frames of several clips at once."""
        frames = torch.cat(list(pixel_values)).to(self.model.device, self.model.dtype)
        features = self.model.encode_frames(frames)
        return list(torch.split(features, [len(clip) for clip in pixel_values]))

    @torch.inference_mode()
    def visual_tokens(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run the connector on the features of several clips, one after the other."""
        return [self.model.project(clip[None])[0] for clip in features]

    @torch.inference_mode()
    def listen(self, fbank: Tensor) -> tuple[Tensor, Tensor]:
        """Run the audio tower and its projector."""
        features = self.model.encode_sound(fbank)
        return features, self.model.project_sound(features)
