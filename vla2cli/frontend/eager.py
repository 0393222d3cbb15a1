"""The front-end in plain PyTorch: normalised frames -> visual tokens, fbank -> audio tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla2_models.videollama2 import VideoLLaMA2


class EagerFrontend:
    """Towers and connectors of a loaded checkpoint, run as they stand."""

    name = "torch"  # in a record's `frontend`

    def __init__(self, model: VideoLLaMA2) -> None:
        self.model = model

    @torch.inference_mode()
    def vision_features(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the tower on the frames of several clips at once.

        Args:
            pixel_values: (T, 3, S, S) float32 each; an image has T = 1.

        Returns:
            (T, N, C) features each.
        """
        frames = torch.cat(list(pixel_values)).to(self.model.device, self.model.dtype)
        features = self.model.encode_frames(frames)
        return list(torch.split(features, [len(clip) for clip in pixel_values]))

    @torch.inference_mode()
    def visual_tokens(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run the connector on the features of several clips, one after the other.

        Returns:
            (num_tokens, D) tokens each.
        """
        return [self.model.project(clip[None])[0] for clip in features]

    @torch.inference_mode()
    def audio_features(self, fbank: Tensor) -> Tensor:
        """Run the audio tower on a (1, R, 128) bfloat16 fbank: (1, num_tokens, C) features."""
        return self.model.encode_sound(fbank)

    @torch.inference_mode()
    def audio_tokens(self, features: Tensor) -> Tensor:
        """Run the audio projector: (1, num_tokens, D) tokens."""
        return self.model.project_sound(features)
