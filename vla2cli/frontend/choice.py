"""Which front-end a run uses: `--frontend`, `--stc`, `--precision` and `--tensorrt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vla2cli.errors import UsageError
from vla2cli.frontend.base import Frontend
from vla2cli.frontend.manifest import PRECISIONS

if TYPE_CHECKING:
    from vla2_models.checkpoint import Checkpoint
    from vla2_models.stc import ConnectorDesign
    from vla2_models.videollama2 import VideoLLaMA2
    from vla2cli.console import Say

# of which dtype's tokens a graph makes
_DTYPE_OF = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class FrontendChoice:
    """What runs towers and connector; `auto` and None are settled by `settle`."""

    frontend: str = "auto"  # auto, onnx or torch
    stc: str = "auto"  # what runs the connector: auto (as the rest), triton, torch or onnx
    precision: str | None = None  # of the ONNX graphs: fp32, fp16 or int8
    use_tensorrt: bool = False  # for the ONNX graphs, on CUDA

    def check(self, device: torch.device, connector: ConnectorDesign) -> None:
        """Refuse what cannot be had, before a weight is read.

        Raises:
            UsageError: naming the flag and the way out.
        """
        known = {
            "--frontend": (self.frontend, ("auto", "onnx", "torch")),
            "--stc": (self.stc, ("auto", "triton", "torch", "onnx")),
            "--precision": (self.precision, (None, *PRECISIONS)),
        }
        for flag, (value, values) in known.items():
            if value not in values:
                raise UsageError(f"'{flag} {value}': expected {', '.join(filter(None, values))}")
        of_onnx = {
            "--stc onnx": self.stc == "onnx",
            f"--precision {self.precision}": self.precision is not None,
            "--tensorrt": self.use_tensorrt,
        }
        for flag, is_given in of_onnx.items():
            if is_given and self.frontend == "torch":
                raise UsageError(f"'{flag}' is about ONNX graphs; give '--frontend onnx' too")
        on_cuda = {"--stc triton": self.stc == "triton", "--tensorrt": self.use_tensorrt}
        for flag, is_given in on_cuda.items():
            if is_given and device.type != "cuda":
                raise UsageError(f"'{flag}' needs CUDA, and this run is on the {device}")
        if self.precision == "int8" and device.type == "cuda":
            raise UsageError("'--precision int8' is for the CPU; give fp16, or '--device cpu'")
        if self.stc == "triton" and connector.kernel is None:
            raise UsageError("'--stc triton': the model's connector has no convolutions")

    def settle(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, say: Say
    ) -> FrontendChoice:
        """Say what `auto` and None come to.

        An export that was made before is used where its tokens are those of the dtype; to make one
        takes minutes, and has to be asked for.
        """
        frontend = self.frontend
        # the CPU has no graphs in half precision that are worth it, and CUDA none in bfloat16
        precision = self.precision or (
            "fp16" if device.type == "cuda" and dtype != torch.float32 else "fp32"
        )
        if frontend == "auto":
            is_asked = self.precision is not None or self.use_tensorrt or self.stc == "onnx"
            is_there = _DTYPE_OF[precision] == dtype and _has_export(checkpoint, precision, say)
            frontend = "onnx" if is_asked or is_there else "torch"
        return replace(
            self,
            frontend=frontend,
            stc=frontend if self.stc == "auto" else self.stc,
            precision=precision if frontend == "onnx" else None,
        )

    @property
    def name(self) -> str:
        """What a record says of a settled choice: `torch`, `onnx-int8`, `onnx+triton`."""
        name = self.frontend
        if self.precision not in (None, "fp32"):
            name += f"-{self.precision}"
        if self.use_tensorrt:
            name += "-tensorrt"
        return name if self.stc == self.frontend else f"{name}+{self.stc}"

    def open(self, checkpoint: Checkpoint, model: VideoLLaMA2, say: Say) -> Frontend:
        """Open a settled choice on a loaded model; graphs that are not there yet are exported.

        Raises:
            FrontendError: the graphs cannot be made, kept or run.
        """
        names = dict.fromkeys((self.frontend, self.stc))
        first, *others = (self._open(name, checkpoint, model, say) for name in names)
        return TwoFrontends(first, *others) if others else first

    def _open(self, name: str, checkpoint: Checkpoint, model: VideoLLaMA2, say: Say) -> Frontend:
        if name == "onnx":
            from vla2cli.frontend.cache import open_frontend

            assert self.precision is not None, "settled"
            return open_frontend(
                checkpoint,
                self.precision,
                model.device,
                model.dtype,
                say,
                use_tensorrt=self.use_tensorrt,
            )
        from vla2cli.frontend.pytorch import TorchFrontend

        return TorchFrontend.fast(model) if name == "torch" else TorchFrontend.with_triton(model)


@dataclass(frozen=True)
class TwoFrontends:
    """One front-end that sees and hears, and another that connects what is seen.

    Features go from one to the other where they lie; nothing is copied.
    """

    towers: Frontend
    connector: Frontend

    def vision_features(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the first one's tower."""
        return self.towers.vision_features(pixel_values)

    def visual_tokens(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run the second one's connector."""
        return self.connector.visual_tokens(features)

    def listen(self, fbank: Tensor) -> tuple[Tensor, Tensor]:
        """Run the first one's audio tower and projector."""
        return self.towers.listen(fbank)


def _has_export(checkpoint: Checkpoint, precision: str, say: Say) -> bool:
    from vla2cli.frontend.cache import find_export

    return find_export(checkpoint, precision, say) is not None
