"""Sound, as a user meets it: real processes on real and on made clips."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import EXAMPLES, together
from tests.goldens import AV_CHECKPOINT, AV_RUNS, about_av, golden_audio, media, tensors_of_av
from tests.sounds import RATE, patch_codec, s16, spoil, tone, write_movie, write_wav
from vla2_models.miniature import WITH_EARS_ID, write_miniature

# from raw media, through PyAV: see golden/README-audio.md
ATOL = {"beats_features": 2e-2, "audio_tokens": 1e-2, "inputs_embeds": 1e-2, "first_logits": 1e-2}
MODALITY = {"audio": "audio", "video": "video"}  # of the runs; the others are av


def golden_flags(run):
    folder = golden_audio(f"{AV_CHECKPOINT}/config.json").parent
    modality = MODALITY.get(run, "av")
    model = ("--model", folder, "--hub-dir", folder.parent)
    return (*model, "--modality", modality, "--max-new-tokens", "20")


def test_features_of_raw_media_equal_the_reference(vla2, tmp_path):
    def features(run):
        about = about_av(run)
        asked = ("--tensors", "all", "--question", about["question"])
        return vla2(
            "features", media(about["media"]), "-o", tmp_path / run, *golden_flags(run), *asked
        )

    done = together(*(partial(features, run) for run in AV_RUNS))
    for run, result in zip(AV_RUNS, done, strict=True):
        assert result.code == 0, result.stderr
        (path,) = (tmp_path / run).glob("*.safetensors")
        found, stored = load_file(path), tensors_of_av(run)
        assert found["input_ids"].tolist() == about_av(run)["input_ids"]
        assert found["generated_ids"].tolist() == about_av(run)["output_ids"], run
        assert ("fbank" in found) is ("fbank_bf16" in stored)
        assert ("pixel_values" in found) is ("pixel_values" in stored)
        if "fbank" in found:
            flips = (found["fbank"] != stored["fbank_bf16"]).float().mean()
            print(f"\n{run:10} fbank values that differ: {flips:.1e}", end="")  # noqa: T201
            assert flips <= 1e-3
        expected = {
            "beats_features": stored.get("beats_features"),
            "audio_tokens": stored.get("audio_tokens"),
            "inputs_embeds": stored["inputs_embeds"][0],
            "first_logits": stored["logits_first"],
        }
        for name, tensor in expected.items():
            if tensor is not None:
                torch.testing.assert_close(
                    found[name], tensor, atol=ATOL[name], rtol=0, msg=f"{run}: {name}"
                )


def test_answers_about_raw_media_equal_the_reference(vla2):
    def ask(run):
        about = about_av(run)
        return vla2("ask", media(about["media"]), about["question"], "--json", *golden_flags(run))

    done = together(*(partial(ask, run) for run in AV_RUNS))
    for run, result in zip(AV_RUNS, done, strict=True):
        assert result.code == 0, result.stderr
        (record,) = result.records
        assert record["text"] == about_av(run)["text"]
        assert record["modality"] == MODALITY.get(run, "av")
        assert record["tokens"]["visual"] == (0 if run == "audio" else 32)
        assert record["tokens"]["audio"] == (0 if run == "video" else 1496)
        assert ("no-audio-track" in record["flags"]) is (run == "av_silent")


# a model with ears, and files of every kind


@pytest.fixture(scope="module")
def ears(tmp_path_factory):
    """The flags of a miniature that hears 4 s at once, in pieces of 2 s."""
    hub_dir = tmp_path_factory.mktemp("ears")
    write_miniature(
        hub_dir,
        has_ears=True,
        mm_audio_window_s=4,
        mm_audio_num_clips=2,
        mm_audio_clip_s=2,
        hidden_size=32,
        num_hidden_layers=1,
    )
    return ("--model", WITH_EARS_ID, "--hub-dir", hub_dir)


NUM_AUDIO = ((4 * RATE - 400) // 160 + 1) // 16 * 8  # tokens of 4 s


@pytest.fixture
def files(tmp_path):
    """A video with sound and one without, a picture and a sound of 4 s."""
    folder = tmp_path / "files"
    folder.mkdir()
    write_movie(folder / "talk.mp4", ("aac", [tone(440, 3)], RATE), picture_s=3)
    write_movie(folder / "mute.mp4")
    shutil.copy(EXAMPLES / "09.png", folder / "still.png")
    write_wav(folder / "song.wav", [s16(tone(300, 4)), s16(tone(600, 4))], RATE)
    return folder


@pytest.mark.parametrize(
    ("modality", "expected"),
    [
        (
            "auto",
            {"talk.mp4": "av", "mute.mp4": "video", "still.png": "image", "song.wav": "audio"},
        ),
        ("av", {"talk.mp4": "av", "mute.mp4": "av"}),
        ("video", {"talk.mp4": "video", "mute.mp4": "video"}),
        ("image", {"still.png": "image"}),
        ("audio", {"song.wav": "audio"}),
    ],
)
def test_records_say_what_was_used(vla2, files, ears, modality, expected):
    done = vla2("caption", files, "--modality", modality, *ears)
    assert done.code == 0, done.stderr
    records = {record["id"]: record for record in done.records}
    assert {id: record["modality"] for id, record in records.items()} == expected
    for id, record in records.items():
        medium = record["modality"].replace("av", "video")
        assert record["question"] == f"Please describe the {medium} in detail."
        is_heard = record["modality"] in ("audio", "av")
        assert record["tokens"]["audio"] == (NUM_AUDIO if is_heard else 0)
        assert (record["tokens"]["visual"] > 0) is (record["modality"] != "audio")
        assert (record["frames"] is None) is (record["modality"] == "audio")
        assert ("sound" in record) is is_heard
        is_missed = id == "mute.mp4" and modality in ("auto", "av")
        assert ("no-audio-track" in record["flags"]) is is_missed
    if modality == "av":
        assert records["mute.mp4"]["sound"]["spans_s"] == []
        (first, second) = records["talk.mp4"]["sound"]["spans_s"]
        assert first[0] == 0
        assert first[1] - first[0] == second[1] - second[0] == 2


def test_named_video_is_listened_to_alone(vla2, files, ears):
    done = vla2("ask", files / "talk.mp4", "What?", "--modality", "audio", "--json", *ears)
    (record,) = done.records
    assert record["modality"] == "audio"
    assert record["tokens"]["visual"] == 0
    folder = vla2("caption", files / "..", "--modality", "image", *ears)
    assert folder.code == 0
    (files / "song.wav").unlink()
    done = vla2("caption", files, "--modality", "audio", *ears)
    assert done.code == 4
    assert "holds no audio file" in done.stderr
    assert done.stderr.rstrip().endswith("name a video itself to hear only its sound")


def test_range_and_start_choose_what_is_heard(vla2, tmp_path, files, ears):
    def spans(path, *flags):
        (record,) = vla2("caption", files / path, "--json", *flags, *ears).records
        return record.get("segment"), record["sound"]["spans_s"]

    cases = [
        ("song.wav", ()),
        ("song.wav", ("--start", "1", "--end", "3")),
        ("song.wav", ("--audio-start", "1.5")),
        ("song.wav", ("--start", "1", "--end", "3", "--audio-range", "whole")),
        ("talk.mp4", ("--start", "1", "--end", "2")),
        ("talk.mp4", ("--start", "1", "--end", "2", "--audio-range", "whole")),
    ]
    found = together(*(partial(spans, path, *flags) for path, flags in cases))
    part = {"start_s": 1.0, "end_s": 3.0}
    assert found[:4] == [
        (None, [[0, 4]]),
        (part, [[1, 3]]),
        (None, [[1.5, 4]]),
        (None, [[0, 4]]),
    ]
    segment, within = found[4]
    assert segment == found[5][0] == {"start_s": 1.0, "end_s": 2.0}
    assert within == [[pytest.approx(1, abs=1e-4), pytest.approx(2, abs=1e-4)]] * 2
    # two pieces of a track of 3 s: the second begins half a second in
    assert found[5][1][1] == [pytest.approx(0.5, abs=0.01), pytest.approx(2.5, abs=0.01)]


def test_other_sound_is_asked_about_again(vla2, tmp_path, files, ears):
    ledger = tmp_path / "out.jsonl"

    def redone(*flags):
        before = ledger.read_text().count("\n") if ledger.exists() else 0
        done = vla2("caption", files, "-o", ledger, *flags, *ears)
        assert done.code == 0, done.stderr
        lines = ledger.read_text().splitlines()[before:]
        return {json.loads(line)["id"] for line in lines}

    assert len(redone()) == 4
    assert redone() == set()
    assert redone("--audio-start", "1") == {"song.wav"}
    assert redone("--modality", "av") == {"talk.mp4", "mute.mp4"}
    assert redone("--modality", "video") == {"talk.mp4", "mute.mp4"}


def test_preview_tells_which_files_are_heard(vla2, files, ears):
    done = vla2("caption", files, "--dry-run", *ears)
    heard = {line["id"]: line.get("sound") for line in done.records}
    assert heard == {"talk.mp4": True, "mute.mp4": False, "still.png": None, "song.wav": True}
    durations = {line["id"]: line.get("duration_s") for line in done.records}
    assert durations["song.wav"] == pytest.approx(4)


def test_question_may_not_hold_the_place_of_its_own_medium(vla2, files, ears):
    asked = [("song.wav", "<audio>", 2), ("talk.mp4", "<video>", 2), ("talk.mp4", "<audio>", 0)]
    calls = [partial(vla2, "ask", files / path, f"Is it {word}?", *ears) for path, word, _ in asked]
    for done, (_, word, code) in zip(together(*calls), asked, strict=True):
        assert done.code == code, done.stderr
        assert (f"holds '{word}'" in done.stderr) is bool(code)


def test_model_without_ears_says_so_once(vla2, files):
    done = vla2("caption", files)
    assert {record["id"] for record in done.records} == {"talk.mp4", "mute.mp4", "still.png"}
    assert all(record["tokens"]["audio"] == 0 for record in done.records)
    assert all("no-audio-track" not in record["flags"] for record in done.records)
    assert "1 audio file skipped (this model has no audio branch; --modality audio" in done.stderr
    calls = [("--modality", "av"), ("--audio-start", "1"), ("--audio-range", "whole")]
    for flags, done in zip(
        calls, together(*(partial(vla2, "caption", files, *flags) for flags in calls)), strict=True
    ):
        assert done.code == 2
        assert done.stderr.splitlines()[-1].startswith(f"vla2: {flags[0]}")
        assert "needs a model with an audio branch" in done.stderr


def test_features_give_what_a_file_has(vla2, tmp_path, files, ears):
    done = vla2("features", files, "-o", tmp_path / "out", *ears)
    assert done.code == 0, done.stderr
    visual = {"frame_indices", "timestamps_s", "vision_features", "projector_tokens"}
    audio = {"beats_features", "audio_tokens"}
    wanted = {
        "talk.mp4": visual | audio,
        "mute.mp4": visual,
        "still.png": visual,
        "song.wav": audio,
    }
    for id, names in wanted.items():
        assert set(load_file(tmp_path / "out" / f"{id}.safetensors")) == names
    done = vla2("features", files, "-o", tmp_path / "sound", "--tensors", "fbank", *ears)
    assert done.code == 3
    lines = (tmp_path / "sound/features.jsonl").read_text().splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    kinds = {id: (record.get("error") or {}).get("kind") for id, record in records.items()}
    assert kinds == {
        "talk.mp4": None,
        "song.wav": None,
        "mute.mp4": "no-tensors",
        "still.png": "no-tensors",
    }
    assert records["song.wav"]["tensors"] == {"fbank": [1, 398, 128]}


# odd sound: a record each, flagged rightly

AAC = ("aac", [tone(440, 2)], RATE)
# name -> how the file is made, and its flags or the kind of its error
ODD = {
    "51.wav": (lambda p: write_wav(p, [s16(tone(100 * i, 1)) for i in range(1, 7)]), []),
    "51.mp4": (lambda p: write_movie(p, ("aac", [tone(440, 2, 48000)] * 6, 48000)), []),
    "8k.wav": (lambda p: write_wav(p, [s16(tone(300, 1, 8000))], 8000), []),
    "96k.wav": (lambda p: write_wav(p, [s16(tone(300, 1, 96000))], 96000), []),
    "24bit.wav": (lambda p: write_wav(p, [tone(300, 1) * 2**23], kind="s24"), []),
    "loud.wav": (lambda p: write_wav(p, [7 * tone(300, 1)], kind="f32"), []),
    "11ms.wav": (lambda p: write_wav(p, [s16(tone(300, 0.011))]), ["short-audio"]),
    "damaged.mp4": (lambda p: spoil(write_movie(p, AAC), 10, 14), ["short-audio"]),
    "two.mkv": (lambda p: write_movie(p, AAC, ("aac", [tone(880, 2)] * 2, RATE)), []),
    "longer.mp4": (lambda p: write_movie(p, AAC, picture_s=1), []),
    "shorter.mp4": (lambda p: write_movie(p, AAC, picture_s=4), ["short-audio"]),
    "mute.mp4": (lambda p: write_movie(p), ["no-audio-track"]),
    "unreadable.mp4": (lambda p: patch_codec(write_movie(p, AAC)), ["no-audio-track"]),
    "text.wav": (lambda p: p.write_text("no sound"), "decode"),
    "nan.wav": (lambda p: write_wav(p, [np.full(RATE, np.nan)], kind="f32"), "decode"),
    "empty.mp3": (lambda p: p.write_bytes(b""), "empty-file"),
}


@pytest.mark.parametrize("modality", ["auto", "av"])
def test_odd_sound_costs_a_record_each(vla2, tmp_path, ears, modality):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, (make, _) in ODD.items():
        make(folder / name)
    done = vla2("caption", folder, "--modality", modality, *ears)
    records = {record["id"]: record for record in done.records}
    is_wanted = {name: modality == "auto" or not name.endswith(("wav", "mp3")) for name in ODD}
    assert records.keys() == {name for name in ODD if is_wanted[name]}
    assert len(done.records) == len(records)
    assert done.code == (3 if modality == "auto" else 0)
    for name, record in records.items():
        expected = ODD[name][1]
        if isinstance(expected, str):
            assert record["error"]["kind"] == expected, name
            continue
        assert record.get("error") is None, name
        flags = [flag for flag in record["flags"] if flag.endswith(("-audio", "-track", "-video"))]
        assert flags == expected, name
        is_heard = modality == "av" or "no-audio-track" not in flags
        assert record["tokens"]["audio"] == (NUM_AUDIO if is_heard else 0), name
