"""Long files in parts: where they are cut, what stays whole, and that the parts are looked at."""

import shutil
from pathlib import Path

import pytest

from tests.sounds import RATE, s16, tone, write_movie, write_wav
from tests.tiny import tiny_av_engine, tiny_engine
from vla2cli import Sampling, caption
from vla2cli.api import features
from vla2cli.config import GenerationChoice
from vla2cli.errors import UsageError
from vla2cli.inputs import Item
from vla2cli.jobs import Job
from vla2cli.ledger import Ledger
from vla2cli.media.pool import DecodePool
from vla2cli.plan import Task
from vla2cli.segments import cut_items
from vla2cli.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = GenerationChoice(max_new_tokens=4)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pool():
    with DecodePool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """A video of 7.2 s whose track lasts 8 s."""
    path = tmp_path_factory.mktemp("movie") / "movie.mp4"
    return write_movie(path, ("aac", [tone(440, 8)], RATE), picture_s=7.2)


def ends(pool, item, every_s, *range_s, **sampling):
    cut, _ = cut_items([item], Sampling(8, *range_s, every_s=every_s, **sampling), pool)
    assert {(part.id, part.path, part.kind) for part in cut} == {(item.id, item.path, item.kind)}
    return [(part.start_s, part.end_s) for part in cut]


@pytest.mark.parametrize(
    ("every_s", "expected"),
    [
        (3.0, [(0, 3), (3, 6), (6, 7.2)]),
        (2.0, [(0, 2), (2, 4), (4, 6), (6, 7.2)]),
        (2.4, [(0, 2.4), (2.4, 4.8), (4.8, 7.2)]),
        (7.0, [(None, None)]),  # 0.2 s more is less than a tenth
        (7.2, [(None, None)]),
        (3.5, [(0, 3.5), (3.5, 7.2)]),
        (1.7, [(0, 1.7), (1.7, 3.4), (3.4, 5.1), (5.1, 6.8), (6.8, 7.2)]),
        (1 / 0.7, [(0, 1.429), (1.429, 2.857), (2.857, 4.286), (4.286, 5.714), (5.714, 7.2)]),
        (1e9, [(None, None)]),
    ],
)
def test_a_rest_below_a_tenth_of_a_segment_joins_the_last_one(pool, movie, every_s, expected):
    assert ends(pool, Item("m", movie, "video"), every_s) == expected


@pytest.mark.parametrize(
    ("range_s", "expected"),
    [
        ((1.25, None), [(1.25, 4.25), (4.25, 7.2)]),
        ((None, 5.0), [(0, 3), (3, 5)]),
        ((0.5, 99.0), [(0.5, 3.5), (3.5, 6.5), (6.5, 7.2)]),
        ((2.0, 5.0), [(None, None)]),  # the range of the command is the segment
        ((9.0, None), [(None, None)]),  # the decoder says that nothing is there
    ],
)
def test_only_the_range_that_is_asked_about_is_cut(pool, movie, range_s, expected):
    assert ends(pool, Item("m", movie, "video"), 3.0, *range_s) == expected


def test_range_of_an_item_is_cut_instead_of_that_of_all(pool, movie):
    part = Item("m", movie, "video", end_s=5.0)
    assert ends(pool, part, 3.0, 6.0, 7.0) == [(0, 3), (3, 5)]


def test_sound_is_cut_by_its_own_length_and_pictures_are_not(pool, movie, tmp_path):
    song = write_wav(tmp_path / "a.wav", [s16(tone(300, 5))], RATE)
    assert ends(pool, Item("s", song, "audio"), 2.0) == [(0, 2), (2, 4), (4, 5)]
    picture = Item("p", str(EXAMPLES / "09.png"), "image")
    assert ends(pool, picture, 2.0) == [(None, None)]
    video = Item("m", movie, "video")
    assert ends(pool, video, 5.0, modality="video")[-1] == (5, 7.2)
    (_, (start_s, end_s)) = ends(pool, video, 5.0, modality="audio")
    assert (start_s, end_s) == (5, pytest.approx(8, abs=0.1))  # AAC comes in blocks


