import json
import subprocess
import sys
from itertools import pairwise

import pytest

from tests.goldens import golden_audio
from vla2_models.sound import SoundWindow


def test_clip_bounds_match_reference_for_every_length():
    recorded = json.loads(golden_audio("clip_samples.json").read_text(encoding="utf-8"))
    assert len(recorded) == 418
    for num_samples, bounds in recorded.items():
        found = SoundWindow().clip_bounds(int(num_samples))
        assert [list(pair) for pair in found] == bounds, num_samples


def test_reference_window_is_30_seconds():
    assert (SoundWindow().num_samples, SoundWindow().num_frames) == (480_000, 2998)


@pytest.mark.parametrize("num_samples", [0, 1, 399, 16_001, 100_003])
@pytest.mark.parametrize("num_clips", [1, 3, 7])
def test_clips_of_another_window_spread_over_the_track(num_clips, num_samples):
    window = SoundWindow(duration_s=5.0, num_clips=num_clips, clip_s=0.3)
    bounds = window.clip_bounds(num_samples)
    assert len(bounds) == num_clips
    assert bounds[0][0] == 0
    steps = [b[0] - a[0] for a, b in pairwise(bounds)]
    step = max(num_samples - 4800, 0) / num_clips
    assert all(abs(found - step) <= 1 for found in steps)
    assert all(end - start in (4799, 4800) for start, end in bounds)  # 0.3 is below 3/10 in doubles


NONSENSE = {
    "no time": {"duration_s": 0.0},
    "negative time": {"duration_s": -1.0},
    "not a number": {"clip_s": float("nan")},
    "endless": {"duration_s": float("inf")},
    "longer than 10 minutes": {"duration_s": 601.0},
    "shorter than one patch": {"duration_s": 0.174, "clip_s": 0.02},
    "no clip": {"num_clips": 0},
    "half a clip": {"num_clips": 1.5},
    "clips beyond the window": {"num_clips": 16},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_window_rejects_nonsense(name):
    (field,) = list(NONSENSE[name])[:1]
    with pytest.raises(ValueError, match=r"'duration_s'|'clip_s'|'num_clips'") as caught:
        SoundWindow(**NONSENSE[name])
    assert f"{NONSENSE[name][field]:g}" in str(caught.value)


def test_shortest_window_is_one_patch():
    assert SoundWindow(duration_s=0.175, num_clips=1, clip_s=0.175).num_frames == 16


def test_arithmetic_of_sound_loads_no_torch():
    code = "import sys, vla2_models.sound; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())
