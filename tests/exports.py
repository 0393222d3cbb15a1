"""Exports of tiny and golden checkpoints, each made once for the whole session."""

import atexit
import functools
import tempfile
from pathlib import Path

import torch

from tests.goldens import golden_av_engine, golden_engine
from tests.tiny import tiny_av_engine
from vla2cli.frontend.export import export_checkpoint
from vla2cli.frontend.onnx import OnnxFrontend

CPU = torch.device("cpu")


@functools.cache
def _folder():
    folder = tempfile.TemporaryDirectory(prefix="vla2-exports-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _export(checkpoint, name, precision):
    folder = _folder() / f"{name}-{precision}"
    export_checkpoint(checkpoint, folder, precision, say=lambda line: None)
    return folder


@functools.cache
def tiny_export(precision="fp32"):
    """The folder of the export of the tiny checkpoint with ears; not to be changed."""
    return _export(tiny_av_engine().checkpoint, "tiny", precision)


@functools.cache
def golden_onnx(case):
    """A golden checkpoint's front-end in ONNX Runtime, fp32 on the CPU."""
    return OnnxFrontend(_export(golden_engine(case).checkpoint, case, "fp32"), CPU, torch.float32)


@functools.cache
def golden_av_onnx():
    """The same of the golden checkpoint with ears."""
    folder = _export(golden_av_engine().checkpoint, "av", "fp32")
    return OnnxFrontend(folder, CPU, torch.float32)


@functools.cache
def tiny_onnx(precision="fp32", *, dtype=torch.float32):
    """The front-end of the tiny checkpoint with ears in ONNX Runtime."""
    return OnnxFrontend(tiny_export(precision), CPU, dtype)
