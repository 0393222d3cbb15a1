"""What a clip sounds like is what its facts say: looked at in the samples."""

from itertools import pairwise

import numpy as np

from vla2cli.world.clip import WorldClip
from vla2cli.world.sound import SAMPLE_RATE
from vla2cli.world.vocabulary import SOUNDS

SEED = 23
FRAME = 512
FULL_SCALE = 32767
NOISE = 0.006  # the loudest faint noise: 1e-3, six times as loud once in a billion samples


def clips(num, start=0):
    return [WorldClip(SEED, index, "train") for index in range(start, start + num)]


def test_track_is_five_seconds_of_int16():
    for clip in clips(10):
        track = clip.track()
        assert track.shape == (5 * SAMPLE_RATE,)
        assert track.dtype == np.int16


def test_sound_is_heard_in_its_span_and_nowhere_else():
    seen = set()
    for clip in clips(60):
        level = np.abs(clip.track() / FULL_SCALE)
        if clip.span is None:
            assert clip.facts.sound is None
            assert level.max() < NOISE
            continue
        start, end = (round(second * SAMPLE_RATE) for second in clip.span)
        assert level[start:end].max() > 0.2
        assert np.concatenate([level[:start], level[end:]]).max(initial=0) < NOISE
        seen.add(clip.facts.time)
    assert len(seen) == 4


def test_span_is_where_the_caption_says():
    for clip in clips(100):
        if clip.span is None:
            continue
        start, end = clip.span
        is_true = {
            "beginning": end < 2,
            "end": start > 3,
            "throughout": end - start == 5,
            "middle": start > 1.5 and end < 3.5,
        }
        assert [time for time, holds in is_true.items() if holds] == [clip.facts.time]


def test_every_sound_differs_from_the_others_by_its_spectrum():
    heard = [clip for clip in clips(320) if clip.facts.sound]
    names = [clip.facts.sound for clip in heard]
    features = np.stack([spectrum_of(clip) for clip in heard])
    half = len(heard) // 2
    means = np.stack(
        [
            np.mean([f for f, n in zip(features[:half], names, strict=False) if n == name], 0)
            for name in SOUNDS
        ]
    )
    distances = np.abs(features[half:, None] - means).sum(-1)
    said = [list(SOUNDS)[idx] for idx in distances.argmin(1)]
    # chance is one in ten
    right = np.mean([one == other for one, other in zip(said, names[half:], strict=True)])
    assert right > 0.95


def spectrum_of(clip):
    """Describe a sound by the level of its bands and how much each comes and goes."""
    start, end = (round(second * SAMPLE_RATE) for second in clip.span)
    wave = clip.track()[start:end] / FULL_SCALE
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME) * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames))[:, 1:] ** 2
    edges = np.unique(np.geomspace(1, FRAME // 2, 25).astype(int))
    bands = np.stack([power[:, a:b].mean(1) for a, b in pairwise(edges)], 1)
    bands /= bands.mean()
    return np.concatenate([np.log(bands.mean(0) + 1e-4), np.log(bands + 1e-4).std(0)])
