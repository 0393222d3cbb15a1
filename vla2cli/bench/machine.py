"""What a time depends on beside the code: processor, device, versions."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

from vla2cli import __version__
from vla2cli.media.pool import default_num_workers

PACKAGES = ("torch", "transformers", "timm", "onnxruntime-gpu", "onnxruntime", "triton", "av")


def describe_cpu() -> str:
    """Name the processor and the cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {default_num_workers()} cores"


def describe_device(device: torch.device) -> str:
    """Name the device that computes: `cpu`, or a GPU by its product."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """List the versions of what computes; a package that is not installed has none."""
    found = {"vla2": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
