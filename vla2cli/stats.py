"""What a run does and how long its stages work: for the line of progress, and for `--stats`."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vla2cli.errors import LedgerError, UsageError, why
from vla2cli.ledger import belongs_to

STAGES = ("decode", "tower", "language")
MARKS = {"busy_s", "bottleneck", "counts"}  # by these a file is known as ours
MAX_BYTES = 1 << 16  # a longer file is something else


class Stats:
    """Seconds of work by stage, and counts; each stage adds to its own from its own thread.

    Args:
        num_workers: processes that decode, of whose time `decode` is the sum.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.busy_s = dict.fromkeys(STAGES, 0.0)
        # clips decoded, encoded and recalled; prompts; tokens that were said
        self.counts: Counter[str] = Counter()
        self._since: dict[str, float] = {}  # stage -> when it took up what it is at
        self.start()

    def start(self, workers: Sequence[int] = ()) -> None:
        """Begin to count the time.

        Args:
            workers: processes that decode and are there already; what they have spent is left out.
        """
        self._workers = tuple(workers)
        self._started, self._cpu_before = time.monotonic(), _cpu_seconds(self._workers)
        self._ended: float | None = None

    def stop(self) -> None:
        """The run is over."""
        self._ended = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return max((self._ended or time.monotonic()) - self._started, 1e-9)

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """Add the time that this takes to a stage."""
        self._since[stage] = time.monotonic()
        try:
            yield
        finally:
            self.busy_s[stage] += time.monotonic() - self._since.pop(stage)

    def shares(self) -> dict[str, float]:
        """Return how busy each stage has been, 0 to 1; `decode` over all its processes."""
        elapsed_s, now = self.elapsed_s, time.monotonic()
        workers = {"decode": self.num_workers}
        return {
            stage: min(
                1.0,
                (busy_s + now - self._since.get(stage, now)) / elapsed_s / workers.get(stage, 1),
            )
            for stage, busy_s in self.busy_s.items()
        }

    @property
    def bottleneck(self) -> str:
        """The busiest stage."""
        shares = self.shares()
        return max(shares, key=lambda stage: shares[stage])

    def summary(self) -> dict[str, Any]:
        """State all of it; the processes that decoded have ended, or are not counted."""
        elapsed_s = self.elapsed_s
        cpu_s = _cpu_seconds(self._workers) - self._cpu_before
        num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return {
            "elapsed_s": round(elapsed_s, 3),
            "cpu_s": round(cpu_s, 3),
            "cores": num_cores,
            "cores_busy": round(cpu_s / elapsed_s / num_cores, 4),
            "peak_memory_bytes": _peak_bytes(),  # of the main process
            "workers": self.num_workers,
            "busy_s": {stage: round(busy_s, 3) for stage, busy_s in self.busy_s.items()},
            "busy": {stage: round(share, 4) for stage, share in self.shares().items()},
            "bottleneck": self.bottleneck,
            "counts": dict(sorted(self.counts.items())),
        }


def check_stats(path: Path, ledger: str | None) -> None:
    """Refuse a file for statistics that would take the place of anything else.

    Args:
        path: where they are to go.
        ledger: of the same run, if there is one.

    Raises:
        UsageError: it is the ledger or belongs to it, it is there and holds no statistics, or
            nothing can be written there.
    """
    if ledger is not None and belongs_to(path, ledger):
        raise UsageError(f"'--stats {path}' belongs to the output '{ledger}'; choose another file")
    if os.path.lexists(path) and not _is_ours(path):
        raise UsageError(f"'--stats {path}' exists and holds no statistics; choose another file")
    if not path.parent.is_dir():
        raise UsageError(f"'--stats {path}': there is no folder '{path.parent}'; create it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"'--stats {path}': '{path.parent}' cannot be written; choose another")


def _is_ours(path: Path) -> bool:
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            found = json.loads(path.read_bytes())
            return isinstance(found, dict) and found.keys() >= MARKS
    return False


def write_stats(path: Path, summary: dict[str, Any]) -> None:
    """Write a run's statistics, whole or not at all.

    Raises:
        LedgerError: the file cannot be written.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with aside.open("x", encoding="utf-8") as file:  # whatever is there is not ours
            file.write(json.dumps(summary, indent=1) + "\n")
        aside.replace(path)
    except OSError as error:
        raise LedgerError(f"cannot write '{path}': {why(error)}") from error


def _cpu_seconds(workers: Sequence[int]) -> float:
    """Sum the processor time of this process, of those that it started and that ended, and of some.

    What a worker has spent moves from the last to the second when it ends.
    """
    return sum(os.times()[:4]) + sum(map(_spent_s, workers))


def _spent_s(pid: int) -> float:
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended, or this is no Linux
        return 0.0
    user, system = line.rpartition(")")[2].split()[11:13]  # its name may hold anything
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
