"""Tensors as files: one place for each key, whole or not there."""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.sounds import tone, write_movie
from tests.tiny import tiny_av_engine, tiny_engine
from vla2cli.api import features
from vla2cli.config import GenerationChoice
from vla2cli.engine import Engine
from vla2cli.errors import UsageError
from vla2cli.inputs import find_items
from vla2cli.jobs import Job
from vla2cli.ledger import read_records
from vla2cli.media.pool import DecodePool
from vla2cli.plan import Sampling, Task
from vla2cli.tensors import (
    DEFAULT_TENSORS,
    LEDGER_NAME,
    TENSORS,
    VISUAL,
    check_tensors,
    parse_tensors,
    run_features,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def clip(tmp_path):
    return shutil.copy(EXAMPLES / "01.mp4", tmp_path / "01.mp4")


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.name != LEDGER_NAME)


def test_two_ranges_of_a_clip_are_two_files_that_both_stay(clip, tmp_path):
    folder, engine = tmp_path / "out", tiny_engine()
    ends = [(0.0, 1.0), (2.0, 3.5), (None, 1.0), (1.234567, 3.0), (1.2345678, 3.0)]
    ranges = [Sampling(8, *range_s) for range_s in ends]
    for sampling in ranges:
        (record,) = features(clip, engine, folder, sampling=sampling)
        tensors = load_file(folder / record["file"])
        assert tensors["frame_indices"].tolist() == record["frames"]["indices"]
    assert files_in(folder) == [
        "01.mp4@-1.safetensors",
        "01.mp4@0-1.safetensors",
        "01.mp4@1.234567-3.safetensors",
        "01.mp4@1.2345678-3.safetensors",
        "01.mp4@2-3.5.safetensors",
    ]
    assert list(features(clip, engine, folder, sampling=ranges[0])) == []


def test_each_question_has_a_file_of_its_own(clip, tmp_path):
    folder, engine = tmp_path / "out", tiny_engine()
    for question in ("What?", "Why?"):
        (record,) = features(clip, engine, folder, tensors="input_ids", question=question)
        assert load_file(folder / record["file"])["input_ids"].min() == -201
    assert len(files_in(folder)) == 2


def test_file_that_is_gone_or_cut_is_made_again(clip, tmp_path):
    folder, engine = tmp_path / "out", tiny_engine()
    (record,) = features(clip, engine, folder)
    assert list(features(clip, engine, folder)) == []
    path = folder / record["file"]
    for spoil in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])):
        spoil(path)
        list(features(clip, engine, folder))
        assert set(load_file(path)) == set(DEFAULT_TENSORS) & set(VISUAL)


def test_settings_of_generation_do_not_matter_where_nothing_is_generated(clip, tmp_path):
    folder, engine = tmp_path / "out", tiny_engine()
    longer = GenerationChoice(max_new_tokens=9)
    assert len(list(features(clip, engine, folder))) == 1
    assert list(features(clip, engine, folder, generation=longer)) == []
    ids = {"tensors": "generated_ids", "generation": longer}
    (record,) = features(clip, engine, folder, **ids)
    assert load_file(folder / record["file"])["generated_ids"].shape == (9,)
    ids["generation"] = GenerationChoice(max_new_tokens=4)
    assert len(list(features(clip, engine, folder, **ids))) == 1


def test_time_of_a_run_begins_with_its_files(clip, tmp_path):
    engine = tiny_engine()
    with DecodePool(1) as pool:
        settings = engine.settings(GenerationChoice())
        job = Job(engine, Task("features"), Sampling(8), settings, pool)
        works = job.plan(find_items([str(clip)]).items).todo
        time.sleep(1)
        began = time.monotonic()
        (record,) = run_features(job, works, tmp_path / "out", ("frame_indices",))
        assert job.stats.elapsed_s <= time.monotonic() - began
    assert record["file"] == "01.mp4.safetensors"


@pytest.mark.parametrize(
    ("slow", "names", "bottleneck"),
    [
        ("vision_features", ("vision_features",), "tower"),
        ("answer", ("vision_features", "generated_ids"), "language"),
    ],
)
def test_stage_that_takes_longest_is_the_bottleneck(
    clip, tmp_path, monkeypatch, slow, names, bottleneck
):
    work = getattr(Engine, slow)

    def sleep(*args):
        time.sleep(2)
        return work(*args)

    monkeypatch.setattr(Engine, slow, sleep)
    engine = Engine(tiny_engine().checkpoint, device="cpu")
    with DecodePool(1) as pool:
        settings = engine.settings(GenerationChoice(max_new_tokens=4))
        job = Job(engine, Task("features"), Sampling(8), settings, pool)
        works = job.plan(find_items([str(clip)]).items).todo
        list(run_features(job, works, tmp_path / "out", names))
    assert job.stats.bottleneck == bottleneck
    assert job.stats.busy_s[bottleneck] >= 2


def test_name_as_long_as_a_file_system_takes_gets_a_file(clip, tmp_path):
    long = tmp_path / ("é" * 125 + ".mp4")  # 254 bytes
    shutil.copy(clip, long)
    (record,) = features(long, tiny_engine(), tmp_path / "out", tensors="frame_indices")
    assert load_file(tmp_path / "out" / record["file"])["frame_indices"].shape == (8,)


def test_bad_file_costs_one_error_record(clip, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.move(clip, folder)
    (folder / "bad.mp4").write_text("no video")
    records = {r["id"]: r for r in features(folder, tiny_engine(), tmp_path / "out")}
    assert records["bad.mp4"]["error"]["kind"] == "decode"
    assert list(records["01.mp4"]["tensors"]) == [n for n in DEFAULT_TENSORS if n in VISUAL]
    assert files_in(tmp_path / "out") == ["01.mp4.safetensors"]
    assert sum(r is not None for _, r, _ in read_records(tmp_path / "out" / LEDGER_NAME)) == 2


def test_tensors_come_in_the_order_of_the_stages():
    assert parse_tensors("generated_ids, pixel_values") == ("pixel_values", "generated_ids")
    assert parse_tensors("all") == tuple(TENSORS)
    with pytest.raises(UsageError, match="'--tensors logits': expected all, or any of frame_ind"):
        parse_tensors("pixel_values,logits")


@pytest.mark.parametrize(
    ("names", "modality", "has_ears", "is_refused"),
    [
        (("fbank",), "auto", False, True),
        (("fbank",), "video", True, True),
        (("fbank",), "av", True, False),
        (("vision_features",), "audio", True, True),
        (("fbank", "vision_features"), "audio", True, False),
        (("input_ids",), "auto", False, False),
    ],
)
def test_tensors_that_no_file_can_have_are_refused(names, modality, has_ears, is_refused):
    engine = tiny_av_engine() if has_ears else tiny_engine()
    with pytest.raises(UsageError, match="makes none of them") if is_refused else nullcontext():
        check_tensors(names, engine, Sampling(8, modality=modality))


def test_video_that_is_only_heard_has_a_file_of_its_own(tmp_path):
    video = write_movie(tmp_path / "a.mp4", ("aac", [tone(440, 2)], 16000))
    engine, out = tiny_av_engine(), tmp_path / "out"
    seen, heard = (
        next(features(video, engine, out, sampling=Sampling(8, modality=modality)))
        for modality in ("auto", "audio")
    )
    assert seen["file"] != heard["file"]
    for record in (seen, heard):
        assert set(load_file(out / record["file"])) == set(record["tensors"])
    assert set(heard["tensors"]) == {"beats_features", "audio_tokens"}
    assert list(features(video, engine, out, sampling=Sampling(8))) == []
