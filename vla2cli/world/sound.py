"""Synthesis of the world's sounds: each is a short function from a length to a waveform."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vla2cli.world.facts import DURATION_S, Facts

SAMPLE_RATE = 16000
Wave = NDArray[np.float64]


def sound_span(facts: Facts, rng: np.random.Generator) -> tuple[float, float] | None:
    """Choose the seconds in which the sound is heard; None where it is silent."""
    if facts.time is None:
        return None
    if facts.time == "throughout":
        return 0.0, DURATION_S
    length, slack = float(rng.uniform(1.1, 1.5)), float(rng.uniform(0, 0.3))
    if facts.time == "beginning":
        return slack, slack + length
    if facts.time == "end":
        return DURATION_S - slack - length, DURATION_S - slack
    start = (DURATION_S - length) / 2 + slack - 0.15
    return start, start + length


def synthesise(
    facts: Facts, span: tuple[float, float] | None, rng: np.random.Generator
) -> NDArray[np.int16]:
    """Make the whole track of a clip.

    Args:
        facts: of the clip.
        span: from `sound_span`.
        rng: of pitch, loudness and noise.

    Returns:
        (80000,) int16 at 16 kHz: the sound in its span, and about it silence or a faint noise.
    """
    track = np.zeros(round(DURATION_S * SAMPLE_RATE))
    if rng.random() < 0.5:
        track += rng.standard_normal(len(track)) * rng.uniform(1e-4, 1e-3)
    if facts.sound is not None:
        assert span is not None
        start, end = (round(second * SAMPLE_RATE) for second in span)
        wave = _SYNTHS[facts.sound](end - start, rng)
        fade = np.minimum(1, np.minimum(np.arange(len(wave)), np.arange(len(wave))[::-1]) / 160)
        track[start:end] += wave / np.abs(wave).max() * fade * rng.uniform(0.25, 0.8)
    return (track.clip(-1, 1) * 32767).astype(np.int16)


def _seconds(num: int) -> Wave:
    return np.arange(num) / SAMPLE_RATE


def _repeat(num: int, period_s: float, hit: Wave) -> Wave:
    """Lay a hit down at every period; a hit that is longer than its period rings into the next."""
    period = round(period_s * SAMPLE_RATE)
    track = np.zeros(num + len(hit))
    for start in range(0, num, period):
        track[start : start + len(hit)] += hit
    return track[:num]


def _tone(frequency: Wave | float, num: int) -> Wave:
    phase = np.cumsum(np.broadcast_to(frequency, num)) / SAMPLE_RATE
    return np.sin(2 * np.pi * phase)


def _pitch(rng: np.random.Generator, frequency: float) -> float:
    return frequency * float(rng.uniform(0.94, 1.06))


def _bell(num: int, rng: np.random.Generator) -> Wave:
    t = _seconds(SAMPLE_RATE)
    f = _pitch(rng, 880)
    partials = ((1, 1.0, 4), (2.76, 0.6, 6), (5.4, 0.4, 9))
    hit = sum(a * np.sin(2 * np.pi * f * r * t) * np.exp(-d * t) for r, a, d in partials)
    return _repeat(num, 0.5, np.asarray(hit))


def _engine(num: int, rng: np.random.Generator) -> Wave:
    f = _pitch(rng, 85)
    hum = sum(_tone(f * k, num) / k for k in range(1, 9))
    return np.asarray(hum * (1 + 0.3 * _tone(f / 6, num)) + 0.1 * rng.standard_normal(num))


def _siren(num: int, rng: np.random.Generator) -> Wave:
    sweep = _pitch(rng, 900) * (1 + 0.35 * np.sin(2 * np.pi * 1.6 * _seconds(num)))
    return _tone(sweep, num) + 0.3 * _tone(2 * sweep, num)


def _drum(num: int, rng: np.random.Generator) -> Wave:
    t = _seconds(round(0.28 * SAMPLE_RATE))
    f = _pitch(rng, 70) * (1 + 1.2 * np.exp(-30 * t))
    skin = _tone(f, len(t)) * np.exp(-12 * t)
    return _repeat(num, 0.3, skin + 0.25 * rng.standard_normal(len(t)) * np.exp(-60 * t))


def _bird(num: int, rng: np.random.Generator) -> Wave:
    t = _seconds(round(0.12 * SAMPLE_RATE))
    sweep = _pitch(rng, 3000) + 14000 * t * float(rng.choice([1, -0.6]))
    return _repeat(num, 0.2, _tone(sweep, len(t)) * np.sin(np.pi * t / 0.12))


def _rain(num: int, rng: np.random.Generator) -> Wave:
    noise = rng.standard_normal(num + 1)
    return noise[1:] - 0.7 * noise[:-1]


def _clock(num: int, rng: np.random.Generator) -> Wave:
    t = _seconds(round(0.02 * SAMPLE_RATE))
    tick = np.sin(2 * np.pi * _pitch(rng, 2200) * t) * np.exp(-300 * t)
    return _repeat(num, 0.25, tick)


def _horn(num: int, rng: np.random.Generator) -> Wave:
    f = _pitch(rng, 370)
    blare = sum(np.sign(_tone(f * r, num)) for r in (1, 1.26))
    return np.asarray(blare) * ((_seconds(num) % 0.55) < 0.38)


def _whistle(num: int, rng: np.random.Generator) -> Wave:
    trill = _pitch(rng, 2600) * (1 + 0.04 * np.sign(_tone(28, num)))
    return _tone(trill, num) + 0.15 * rng.standard_normal(num)


def _phone(num: int, rng: np.random.Generator) -> Wave:
    t = _seconds(num)
    f = np.where((t * 16).astype(np.int64) % 2 == 0, _pitch(rng, 1000), _pitch(rng, 1300))
    return _tone(f, num) * ((t % 0.7) < 0.45)


_SYNTHS: dict[str, Callable[[int, np.random.Generator], Wave]] = {
    "bell": _bell,
    "engine": _engine,
    "siren": _siren,
    "drum": _drum,
    "bird": _bird,
    "rain": _rain,
    "clock": _clock,
    "horn": _horn,
    "whistle": _whistle,
    "phone": _phone,
}
