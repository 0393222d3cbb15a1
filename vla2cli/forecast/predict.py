"""From a trial to a whole run: its time, its memory and its output.

    time = start + head + tail + (work - work in head and tail) / share

`work` is what the busiest stage has to do, in seconds, and `share` how much of the time it works
in the middle of the trial. Head and tail, while the stages fill and run empty, come once.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vla2cli.forecast.trial import Mark, Trial
from vla2cli.ledger import Record, clean

# stage -> the timings of a record that are its
TIMINGS = {
    "decode": ("read", "preprocess"),
    "tower": ("encode",),
    "language": ("prefill", "generate"),
}
STEADY_BATCHES = 2  # records of so many batches: the middle of a trial can be relied on
NOISE = 0.1  # by which two runs of the same differ
UNSTEADY = 0.25  # more of it where the middle was too short


@dataclass(frozen=True)
class Prediction:
    """What a run will take."""

    seconds: float  # of the whole command
    low_s: float
    high_s: float
    start_s: float  # of it, until the model is loaded, and after the run is over
    records_per_s: float  # records, when it is going
    bottleneck: str  # the busiest stage
    busy: dict[str, float]  # stage -> 0 to 1
    ledger_bytes: int


@dataclass(frozen=True)
class _Window:
    """A part of a trial that stands for the middle of a long run."""

    begin: Mark
    finish: Mark

    @property
    def elapsed_s(self) -> float:
        return max(self.finish.at_s - self.begin.at_s, 1e-9)

    def worked(self, stage: str) -> float:
        """Return how many seconds a stage worked."""
        return self.finish.busy_s[stage] - self.begin.busy_s[stage]

    def busy(self, num_workers: int) -> dict[str, float]:
        """Return how busy each stage was, 0 to 1; `decode` over all its processes."""
        workers = {"decode": num_workers}
        return {
            stage: min(1.0, self.worked(stage) / self.elapsed_s / workers.get(stage, 1))
            for stage in self.finish.busy_s
        }


def predict(
    trial: Trial,
    todo: Mapping[str, float],
    kinds: Mapping[str, str],
    *,
    start_s: float,
    batch: int,
    num_workers: int,
) -> Prediction:
    """Predict a run from a trial of it.

    Args:
        trial: with one record at least.
        todo: kind of file -> records that the run will make.
        kinds: id -> kind, of all records of the trial.
        start_s: until the model is loaded, and after the run is over.
        batch: clips that are encoded, and prompts that are answered, together.
        num_workers: processes that decode.
    """
    window, is_steady = _choose_window(trial, batch)
    busy = window.busy(num_workers)
    bottleneck = max(busy, key=lambda stage: busy[stage])
    work_s = _carry_on(trial.records, todo, kinds, lambda record: _cost(record, bottleneck))
    if bottleneck == "language":  # some of its time is charged to no record
        charged_s = sum(_cost(record, bottleneck) for record in trial.records)
        work_s *= trial.end.busy_s[bottleneck] / max(charged_s, 1e-9)
    outside_s = trial.end.busy_s[bottleneck] - window.worked(bottleneck)
    share = max(window.worked(bottleneck), 1e-9) / window.elapsed_s
    around_s = trial.end.at_s - window.elapsed_s
    run_s = around_s + max(0.0, work_s - outside_s) / share
    error = _relative_error(trial, window, batch, is_steady=is_steady)
    if trial.is_whole:
        run_s, error = trial.end.at_s, NOISE
    seconds = start_s + run_s
    num_bytes = _carry_on(trial.records, todo, kinds, line_bytes)
    return Prediction(
        seconds=seconds,
        low_s=seconds / (1 + error),
        high_s=seconds * (1 + error),
        start_s=start_s,
        records_per_s=sum(todo.values()) * share / max(work_s, 1e-9),
        bottleneck=bottleneck,
        busy=busy,
        ledger_bytes=round(num_bytes),
    )


def line_bytes(record: Record) -> int:
    """Return how long a record is in a ledger."""
    text = json.dumps(clean(record), ensure_ascii=False)
    return len(text.encode("utf-8", "backslashreplace")) + 1


def _choose_window(trial: Trial, batch: int) -> tuple[_Window, bool]:
    """Take the middle of a trial; all of it where too little came to an end in the middle."""
    num_records = trial.last.num_records - trial.first.num_records
    if num_records >= STEADY_BATCHES * batch:
        return _Window(trial.first, trial.last), True
    return _Window(Mark(0.0, dict.fromkeys(trial.end.busy_s, 0.0), 0), trial.end), False


def _cost(record: Record, stage: str) -> float:
    timings = record.get("timings_s") or {}  # an error record has none
    return sum(timings.get(name) or 0.0 for name in TIMINGS[stage])


def _carry_on(
    records: Sequence[Record],
    todo: Mapping[str, float],
    kinds: Mapping[str, str],
    cost: Callable[[Record], float],
) -> float:
    """Sum up what a run costs of which these records are a sample, each kind by its own mean."""
    costs: dict[str, list[float]] = defaultdict(list)
    for record in records:
        costs[kinds[record["id"]]].append(cost(record))
    mean = sum(map(sum, costs.values())) / len(records)  # for a kind that was not tried
    return sum(
        number * (statistics.fmean(costs[kind]) if kind in costs else mean)
        for kind, number in todo.items()
    )


def _relative_error(trial: Trial, window: _Window, batch: int, *, is_steady: bool) -> float:
    """Return by which share the time may be off: two standard errors of the pace, and noise."""
    inside = [at_s for at_s in trial.came_s if window.begin.at_s <= at_s <= window.finish.at_s]
    paces = [after - before for before, after in zip(inside[::batch], inside[batch::batch])]
    error = NOISE if is_steady else NOISE + UNSTEADY
    if len(paces) > 1 and (mean := statistics.fmean(paces)):
        error += 2 * statistics.stdev(paces) / mean / len(paces) ** 0.5
    return error
