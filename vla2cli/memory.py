"""How much memory there is, and how much a run takes on top of what is held before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return what can still be had on a device; None where the system does not tell."""
    if device.type == "cuda":
        # what torch keeps of earlier stages can be had as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    found = [_read_field(PROC / "meminfo", "MemAvailable"), *_left_to_groups()]
    return min((left for left in found if left is not None), default=None)


def can_tell_peak(device: torch.device) -> bool:
    """Tell whether `run_with_peak` returns a number here."""
    return device.type == "cuda" or _reset_peak("self")


def run_with_peak(
    run: Callable[[], Result], device: torch.device, pid: int | None = None
) -> tuple[Result, int | None]:
    """Run something, and see how much memory it takes while it runs.

    Args:
        run: what to run.
        device: on CUDA torch's allocator is asked, else the kernel about the resident set.
        pid: a process to look at in this one's place.

    Returns:
        What it returned, and the bytes at the worst moment beyond those held before, such as the
        weights; None where the kernel lets nobody reset its mark.
    """
    if device.type == "cuda" and pid is None:
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - held
    process = "self" if pid is None else str(pid)
    if pid is None:
        _give_back()
    if not _reset_peak(process):
        return run(), None
    before = _read_field(PROC / process / "status", "VmRSS")
    result = run()
    peak = _read_field(PROC / process / "status", "VmHWM")
    if before is None or peak is None:
        return result, None
    return result, max(peak - before, 0)


def _left_to_groups() -> Iterator[int]:
    """Yield what the limits on this process leave it: of its cgroups (v2), such as a container.

    The kernel drops pages of files that were not used of late before it refuses memory.
    """
    with suppress(OSError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                group = CGROUPS / line.removeprefix("0::/")
                for folder in (group, *group.parents):
                    if folder.is_relative_to(CGROUPS):
                        yield from _left_to(folder)


def _left_to(group: Path) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no such controller, or `max`
        limit = int((group / "memory.max").read_text())
        held = int((group / "memory.current").read_text())
        stat = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
        yield max(limit - held + int(stat.get("inactive_file", 0)), 0)


def _give_back() -> None:
    """Return freed memory to the system; else a run seems to need none, taking what was left."""
    with suppress(OSError, AttributeError):  # another libc than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak(process: str) -> bool:
    try:
        (PROC / process / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read_field(path: Path, name: str) -> int | None:
    """Read a line like `VmHWM:  1234 kB` of a file of the kernel, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(values[0]) if values else None
