"""Clips as files: read back by the loader that a model's clips go through."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from vla2_models.sound import SoundWindow
from vla2cli.cli import main
from vla2cli.errors import UsageError, Vla2Error
from vla2cli.media.frames import probe, read_frames
from vla2cli.media.records import SoundRequest
from vla2cli.world.clip import WorldClip
from vla2cli.world.encode import encode, has_track
from vla2cli.world.write import DATA, MANIFEST, MARK, World, write_world

WORLD = World(seed=9, split="heldout", count=6)
WHOLE = SoundRequest(SoundWindow(duration_s=5, num_clips=1, clip_s=5), is_required=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "clips"
    assert list(write_world(WORLD, path)) == [name for name, _ in WORLD.clips()]
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["world", *map(str, arguments)])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def entries(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_loader_sees_what_was_drawn(folder):
    for name, clip in WORLD.clips():
        path = str(folder / name)
        found = probe(path, "video")
        assert (found.num_total, found.fps, found.duration_s) == (50, 10, 5)
        assert (found.width, found.height) == (320, 320)
        frames = read_frames(path, "video", num_frames=8)
        drawn = clip.frames([(idx + 0.5) / 50 for idx in frames.indices], 320)
        # of 255; H.264 at half the resolution of colour
        assert np.abs(np.stack(frames.images).astype(int) - drawn).mean() < 4


def test_loader_hears_what_was_made(folder):
    for name, clip in WORLD.clips():
        frames = read_frames(str(folder / name), "video", num_frames=1, sound=WHOLE)
        assert frames.flags == (() if has_track(clip) else ("no-audio-track",))
        heard, made = frames.sound.waveform.astype(float), clip.track().astype(float)
        assert heard.shape == made.shape == (5 * 16000,)
        if clip.facts.sound:
            # the same at the same time: a shift by one sample would show
            assert np.corrcoef(heard, made)[0, 1] > 0.95
            assert frames.sound.duration_s == pytest.approx(5, abs=1024 / 16000)
        else:
            assert np.abs(heard - made).max() < 300


def test_a_third_of_the_silent_clips_has_no_track(tmp_path):
    silent = [c for _, c in World(0, "train", 1500).clips() if c.facts.sound is None]
    share = np.mean([not has_track(clip) for clip in silent])
    assert abs(share - 1 / 3) < 4 * (2 / 9 / len(silent)) ** 0.5  # four standard deviations
    for with_track in (True, False):
        clip = next(clip for clip in silent if has_track(clip) is with_track)
        encode(clip, tmp_path / "a.mp4")
        assert probe(str(tmp_path / "a.mp4"), "video").has_sound is with_track


def control(path, **kind):
    list(write_world(replace(WORLD, **kind), path))
    return path


def test_muted_clips_differ_in_nothing_but_sound(folder, tmp_path):
    muted = control(tmp_path / "muted", is_muted=True)
    for name, clip in WORLD.clips():
        seen, unmuted = (
            read_frames(str(path / name), "video", num_frames=8, sound=WHOLE)
            for path in (muted, folder)
        )
        assert not seen.sound.waveform.any()
        assert np.array_equal(seen.images, unmuted.images)
        assert seen.flags == (() if has_track(clip) else ("no-audio-track",))
    assert (muted / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_shuffled_clips_hold_the_same_frames_in_an_order_of_their_own(folder, tmp_path):
    shuffled = control(tmp_path / "shuffled", is_shuffled=True)
    orders = []
    for name, clip in WORLD.clips():
        drawn = clip.frames([(idx + 0.5) / 50 for idx in range(50)], 320)[:, ::8, ::8].astype(int)
        mixed = read_frames(str(shuffled / name), "video", num_frames=32, sound=WHOLE)
        straight = read_frames(str(folder / name), "video", num_frames=1, sound=WHOLE)
        if clip.facts.plot == "moves":
            found = np.stack(mixed.images)[:, ::8, ::8].astype(int)
            apart = np.abs(found[:, None] - drawn).mean((2, 3, 4))  # (32 found, 50 drawn)
            orders.append(apart.argmin(1))
        assert np.array_equal(mixed.sound.waveform, straight.sound.waveform)
    assert len(orders) > 1
    for order in orders:
        assert len(set(order)) > 30  # of 32; neighbours look much alike to a codec
        assert abs(np.corrcoef(order, np.arange(32))[0, 1]) < 0.6
    assert not np.array_equal(orders[0], orders[1])
    assert (shuffled / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_controls_are_nothing_to_learn_from(tmp_path, capsys):
    arguments = ("-o", tmp_path / "a", "--count", 1, "--seed", 4, "--mute", "--shuffle")
    code, out, err = run(capsys, *arguments, "--workers", 1)
    assert (code, out) == (0, "")
    assert "1 train clip of seed 4, muted, shuffled" in err
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"00000.mp4", MANIFEST, MARK}


def test_files_are_small(folder):
    for name, _ in WORLD.clips():
        assert 5_000 < (folder / name).stat().st_size < 150_000


def test_training_data_has_the_public_form(folder):
    data = json.loads((folder / DATA).read_text(encoding="utf-8"))
    assert len({entry["id"] for entry in data}) == len(data)
    assert {entry["video"] for entry in data} == {name for name, _ in WORLD.clips()}
    for entry in data:
        assert set(entry) == {"id", "video", "conversations"}
        human, gpt = entry["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<video>\n")
        assert human["value"].count("<video>") == 1


def test_manifest_asks_each_question_once_and_choices_apart(folder):
    lines = entries(folder / MANIFEST)
    data = json.loads((folder / DATA).read_text(encoding="utf-8"))
    plain = [line for line in lines if line["kind"] != "choice"]
    assert [(e["video"], *(turn["value"] for turn in e["conversations"])) for e in data] == [
        (line["path"], f"<video>\n{line['question']}", line["answer"]) for line in plain
    ]
    assert {line["path"] for line in plain if line["question"].startswith("Please describe")} == {
        name for name, _ in WORLD.clips()
    }
    # id and question tell the records of a ledger from each other
    keys = {(line.get("id", line["path"]), line["question"]) for line in lines}
    assert len(keys) == len(lines)
    for line in lines:
        assert ("choices" in line) is (line["kind"] == "choice")
        assert line["answer"] in line.get("choices", [line["answer"]])


def test_every_plain_question_with_choices_is_also_asked_as_a_choice(folder):
    lines = entries(folder / MANIFEST)
    for name, clip in WORLD.clips():
        choices = [e for e in lines if e["path"] == name and e["kind"] == "choice"]
        assert [(e["question"], tuple(e["choices"])) for e in choices] == [
            (q.text, q.choices) for q in clip.questions() if q.choices
        ]


def test_processes_and_other_runs_write_the_same_bytes(folder, tmp_path, capsys):
    arguments = ("-o", tmp_path / "b", "--count", 6, "--seed", 9, "--split", "heldout")
    code, out, err = run(capsys, *arguments, "--workers", 2)
    assert (code, out) == (0, "")
    assert err.count("\n") == 1
    assert "6 heldout clips of seed 9" in err
    assert contents(tmp_path / "b") == contents(folder)


def test_a_clip_gives_the_same_bytes_each_time(tmp_path):
    # x264 decides some of a clip's blocks anew each time, unless it is kept from it
    clip = WorldClip(3, 5, "train")
    written = set()
    for _ in range(20):
        encode(clip, tmp_path / "clip.mp4")
        written.add((tmp_path / "clip.mp4").read_bytes())
    assert len(written) == 1


def test_more_clips_begin_with_the_same(folder, tmp_path):
    list(write_world(World(9, "heldout", 2), tmp_path / "a"))
    first = contents(tmp_path / "a")
    for name in ("00000.mp4", "00001.mp4"):
        assert first[name] == (folder / name).read_bytes()
    assert (folder / MANIFEST).read_bytes().startswith(first[MANIFEST])


def test_quiet_says_nothing(tmp_path, capsys):
    assert run(capsys, "-o", tmp_path / "a", "--count", 1, "-q", "--workers", 1) == (0, "", "")


def test_folder_that_holds_something_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    code, out, err = run(capsys, "-o", tmp_path, "--count", 1)
    assert (code, out) == (2, "")
    assert f"'{tmp_path}' is not empty" in err
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_force_removes_only_what_was_written(tmp_path):
    list(write_world(World(0, "train", 3), tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "1.mp4").write_text("mine too")
    list(write_world(World(0, "train", 1), tmp_path, force=True))
    names = {"00000.mp4", DATA, MANIFEST, MARK, "notes.txt", "1.mp4"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "1.mp4").read_text() == "mine too"


@pytest.mark.parametrize("name", ["1066674784.mp4", DATA, MANIFEST])
def test_force_never_replaces_what_another_wrote(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    code, out, err = run(capsys, "-o", tmp_path, "--count", 1, "--force")
    assert (code, out) == (2, "")
    assert f"has a '{name}' that was not written by vla2 world" in err
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-o", "a", "--count", "0"], "'--count'"),
        (["-o", "a", "--count", "many"], "'many'"),
        (["-o", "a", "--seed", "-1"], "'--seed'"),
        (["-o", "a", "--split", "test"], "'test' is not one of 'train', 'heldout'"),
        (["-o", "a", "--workers", "0"], "'--workers'"),
        (["-o", "file"], "'file' cannot be written: file exists"),
        (["-o", "file/a"], "'file/a' cannot be written: not a directory"),
        ([], "clips need a folder: -o DIR"),
        (["-o", "a", "score", "b", "c"], "'-o a' does not go with score"),
        (["-o", "a", "more"], "No such command 'more'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert line in err
    assert err.startswith("vla2: ")
    assert err.count("\n") == 1
    assert contents(tmp_path) == {"file": b"mine"}


def test_negative_seed_is_refused_from_python_too(tmp_path):
    with pytest.raises(ValueError, match="non-negative"):
        list(write_world(World(-1, "train", 1), tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_failure_takes_away_what_was_written(tmp_path):
    written = write_world(World(0, "train", 3), tmp_path / "a")
    next(written)
    (tmp_path / "a/00001.mp4").mkdir()  # in the way
    with pytest.raises(Vla2Error, match=r"cannot write '.*00001\.mp4': is a directory"):
        list(written)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"00001.mp4"}


def test_reader_that_leaves_takes_the_rest_away(tmp_path):
    written = write_world(World(0, "train", 3), tmp_path / "a")
    next(written)
    written.close()
    assert not (tmp_path / "a").exists()


def test_end_from_outside_leaves_nothing_and_no_process(tmp_path):
    folder = tmp_path / "a"
    command = [sys.executable, "-m", "vla2cli", "world", "-o", str(folder), "--count", "2000"]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "00003.mp4").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    # read to its end: a process that stayed would hold it open
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err == "vla2: ended by SIGTERM; nothing was written\n"
    assert not folder.exists()


def test_unwritable_folder_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="cannot be written"):
        list(write_world(WORLD, tmp_path / "file"))
