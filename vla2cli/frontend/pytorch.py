"""The front-end in PyTorch: the checkpoint's own networks, packed for the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla2_models.packed import can_pack, in_groups, pack_front
from vla2_models.videollama2 import VideoLLaMA2


class TorchFrontend:
    """Towers and connectors of a loaded checkpoint; the methods are those of `Frontend`.

    Args:
        model: the checkpoint's networks.
        is_plain: whether they run as they stand, which is what every other front-end is held to;
            otherwise they are packed where the device and dtype can be.
    """

    name = "torch"

    def __init__(self, model: VideoLLaMA2, *, is_plain: bool = False) -> None:
        self.is_packed = not is_plain and can_pack(model.device, model.dtype)
        self.model = pack_front(model) if self.is_packed else model

    @torch.inference_mode()
    def vision_features(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the tower on the frames of several clips at once."""
        frames = torch.cat(list(pixel_values)).to(self.model.device, self.model.dtype)
        groups = in_groups(frames, self._frame_bytes) if self.is_packed else [frames]
        features = torch.cat([self.model.encode_frames(group) for group in groups])
        return list(torch.split(features, [len(clip) for clip in pixel_values]))

    @property
    def _frame_bytes(self) -> int:
        """Bytes of the largest activation of one frame in the tower."""
        config = self.model.config
        return config.num_patches * config.vision.intermediate_size * self.model.dtype.itemsize

    @torch.inference_mode()
    def visual_tokens(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run the connector on the features of several clips, one after the other."""
        return [self.model.project(clip[None])[0] for clip in features]

    @torch.inference_mode()
    def listen(self, fbank: Tensor) -> tuple[Tensor, Tensor]:
        """Run the audio tower and its projector."""
        features = self.model.encode_sound(fbank)
        return features, self.model.project_sound(features)
