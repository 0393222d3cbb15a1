"""The front-end in PyTorch: the checkpoint's own networks, as they stand or laid out for speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from vla2_models.packed import can_pack, in_groups, pack_front
from vla2_models.stc_fused import fuse_connector
from vla2_models.videollama2 import VideoLLaMA2


class TorchFrontend:
    """Towers and connectors of a loaded checkpoint; the methods are those of `Frontend`.

    As it stands it is plain eager PyTorch, which every other front-end is held to. In float32 on
    CUDA it turns TF32 off in cuDNN, for the whole process.
    """

    def __init__(self, model: VideoLLaMA2, *, is_grouped: bool = False) -> None:
        self.model = model
        self.is_grouped = is_grouped  # frames go through the tower a few at a time
        if model.device.type == "cuda" and model.dtype == torch.float32:
            # float32 means float32: TF32, which cuDNN's convolutions default to, has ten bits of it
            torch.backends.cudnn.allow_tf32 = False

    @classmethod
    def fast(cls, model: VideoLLaMA2) -> Self:
        """Pack the networks, where the processor and the dtype can be."""
        if not can_pack(model.device, model.dtype):
            return cls(model)
        return cls(pack_front(model), is_grouped=True)

    @classmethod
    def with_triton(cls, model: VideoLLaMA2) -> Self:
        """Run the connector on the Triton operators.

        Raises:
            ValueError: it is not of the kind that they are made for.
        """
        return cls(fuse_connector(model))

    @torch.inference_mode()
    def vision_features(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the tower on the frames of several clips at once."""
        frames = torch.cat(list(pixel_values)).to(self.model.device, self.model.dtype)
        groups = in_groups(frames, self._frame_bytes) if self.is_grouped else [frames]
        features = torch.cat([self.model.encode_frames(group) for group in groups])
        return list(torch.split(features, [len(clip) for clip in pixel_values]))

    @torch.inference_mode()
    def visual_tokens(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run the connector on the features of several clips, one after the other."""
        # another front-end's may be of another dtype
        clips = (clip.to(self.model.device, self.model.dtype) for clip in features)
        return [self.model.project(clip[None])[0] for clip in clips]

    @torch.inference_mode()
    def listen(self, fbank: Tensor) -> tuple[Tensor, Tensor]:
        """Run the audio tower and its projector."""
        features = self.model.encode_sound(fbank)
        return features, self.model.project_sound(features)

    @property
    def _frame_bytes(self) -> int:
        """Bytes of the largest activation of one frame in the tower."""
        config = self.model.config
        return config.num_patches * config.vision.intermediate_size * self.model.dtype.itemsize
