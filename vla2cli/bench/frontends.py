"""The front-ends that can be compared, by the name that `--frontend` takes.

A new one is a line in `FRONTENDS`. What it needs is imported when it is made, so that `--help`
waits for nothing.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vla2cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from vla2_models.videollama2 import VideoLLaMA2
    from vla2cli.frontend.base import Frontend

FLOATS = ("float32", "bfloat16", "float16")
DTYPES = (*FLOATS, "int8")  # int8: a front-end quantises float32 weights itself


@dataclass(frozen=True)
class FrontendKind:
    """How a front-end is made of a loaded checkpoint, and what it computes in."""

    # takes the networks, whose language model may be on the meta device, and the dtype's name;
    # their weights are in that dtype, for int8 in float32
    make: Callable[[VideoLLaMA2, str], Frontend]
    dtypes: tuple[str, ...] = FLOATS
    needs_cuda: bool = False


def _eager(model: VideoLLaMA2, _dtype: str) -> Frontend:
    from vla2cli.frontend.pytorch import TorchFrontend

    return TorchFrontend(model)


def _torch(model: VideoLLaMA2, _dtype: str) -> Frontend:
    from vla2cli.frontend.pytorch import TorchFrontend

    return TorchFrontend.fast(model)


def _triton(model: VideoLLaMA2, _dtype: str) -> Frontend:
    from vla2cli.frontend.pytorch import TorchFrontend

    return TorchFrontend.with_triton(model)


def _onnx(model: VideoLLaMA2, dtype: str) -> Frontend:
    from vla2cli.frontend.export import export_frontend
    from vla2cli.frontend.manifest import Origin
    from vla2cli.frontend.onnx import OnnxFrontend

    origin = Origin("bench", None, sha256="", precision=PRECISIONS[dtype], key="")
    with tempfile.TemporaryDirectory(prefix="vla2-bench-") as folder:
        export_frontend(_to_float32_on_cpu(model), Path(folder), origin, lambda message: None)
        return OnnxFrontend(Path(folder), model.device, model.dtype)


def _to_float32_on_cpu(model: VideoLLaMA2) -> VideoLLaMA2:
    """Return the networks as graphs are traced from them, which may be the same ones."""
    import torch

    if model.device.type == "cpu" and model.dtype == torch.float32:
        return model
    front = copy.copy(model)
    front._modules = {
        name: part if part is model.language_model else copy.deepcopy(part).to("cpu", torch.float32)
        for name, part in model.named_children()
    }
    return front


PRECISIONS = {"float32": "fp32", "float16": "fp16", "int8": "int8"}  # of ONNX graphs
FRONTENDS: Mapping[str, FrontendKind] = {
    "eager": FrontendKind(_eager),
    "torch": FrontendKind(_torch),
    "onnx": FrontendKind(_onnx, tuple(PRECISIONS)),
    "triton": FrontendKind(_triton, needs_cuda=True),
}


@dataclass(frozen=True)
class Variant:
    """One way to run a stage; None where a stage knows no such choice."""

    frontend: str | None = None
    dtype: str | None = None


BASELINE = Variant("eager", "float32")


def default_frontends(dtypes: Sequence[str], device: torch.device) -> tuple[str, ...]:
    """List the front-ends that are compared where none is named.

    Graphs are left out unless a dtype is theirs alone: to export them takes minutes.
    """
    names = [
        name for name, kind in FRONTENDS.items() if device.type == "cuda" or not kind.needs_cuda
    ]
    if not set(dtypes) - set(FLOATS):
        names.remove("onnx")
    return tuple(name for name in names if set(FRONTENDS[name].dtypes) & set(dtypes))


def pick_variants(frontends: Sequence[str], dtypes: Sequence[str]) -> list[Variant]:
    """Pair front-ends and dtypes, the baseline first, whether it was asked for or not.

    Args:
        frontends: names out of `FRONTENDS`.
        dtypes: names out of `DTYPES`.

    Raises:
        UsageError: a dtype is computed by none of the front-ends, or one of them by no dtype.
    """
    pairs = [
        Variant(name, dtype)
        for name in frontends
        for dtype in dtypes
        if dtype in FRONTENDS[name].dtypes
    ]
    for name in frontends:
        if not any(pair.frontend == name for pair in pairs):
            raise UsageError(
                f"'--frontend {name}' runs in {', '.join(FRONTENDS[name].dtypes)}, not in "
                f"{', '.join(dtypes)}; give another --dtype"
            )
    for dtype in dtypes:
        if not any(pair.dtype == dtype for pair in pairs):
            raise UsageError(
                f"'--dtype {dtype}' is computed by none of the front-ends {', '.join(frontends)}"
            )
    return list(dict.fromkeys([BASELINE, *pairs]))


def weights_dtype(dtype: str) -> str:
    """Return the dtype of the weights that a front-end of this dtype is made of."""
    return "float32" if dtype == "int8" else dtype
