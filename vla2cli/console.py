"""What people read: everything on stderr, and the plain text at a terminal.

Data never passes through here. Bars are drawn only at a terminal.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vla2cli.errors import LedgerError, why

if TYPE_CHECKING:
    from rich.progress import Progress

    from vla2cli.jobs import Job


Say = Callable[[str], None]  # how what takes long tells people about it: `Console.note`


class Console:
    """Writes to stderr what a run has to say.

    Args:
        quiet: say nothing but what ends the run.
        verbose: say more.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._print: Callable[[str], None] = _print_line

    def note(self, message: str) -> None:
        """Say something that helps."""
        if not self.quiet:
            self._print(message)

    def detail(self, message: str) -> None:
        """Say something that only `--verbose` asks for."""
        if self.verbose:
            self._print(message)

    def watch(self, job: Job, total: int, *, is_shown: bool) -> Watch:
        """Follow a job of `total` records: a bar at a terminal, nothing elsewhere.

        Args:
            job: how busy its stages are stands beside the bar.
            total: records that it will make.
            is_shown: the records themselves go to stdout; at a terminal they would tear the bar.
        """
        is_free = sys.stderr.isatty() and not (is_shown and sys.stdout.isatty())
        has_bar = is_free and total > 1 and not self.quiet
        return Watch(self, job, total, has_bar=has_bar)


class Watch:
    """A job's progress, as a context: rate, time left, and how busy each stage is."""

    def __init__(self, console: Console, job: Job, total: int, *, has_bar: bool) -> None:
        self.console = console
        self.job = job
        self.started = time.monotonic()
        self.bar: Progress | None = _make_bar() if has_bar else None
        if self.bar:
            self.task = self.bar.add_task("", total=total, busy="", rate="")

    def __enter__(self) -> Watch:
        """Draw the bar."""
        if self.bar:
            self.bar.start()
            self.console._print = self._print_above
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        if self.bar:
            self.console._print = _print_line
            self.bar.stop()

    def advance(self, num_done: int) -> None:
        """Show how far it is."""
        if self.bar:
            elapsed = max(time.monotonic() - self.started, 1e-9)
            self.bar.update(
                self.task,
                completed=num_done,
                rate=format_rate(num_done / elapsed),
                busy=self._busy(elapsed),
            )

    def _busy(self, elapsed: float) -> str:
        busy_s = dict(self.job.busy_s)
        busy_s["decode"] = busy_s.get("decode", 0.0) / self.job.pool.num_workers
        shares = {name: busy_s.get(name, 0.0) / elapsed for name in ("decode", "tower", "language")}
        busiest = max(shares, key=lambda name: shares[name])
        return "  ".join(
            f"{name} {min(share, 1):.0%}{' ◀' if name == busiest else ''}"
            for name, share in shares.items()
        )

    def _print_above(self, message: str) -> None:
        assert self.bar is not None
        self.bar.console.print(printable(message), markup=False, highlight=False, soft_wrap=True)


def _make_bar() -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    return Progress(
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeLeft(compact=True),
        TextColumn("left  {task.fields[busy]}"),
        console=RichConsole(stderr=True),
    )


def _print_line(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)  # noqa: T201


def printable(text: str) -> str:
    """Spell out what a terminal would obey: control characters in a file's name."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_data(record: Mapping[str, Any]) -> None:
    """Write one JSON object as a line on stdout, flushed."""
    print_text(json.dumps(record, ensure_ascii=False))


def print_text(text: str) -> None:
    """Write a text as a line on stdout, flushed; always UTF-8, as a ledger is."""
    try:
        sys.stdout.buffer.write((text + "\n").encode("utf-8", "backslashreplace"))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LedgerError(f"cannot write to stdout: {why(error)}") from error


def format_rate(per_second: float) -> str:
    """Write a rate in the unit that keeps its number readable: `6.1/s`, `4.2/min`."""
    for factor, unit in ((1, "s"), (60, "min")):
        if per_second * factor >= 1:
            return f"{per_second * factor:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


def format_duration(seconds: float) -> str:
    """Write a duration as `0.8 s`, `2:31` or `1:02:31`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_size(num_bytes: float) -> str:
    """Write a size as `14.5 GB` or `2.4 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def count(number: int, noun: str) -> str:
    """Write a number with its noun: `1 video`, `1,204 videos`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
