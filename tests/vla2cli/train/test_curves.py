"""The picture of the exams holds what their file says."""

import json
import math

import pytest
from PIL import Image

from vla2cli.train.curves import plot_exam, read_shares

KINDS = (
    *("caption", "colour", "count", "direction", "is-sound", "motion", "object"),
    *("order", "place", "scene", "shape", "sound", "when"),
)


def write_exam(path, steps=range(100, 3400, 100)):
    lines = [
        {"step": step, "split": split, "kind": kind, "num": 96, "right": right}
        for step in steps
        for split, most in (("train", 96), ("heldout", 80))
        for kind in KINDS
        for right in [round(most * (1 - math.exp(-step / (500 + 100 * len(kind)))))]
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_shares_are_told_by_kind_and_split(tmp_path):
    path = tmp_path / "exam.jsonl"
    line = {"step": 5, "split": "train", "kind": "when", "num": 8, "right": 2}
    others = {**line, "step": 9, "right": 6}, {**line, "split": "heldout", "right": 0}
    text = "".join(f"{json.dumps(line)}\n" for line in (line, *others))
    path.write_text(text + '{"step": 10, "spl')  # killed while it was written
    assert read_shares(path) == {"when": {"train": [(5, 0.25), (9, 0.75)], "heldout": [(5, 0.0)]}}


@pytest.mark.parametrize("steps", [[50], range(100, 3400, 100)], ids=["one exam", "33 exams"])
def test_picture_is_small_enough_to_ship(steps, tmp_path):
    target = tmp_path / "exam.png"
    plot_exam(write_exam(tmp_path / "exam.jsonl", steps), target)
    assert target.stat().st_size < 60_000
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 800


def test_run_without_an_exam_has_no_curve(tmp_path):
    with pytest.raises(ValueError, match=r"exam\.jsonl' holds no exam"):
        plot_exam(tmp_path / "exam.jsonl", tmp_path / "exam.png")
    assert not (tmp_path / "exam.png").exists()