def test_what_cannot_be_read_stays_one_item_and_becomes_one_error(pool, movie, tmp_path):
    for name, data in {"broken.mp4": b"no video", "empty.mp4": b""}.items():
        (tmp_path / name).write_bytes(data)
        assert ends(pool, Item(name, str(tmp_path / name), "video"), 2.0) == [(None, None)]
    shutil.copy(movie, tmp_path / "good.mp4")
    sampling = Sampling(8, every_s=4.0)
    records = list(caption(tmp_path, tiny_engine(), sampling=sampling, generation=SHORT))
    found = {(r["id"], str(r["segment"]), r.get("error", {}).get("kind")) for r in records}
    assert found == {
        ("broken.mp4", "None", "decode"),
        ("empty.mp4", "None", "empty-file"),
        ("good.mp4", "{'start_s': 0.0, 'end_s': 4.0}", None),
        ("good.mp4", "{'start_s': 4.0, 'end_s': 7.2}", None),
    }


def test_file_that_could_not_be_measured_is_an_error_even_if_it_could_be_decoded(
    pool, movie, tmp_path
):
    path, ledger_path = tmp_path / "late.mp4", tmp_path / "out.jsonl"
    path.write_bytes(b"not yet copied")
    engine, sampling = tiny_engine(), Sampling(4, every_s=4.0)
    with Ledger.open(ledger_path) as ledger:
        job = Job(engine, Task("caption"), sampling, engine.settings(SHORT), pool, ledger)
        items, job.unreadable = cut_items([Item("late.mp4", str(path), "video")], sampling, pool)
        shutil.copy(movie, path)
        (record,) = job.run(job.plan(items).todo)
        assert (record["segment"], record["error"]["kind"]) == (None, "decode")
        assert record["error"]["message"] == str(job.unreadable[str(path)])
        # as the file is now, so that a run without --retry-errors leaves it
        assert record["size_bytes"] == path.stat().st_size
        assert job.plan(items).todo == ()
        # now that it can be measured, its parts are what is asked for, and the whole is not
        parts, job.unreadable = cut_items(items, sampling, pool)
        plan = job.plan(parts)
        assert ([work.item for work in plan.todo], plan.failed) == (parts, ())
        assert (len(parts), job.unreadable) == (2, {})
        assert all(record["text"] for record in job.run(plan.todo))
    summary = verify(ledger_path).summary
    assert (summary.done, summary.errors) == (2, 1)  # the old record is still the last of its key


@pytest.mark.parametrize("every_s", [0.0, -1.0, 0.05, float("nan"), float("inf")])
def test_lengths_that_cut_nothing_are_refused(every_s):
    with pytest.raises(UsageError, match=r"'--every .*': at least 0\.1 s are needed"):
        Sampling(8, every_s=every_s)


def test_start_of_the_sound_does_not_go_with_segments():
    with pytest.raises(UsageError, match="with --every each segment is heard from its beginning"):
        Sampling(8, audio_start_s=1.0, every_s=2.0)


def test_segments_are_looked_at_in_the_time_of_the_file_and_done_once(movie, tmp_path):
    ledger, sampling = tmp_path / "out.jsonl", Sampling(4, every_s=3.0)

    def run(sampling):
        return list(
            caption(movie, tiny_engine(), sampling=sampling, generation=SHORT, output=ledger)
        )

    records = {tuple(r["segment"].values()): r for r in run(sampling)}
    assert set(records) == {(0, 3), (3, 6), (6, 7.2)}
    for (start_s, end_s), record in records.items():
        first, *_, last = record["frames"]["timestamps_s"]
        assert start_s - 1 / 25 <= first < last < end_s  # upstream begins a frame before
    assert run(sampling) == []
    assert len(run(Sampling(4))) == 1  # the whole is another record
    # of another length only what is new; the whole file is already there
    assert [r["segment"] for r in run(Sampling(4, every_s=7.0))] == []
    assert {r["segment"]["end_s"] for r in run(Sampling(4, 0.0, every_s=3.6))} == {3.6, 7.2}


def test_each_segment_of_a_sound_is_heard(tmp_path):
    song = write_wav(tmp_path / "a.wav", [s16(tone(300, 5))], RATE)
    sampling = Sampling(8, every_s=2.0)
    records = list(caption(song, tiny_av_engine(), sampling=sampling, generation=SHORT))
    heard = {tuple(r["segment"].values()): r["sound"]["spans_s"] for r in records}
    assert heard == {(0, 2): [[0, 2]], (2, 4): [[2, 4]], (4, 5): [[4, 5]]}


def test_each_segment_has_a_file_of_features(movie, tmp_path):
    sampling = Sampling(4, every_s=4.0)
    made = features(
        movie, tiny_engine(), tmp_path / "out", tensors="frame_indices", sampling=sampling
    )
    assert {record["file"] for record in made} == {
        "movie.mp4@0-4.safetensors",
        "movie.mp4@4-7.2.safetensors",
    }
