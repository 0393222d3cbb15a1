"""The media in `examples/`: complete, readable, small, described, as the generator makes them."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
from PIL import Image

from vla2cli.world.words import caption

FOLDER = Path(__file__).parent.parent / "examples"
NAMES = [f"{number:02}.mp4" for number in range(1, 9)]
SILENT = "08.mp4"
LISTED = {"captions.json", "make_examples.py", "show.py", "09.png", *NAMES}


def load(name: str) -> ModuleType:
    # by path: `examples` is no package, and another one of that name may be installed
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load("make_examples")


@pytest.fixture(scope="module")
def chosen(generator):
    return generator.choose()


@pytest.fixture(scope="module")
def truths():
    return json.loads((FOLDER / "captions.json").read_text(encoding="utf-8"))


def test_every_frame_of_a_clip_decodes():
    assert sorted(path.name for path in FOLDER.glob("*.mp4")) == NAMES
    for name in NAMES:
        with av.open(str(FOLDER / name)) as container:
            sizes = [(frame.width, frame.height) for frame in container.decode(video=0)]
        assert sizes == [(320, 320)] * 50


@pytest.mark.parametrize("name", NAMES)
def test_sound_is_as_long_as_the_picture_and_can_be_heard(name):
    with av.open(str(FOLDER / name)) as container:
        assert bool(container.streams.audio) == (name != SILENT)
        if not container.streams.audio:
            return
        rate = container.streams.audio[0].rate
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    # AAC comes in blocks of 1024 samples
    assert 0 <= len(sound) - 5 * rate <= 1024
    # loud enough, and not clipped; compression may overshoot a little
    assert np.sqrt(np.mean(sound**2)) > 0.02
    assert np.abs(sound).max() < 1.1


@pytest.mark.parametrize("name", NAMES)
def test_clip_shows_what_the_generator_draws(name, chosen):
    with av.open(str(FOLDER / name)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    drawn = chosen[name].frames([(idx + 0.5) / 50 for idx in range(50)], 320)
    assert np.abs(np.stack(frames).astype(int) - drawn).mean() < 4  # of 255


def test_still_is_what_the_generator_draws(generator, chosen):
    with Image.open(FOLDER / "09.png") as still:
        np.testing.assert_allclose(still, generator.still(chosen["09.png"]), atol=2)


def test_captions_are_those_of_the_clips(chosen, truths):
    assert truths == {name: caption(chosen[name].facts) for name in NAMES}


def test_clips_cover_every_plot_and_repeat_nothing(chosen):
    facts = [chosen[name].facts for name in NAMES]
    assert {f.plot for f in facts} == {"moves", "stands", "order", "count"}
    things = [thing.name for f in facts for thing in f.things]
    assert len(set(things)) == len(things)
    assert len({f.sound for f in facts}) == len(facts)
    assert all(clip.split == "heldout" for clip in chosen.values())


def test_clips_play_before_they_are_fully_loaded():
    for name in NAMES:
        data = (FOLDER / name).read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")


def test_examples_stay_under_two_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 2_000_000


def test_readme_names_every_file_and_says_every_caption(truths):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == LISTED | {"README.md"}
    assert [name for name in LISTED if f"`{name}`" not in readme] == []
    for name, text in truths.items():
        seen, heard = text.removesuffix(".").split(". ")
        heard = "No sound track" if name == SILENT else heard
        assert f"| `{name}` | {seen}. | {heard}. |" in readme


def test_show_prints_truth_caption_and_time_and_counts_what_is_true(tmp_path, capsys, truths):
    records = [
        {"id": "01.mp4", "task": "caption", "text": "An older one.", "timings_s": {"read": 1}},
        {"id": "01.mp4", "task": "caption", "text": truths["01.mp4"], "timings_s": {"read": 0.25}},
        {"id": "02.mp4", "task": "caption", "text": "A goat.", "timings_s": None},
        {"id": "03.mp4", "task": "caption", "error": {"message": "no file"}, "timings_s": None},
        {"id": "04.mp4", "task": "ask", "text": truths["04.mp4"], "timings_s": None},
        {"id": "09.png", "task": "caption", "text": "A circle.", "timings_s": None},
    ]
    ledger = tmp_path / "captions.jsonl"
    ledger.write_text("".join(json.dumps(record) + "\n" for record in records))
    load("show").main(ledger, truths)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        f"01.mp4    truth    {truths['01.mp4']}",
        f" 0.25 s  = caption  {truths['01.mp4']}",
        f"02.mp4    truth    {truths['02.mp4']}",
        " 0.00 s  x caption  A goat.",
        f"03.mp4    truth    {truths['03.mp4']}",
        " 0.00 s  x caption  no file",
    ]
    assert lines[-1] == "1 of 8 captions are exactly true"
    assert len(lines) == 17
