"""The front-end as ONNX Runtime runs it, from an exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vla2cli.errors import FrontendError
from vla2cli.frontend.manifest import Manifest
from vla2cli.frontend.session import Session

# memory of the frames that are in the tower at once. More at once is no faster: a dozen frames of
# 24 x 24 patches are rows enough for the largest GEMM
BYTES_AT_ONCE = 2**30


class OnnxFrontend:
    """Exported towers and connectors; the methods are those of `Frontend`.

    All graphs are opened at once: from then on their files may be replaced or removed.

    Args:
        folder: what `export_frontend` has written.
        device: where it runs, and where its results are.
        dtype: of the tokens; inside it computes in the export's precision.
        use_tensorrt: on CUDA, run on it what TensorRT can take.

    Raises:
        FrontendError: the folder is no export, or cannot be run on the device.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        use_tensorrt: bool = False,
    ) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        if self.manifest.origin.precision == "int8" and device.type != "cpu":
            # ONNX Runtime would run them there anyway, with a copy each way, and say nothing
            raise FrontendError(
                f"the products of '{folder}' are in int8, which only the CPU has; give "
                "--precision fp16, or --device cpu"
            )
        self.device = _with_index(device)
        self.dtype = dtype
        self.sessions = {
            graph: Session(folder / f"{graph}.onnx", self.device, use_tensorrt=use_tensorrt)
            for graph in self.manifest.graphs
        }

    @property
    def frames_at_once(self) -> int:
        """The most frames that are in the tower at once, by `BYTES_AT_ONCE`."""
        return max(1, BYTES_AT_ONCE // self.manifest.frame_bytes)

    @torch.inference_mode()
    def vision_features(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the tower on the frames of several clips, `frames_at_once` of them at a time.

        The features have the graph's dtype, since they mostly go into the next graph.
        """
        tower = self.sessions["tower"]
        frames = torch.cat(list(pixel_values))
        features = tower.empty(len(frames))
        size = self.frames_at_once
        for start in range(0, len(frames), size):
            tower(frames[start : start + size], into=features[start : start + size])
        return list(torch.split(features, [len(clip) for clip in pixel_values]))

    @torch.inference_mode()
    def visual_tokens(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run the connector on the features of several clips, one after the other."""
        return [self.sessions["connector"](clip[None])[0][0].to(self.dtype) for clip in features]

    @torch.inference_mode()
    def listen(self, fbank: Tensor) -> tuple[Tensor, Tensor]:
        """Run the audio tower and its projector."""
        if self.manifest.patch_rows is None:
            raise ValueError("the checkpoint has no audio tower")
        # rows that fill no patch are never heard, and the graph takes whole ones
        num_rows = fbank.shape[1] // self.manifest.patch_rows * self.manifest.patch_rows
        if not num_rows:
            raise ValueError(
                f"fbank has {fbank.shape[1]} rows, expected at least {self.manifest.patch_rows}"
            )
        features, tokens = self.sessions["sound"](fbank[:, :num_rows])
        return features.to(self.dtype), tokens.to(self.dtype)


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
