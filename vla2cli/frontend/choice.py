"""Which front-end a run uses: `--frontend`, `--stc`, `--precision` and `--tensorrt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vla2cli.errors import UsageError
from vla2cli.frontend.base import Frontend

if TYPE_CHECKING:
    from vla2_models.checkpoint import Checkpoint
    from vla2_models.videollama2 import VideoLLaMA2
    from vla2cli.console import Say

# what an export has to be in for its tokens to be those of the dtype
PRECISION_OF = {torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True)
class FrontendChoice:
    """What runs towers and connector; `auto` and None are settled by `settle`."""

    frontend: str = "auto"  # auto, onnx or torch
    stc: str = "auto"  # what runs the connector: auto (as the rest), triton, torch or onnx
    precision: str | None = None  # of the ONNX graphs: fp32, fp16 or int8
    use_tensorrt: bool = False  # for the ONNX graphs, on CUDA

    def check(self, device: torch.device) -> None:
        """Refuse what cannot be had, before a weight is read.

        Raises:
            UsageError: naming the flag and the way out.
        """
        if self.frontend == "torch":
            of_onnx = {
                "--stc onnx": self.stc == "onnx",
                f"--precision {self.precision}": self.precision is not None,
                "--tensorrt": self.use_tensorrt,
            }
            for flag, is_given in of_onnx.items():
                if is_given:
                    raise UsageError(f"'{flag}' is about ONNX graphs; give '--frontend onnx' too")
        for flag, is_given in (
            ("--stc triton", self.stc == "triton"),
            ("--tensorrt", self.use_tensorrt),
        ):
            if is_given and device.type != "cuda":
                raise UsageError(
                    f"'{flag}' needs CUDA, and this run is on the {device}; leave it out"
                )
        if self.precision == "int8" and device.type == "cuda":
            raise UsageError("'--precision int8' is for the CPU; give fp16, or '--device cpu'")

    def settle(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, say: Say
    ) -> FrontendChoice:
        """Say what `auto` and None come to.

        An export that was made before is used where its tokens are those of the dtype; to make one
        takes minutes, and has to be asked for.
        """
        frontend, precision = self.frontend, self.precision
        default = PRECISION_OF.get(dtype, "fp16") if device.type == "cuda" else "fp32"
        if frontend == "auto":
            is_asked = precision is not None or self.use_tensorrt or self.stc == "onnx"
            frontend = "onnx" if is_asked or _has_export(checkpoint, dtype, say) else "torch"
        stc = frontend if self.stc == "auto" else self.stc
        is_onnx = frontend == "onnx"
        return replace(
            self,
            frontend=frontend,
            stc=stc,
            precision=precision or default if is_onnx else None,
        )

    @property
    def name(self) -> str:
        """What a record says of a settled choice: `torch`, `onnx-int8`, `onnx+triton`."""
        precision = "" if self.precision in (None, "fp32") else f"-{self.precision}"
        return f"{self.frontend}{precision}" + (f"+{self.stc}" if self.stc != self.frontend else "")

    def open(self, checkpoint: Checkpoint, model: VideoLLaMA2, say: Say) -> Frontend:
        """Open a settled choice on a loaded model; graphs that are not there yet are exported.

        Raises:
            UsageError: the connector has no Triton operators.
            FrontendError: the graphs cannot be made, kept or run.
        """
        parts = {
            name: self._open(name, checkpoint, model, say) for name in {self.frontend, self.stc}
        }
        if len(parts) == 1:
            return parts[self.frontend]
        return TwoFrontends(parts[self.frontend], parts[self.stc])

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

        if name == "torch":
            return TorchFrontend.fast(model)
        try:
            return TorchFrontend.with_triton(model)
        except ValueError as error:
            raise UsageError(f"'--stc triton': {error}; give --stc torch") from error


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


def _has_export(checkpoint: Checkpoint, dtype: torch.dtype, say: Say) -> bool:
    from vla2cli.frontend.cache import find_export

    precision = PRECISION_OF.get(dtype)
    return precision is not None and find_export(checkpoint, precision, say) is not None
