"""The line of progress at a terminal: done, rate, time left, and how busy each stage is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vla2cli.console import Console, format_duration, format_rate, printable
from vla2cli.stats import Stats

if TYPE_CHECKING:
    from rich.progress import Progress


class Watch:
    """Follows a run of `total` records, as a context: a bar at a terminal, nothing elsewhere.

    Args:
        console: its messages go above the bar.
        stats: of the run.
        total: records that it will make.
        is_shown: the records themselves go to stdout; at a terminal they would tear the bar.
    """

    def __init__(self, console: Console, stats: Stats, total: int, *, is_shown: bool) -> None:
        self.console, self.stats, self.total = console, stats, total
        self.num_done = 0
        is_free = sys.stderr.isatty() and not (is_shown and sys.stdout.isatty())
        self.bar = _make_bar(self._tell) if is_free and total > 1 and not console.quiet else None
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        """Draw the bar."""
        if self.bar:
            self.task = self.bar.add_task("", total=self.total)
            self._stack.enter_context(self.bar)
            self._stack.enter_context(self.console.printing(self._print_above))
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        self._stack.close()

    def advance(self, num_done: int) -> None:
        """Show how far it is."""
        self.num_done = num_done
        if self.bar:
            self.bar.update(self.task, completed=num_done)

    def _tell(self) -> str:
        """Say what is true now, also while no record comes."""
        pace = "--:-- left"
        if self.num_done:
            rate = self.num_done / self.stats.elapsed_s
            left_s = (self.total - self.num_done) / rate
            pace = f"{format_rate(rate)} {format_duration(left_s)} left"
        return f"{pace}  {_busy(self.stats)}"

    def _print_above(self, message: str) -> None:
        assert self.bar is not None, "there is a bar"
        self.bar.console.print(printable(message), markup=False, highlight=False, soft_wrap=True)


def _busy(stats: Stats) -> str:
    shares = stats.shares()
    bottleneck = max(shares, key=lambda stage: shares[stage])
    return "  ".join(
        f"{stage} {share:.0%}{' ◀' if stage == bottleneck else ''}"
        for stage, share in shares.items()
    )


def _make_bar(tell: Callable[[], str]) -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
    from rich.table import Column
    from rich.text import Text

    class Now(ProgressColumn):
        """What `tell` says whenever the bar is drawn, which is by a thread of its own."""

        def render(self, task: Task) -> Text:
            return Text(tell())

    return Progress(
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        Now(Column(no_wrap=True)),
        console=RichConsole(stderr=True),
        refresh_per_second=2,
    )
