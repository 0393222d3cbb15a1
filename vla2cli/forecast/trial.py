"""Run a sample of the work as a run does it, and see how long what takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vla2cli.jobs import Job
from vla2cli.ledger import Record
from vla2cli.plan import Work, count_records


@dataclass(frozen=True)
class Mark:
    """A moment of a trial."""

    at_s: float  # from its begin
    busy_s: dict[str, float]  # stage -> seconds of work until then
    num_records: int


@dataclass(frozen=True)
class Trial:
    """What a trial made, and three of its moments.

    Between `first` and `last` the stages are busy as in the middle of a long run; before, they
    fill, and afterwards they run empty.
    """

    records: tuple[Record, ...]
    came_s: tuple[float, ...]  # when each of them came
    first: Mark  # with the first record
    last: Mark  # when nothing more was begun
    end: Mark
    is_whole: bool  # there was no more to do


@dataclass
class _Clock:
    """Watches a trial; asked from the threads of all stages whether it is over."""

    job: Job
    limit_s: float
    began: float = field(default_factory=time.monotonic)
    num_records: int = 0
    first: Mark | None = None
    last: Mark | None = None

    def mark(self) -> Mark:
        at_s = time.monotonic() - self.began
        return Mark(at_s, dict(self.job.stats.busy_s), self.num_records)

    def count(self) -> float:
        """Take note of a record; return when it came."""
        self.num_records += 1
        mark = self.mark()
        self.first = self.first or mark
        return mark.at_s

    def is_over(self) -> bool:
        """Tell whether the time is up, which begins with the first record."""
        first = self.first
        if self.last is None and first is not None:
            now = self.mark()
            if now.at_s - first.at_s >= self.limit_s:
                self.last = now
        return self.last is not None


def run_trial(job: Job, works: Sequence[Work], limit_s: float) -> Trial:
    """Do some of the works, from the first on.

    Args:
        job: without a ledger; its weights are loaded.
        works: in an order of which every beginning stands for all.
        limit_s: seconds from the first record on; then what is in hand is finished.
    """
    clock = _Clock(job, limit_s)
    records: list[Record] = []
    came_s: list[float] = []
    for record in job.run(works, should_stop=clock.is_over):
        records.append(record)
        came_s.append(clock.count())
    end = clock.mark()
    return Trial(
        records=tuple(records),
        came_s=tuple(came_s),
        first=clock.first or end,
        last=clock.last or end,
        end=end,
        is_whole=len(records) == count_records(works),
    )
