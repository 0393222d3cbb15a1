"""Predictions against a pipeline of which all times are known: two stages side by side."""

import random
from dataclasses import dataclass

import pytest

from vla2cli.forecast.predict import predict
from vla2cli.forecast.trial import Mark, Trial

KINDS = ("video", "image", "audio")
LIMIT_S = 20.0
AHEAD = 4  # clips that the tower may be ahead of the language model


@dataclass(frozen=True)
class Clip:
    id: str
    kind: str
    tower_s: float
    language_s: float


def make_clips(number, *, tower, language, seed=7):
    """Clips of three kinds, a third each; the seconds are means, by kind, that vary by half."""
    draw = random.Random(seed)
    return [
        Clip(
            f"{i}.{(kind := draw.choice(KINDS))}",
            kind,
            tower[kind] * draw.uniform(0.5, 1.5),
            language[kind] * draw.uniform(0.5, 1.5),
        )
        for i in range(number)
    ]


class Line:
    """The tower takes one clip after the other, the language model each when it has come.

    From `stop_s` on neither begins with one, so that some clips are encoded for nothing.
    """

    def __init__(self, clips, stop_s=float("inf")):
        self.spans = {"decode": [], "tower": [], "language": []}
        self.ends = []
        tower_s = language_s = 0.0
        for i, clip in enumerate(clips):
            if i >= AHEAD:
                tower_s = max(tower_s, self.spans["language"][i - AHEAD][0])
            if tower_s >= stop_s:
                break
            self.spans["tower"].append((tower_s, tower_s + clip.tower_s))
            tower_s += clip.tower_s
            begin = max(tower_s, language_s)
            language_s = begin + clip.language_s
            self.spans["language"].append((begin, language_s))
            if begin < stop_s:
                self.ends.append(language_s)
        self.spans["language"] = self.spans["language"][: len(self.ends)]
        self.end_s = max(self.ends[-1], self.spans["tower"][-1][1])

    def mark(self, at_s):
        busy = {
            stage: sum(max(0.0, min(end, at_s) - begin) for begin, end in spans)
            for stage, spans in self.spans.items()
        }
        return Mark(at_s, busy, sum(end <= at_s for end in self.ends))


def try_on(clips):
    """Run clips as a trial does."""
    stop_s = Line(clips[:1]).end_s + LIMIT_S
    line = Line(clips, stop_s)
    return Trial(
        records=tuple(
            {"id": c.id, "timings_s": {"encode": c.tower_s, "generate": c.language_s}}
            for c, _ in zip(clips, line.ends)
        ),
        came_s=tuple(line.ends),
        first=line.mark(line.ends[0]),
        last=line.mark(min(stop_s, line.end_s)),
        end=line.mark(line.end_s),
        is_whole=len(line.ends) == len(clips),
    )


def predicted(trial, folder, known=(), **kwargs):
    todo = {kind: sum(clip.kind == kind for clip in folder) for kind in KINDS}
    kinds = {clip.id: clip.kind for clip in known or folder}
    settings = {"start_s": 3.0, "batch": 1, "num_workers": 2, **kwargs}
    return predict(trial, todo, kinds, **settings)


EVEN = dict.fromkeys(KINDS, 0.1)
UNEVEN = {"video": 0.3, "image": 0.02, "audio": 0.1}


@pytest.mark.parametrize(
    ("tower", "language", "bottleneck"),
    [(EVEN, UNEVEN, "language"), (UNEVEN, EVEN, "tower"), (UNEVEN, UNEVEN, None)],
    ids=["language", "tower", "both"],
)
def test_prediction_is_near_the_time_of_the_whole(tower, language, bottleneck):
    clips = make_clips(3000, tower=tower, language=language)
    true_s = 3.0 + Line(clips).end_s
    found = predicted(try_on(clips), clips)
    assert found.seconds == pytest.approx(true_s, rel=0.12)
    assert found.low_s < true_s < found.high_s
    assert found.records_per_s == pytest.approx(len(clips) / true_s, rel=0.12)
    assert bottleneck in (None, found.bottleneck)


def test_kinds_count_as_often_as_they_are_there():
    clips = make_clips(3000, tower=EVEN, language=UNEVEN)
    # the trial met all kinds alike; the folder holds little but pictures
    folder = [clip for clip in clips if clip.kind == "image"] + clips[:100]
    trial = try_on(clips)
    found = predicted(trial, folder, clips)
    few = predicted(trial, clips)
    work = {kind: sum(c.language_s for c in clips if c.kind == kind) for kind in KINDS}
    expected = sum(c.language_s for c in folder) / sum(work.values())
    assert found.seconds / few.seconds == pytest.approx(expected, rel=0.15)


def test_a_trial_of_all_there_is_is_the_time_itself():
    clips = make_clips(9, tower=EVEN, language=EVEN)
    trial = try_on(clips)
    assert trial.is_whole
    found = predicted(trial, clips)
    assert found.seconds == pytest.approx(3.0 + Line(clips).end_s)


def test_a_slow_model_is_predicted_from_the_few_that_came():
    slow = dict.fromkeys(KINDS, 9.0)
    clips = make_clips(200, tower=EVEN, language=slow)
    trial = try_on(clips)
    assert len(trial.records) < 200
    found = predicted(trial, clips, batch=8)
    true_s = Line(clips).end_s + 3.0
    assert found.low_s < true_s < found.high_s
    assert found.high_s / found.seconds > 1.3  # and says that it is not sure


def test_ledger_is_as_long_as_its_lines():
    clips = make_clips(3000, tower=EVEN, language=EVEN)
    trial = try_on(clips)
    line = len(
        '{"id": "1000.video", "timings_s": {"encode": 0.12345678901234567, "generate": '
        "0.12345678901234567}}\n"
    )
    assert predicted(trial, clips).ledger_bytes == pytest.approx(line * len(clips), rel=0.05)


def test_files_that_fail_in_the_trial_cost_nothing_and_break_nothing():
    clips = make_clips(500, tower=EVEN, language=EVEN)
    trial = try_on(clips)
    failed = Trial(
        records=tuple({"id": c["id"], "error": {"message": "x"}} for c in trial.records),
        came_s=trial.came_s,
        first=trial.first,
        last=trial.last,
        end=trial.end,
        is_whole=False,
    )
    assert predicted(failed, clips).seconds > 0
