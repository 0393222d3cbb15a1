"""The media in `examples/`: complete, readable, small, described, as the generator draws them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent / "examples"
# frames = duration x frame rate, from the table in examples/README.md
CLIPS = {
    "01.mp4": (320, 240, 100, True),
    "02.mp4": (320, 320, 96, True),
    "03.mp4": (240, 320, 120, True),
    "04.mp4": (320, 180, 125, False),
    "05.mp4": (300, 300, 96, False),
    "06.mp4": (320, 240, 45, True),
    "07.mp4": (240, 320, 135, False),
    "08.mp4": (384, 216, 135, True),
}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    # by path: `examples` is no package, and another one of that name may be installed
    spec = importlib.util.spec_from_file_location("make_examples", FOLDER / "make_examples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_at_least_eight_clips_are_here():
    assert sorted(path.name for path in FOLDER.glob("*.mp4")) == sorted(CLIPS)
    assert len(CLIPS) >= 8


@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_of_a_clip_decodes(name):
    width, height, num_frames, _ = CLIPS[name]
    with av.open(str(FOLDER / name)) as container:
        sizes = [(frame.width, frame.height) for frame in container.decode(video=0)]
    assert sizes == [(width, height)] * num_frames


@pytest.mark.parametrize("name", CLIPS)
def test_sound_is_as_long_as_the_picture_and_can_be_heard(name):
    with av.open(str(FOLDER / name)) as container:
        assert bool(container.streams.audio) == CLIPS[name][3]
        if not container.streams.audio:
            return
        video = container.streams.video[0]
        duration_s = float(video.duration * video.time_base)
        rate = container.streams.audio[0].rate
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    # AAC comes in blocks of 1024 samples, with up to two of padding
    assert abs(len(sound) - duration_s * rate) <= 2 * 1024
    # loud enough, and not clipped; compression may overshoot a little
    assert np.sqrt(np.mean(sound**2)) > 0.02
    assert np.abs(sound).max() < 1.1


@pytest.mark.parametrize("name", CLIPS)
def test_clip_shows_what_the_generator_draws(name, generator):
    clip = {clip.name: clip for clip in generator.CLIPS}[name]
    with av.open(str(FOLDER / name)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for idx in (0, len(frames) // 2, len(frames) - 1):
        error = np.abs(frames[idx].astype(float) - clip.frame(idx)).mean()
        assert error < 6, f"frame {idx} is {error:.1f} of 255 away from the drawing"


def test_still_is_what_the_generator_draws(generator):
    with Image.open(FOLDER / "09.png") as still:
        np.testing.assert_allclose(still, generator.STILL.frame(0), atol=2)


def test_clips_play_before_they_are_fully_loaded():
    for name in CLIPS:
        data = (FOLDER / name).read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")


def test_examples_stay_under_two_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 2_000_000


def test_readme_names_every_file():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}
    assert [name for name in sorted(names) if f"`{name}`" not in readme] == []
