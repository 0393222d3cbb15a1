"""What a run says of itself: log.jsonl, skipped.jsonl, loss.png, and lines on stderr.

    log.jsonl      step, loss, learning_rate, tokens, samples, skipped, seconds; the last four count
                   from the run's beginning, over all processes and whatever ended it in between
    skipped.jsonl  step, id, reason: each sample that could not be used

Lines beyond the checkpoint that a run goes on from are taken back: they come again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vla2_models.files import replace_text
from vla2cli.console import Console, format_duration, format_rate
from vla2cli.errors import Vla2Error
from vla2cli.train.hf import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG, SKIPPED, PLOT = "log.jsonl", "skipped.jsonl", "loss.png"
NOTE_INTERVAL_S = 5.0  # between two lines on stderr


@dataclass
class Totals:
    """What a run has been given so far, over all processes."""

    tokens: int = 0  # that were predicted: those of answers
    samples: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, samples: int, skipped: int) -> None:
        """Count what one step is given."""
        self.tokens += tokens
        self.samples += samples
        self.skipped += skipped


class RunLog(TrainerCallback):
    """Writes a run's files and tells people how far it is.

    Args:
        folder: the run's; on all processes but the first nothing is written.
        console: where progress is told.
        should_stop: whether the run was asked to end; it does so behind a checkpoint.
    """

    def __init__(
        self, folder: Path, console: Console, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.folder, self.console, self.should_stop = folder, console, should_stop
        self.totals = Totals()
        self.is_stopping = False  # what all processes have agreed on
        self._noted = -math.inf
        self._started = time.monotonic()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Take back what lies beyond the checkpoint, and count on from there."""
        self.totals = read_totals(self.folder, state.global_step)
        self._started = time.monotonic() - self.totals.seconds
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (LOG, SKIPPED):
                take_back(self.folder / name, state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """End behind a checkpoint where that is asked for; every checkpoint has its line."""
        if self.is_stopping:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write a line, and tell about it from time to time.

        Raises:
            Vla2Error: the loss is no number any more.
        """
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self.totals.seconds = time.monotonic() - self._started
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            **{key: getattr(self.totals, key) for key in ("tokens", "samples", "skipped")},
            "seconds": round(self.totals.seconds, 3),
        }
        if not math.isfinite(line["loss"]):
            raise Vla2Error(
                f"the loss is {line['loss']} at step {state.global_step}; take a smaller "
                "learning_rate, or float32, in a new folder"
            )
        append_lines(self.folder / LOG, [line])
        self._note(line, state.max_steps)

    def skip(self, step: int, samples: Iterable[tuple[str, str]]) -> None:
        """Write down samples that could not be used: (id, reason)."""
        lines = [{"step": step, "id": id_, "reason": reason} for id_, reason in samples]
        append_lines(self.folder / SKIPPED, lines)

    def _note(self, line: dict[str, Any], max_steps: int) -> None:
        now = time.monotonic()
        if now - self._noted < NOTE_INTERVAL_S and line["step"] != max_steps:
            return
        self._noted = now
        seconds = max(now - self._started, 1e-9)
        rate = line["samples"] / seconds
        left = (max_steps - line["step"]) * seconds / line["step"]
        skipped = f", {line['skipped']:,} skipped" if line["skipped"] else ""
        self.console.note(
            f"step {line['step']:,} of {max_steps:,}: loss {line['loss']:.4f}, "
            f"{format_rate(max(rate, 1e-9))} samples, {format_duration(left)} left{skipped}"
        )


def read_totals(folder: Path, last_step: int | None = None) -> Totals:
    """Read what a run has been given, up to a step."""
    lines = list(read_lines(folder / LOG, last_step))
    if not lines:
        return Totals()
    return Totals(**{field.name: lines[-1][field.name] for field in fields(Totals)})


def read_lines(path: Path, last_step: int | None = None) -> Iterator[dict[str, Any]]:
    """Read a file of JSON Lines, up to a step; an unfinished last line is none."""
    if not path.exists():
        return
    # not `splitlines`: a string in JSON may hold other line breaks as they are
    for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
        line = json.loads(text)
        if last_step is None or line["step"] <= last_step:
            yield line


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines behind those of a file of JSON Lines."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_as_text, lines))


def take_back(path: Path, last_step: int) -> None:
    """Leave of a file of JSON Lines what is not beyond a step."""
    replace_text(path, "".join(map(_as_text, read_lines(path, last_step))))


def _as_text(line: Mapping[str, Any]) -> str:
    # a lone surrogate becomes the JSON escape of itself
    text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return f"{text}\n"


def plot_loss(folder: Path) -> None:
    """Draw the losses of log.jsonl into loss.png."""
    lines = list(read_lines(folder / LOG))
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#4c72b0", alpha=0.35, linewidth=1)
    axes.plot(steps, _smooth(losses), color="#4c72b0", linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("loss; thick: running mean")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / PLOT, dpi=120)


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Average exponentially, without a bias to the start."""
    mean, smooth = 0.0, []
    for number, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smooth.append(mean / (1 - weight**number))
    return smooth
