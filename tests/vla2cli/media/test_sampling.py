import json

import numpy as np
import pytest

from vla2cli.errors import InputError
from vla2cli.media.sampling import (
    MAX_FRAMES,
    fps_indices,
    frame_range,
    sample_indices,
    uniform_indices,
)


@pytest.fixture(scope="session")
def golden(shared):
    return json.loads((shared / "golden/vision/data/frame_sampling.json").read_text())


def test_uniform_indices_match_reference(golden):
    for row in golden["uniform"]:
        got = uniform_indices(row["duration"], row["num_frames"])
        assert got.tolist() == row["indices"], row
        assert got.dtype == np.int64


def test_fps_indices_match_reference(golden):
    for row in golden["fps"]:
        assert fps_indices(row["duration"], row["fps"]).tolist() == row["indices"], row


def test_ranges_match_reference(golden):
    for row in golden["process_video_range"]:
        wanted = (row["num_frames_of_video"], row["fps"], row["num_frames"], row["s"], row["e"])
        if "error" in row:
            with pytest.raises(InputError) as caught:
                sample_indices(*wanted)
            assert (caught.value.kind, caught.value.stage) == ("out-of-range", "decode"), row
        else:
            assert sample_indices(*wanted).tolist() == row["indices"][:MAX_FRAMES], row
            assert len(sample_indices(*wanted)) == row["frames_returned"], row


def test_a_range_with_both_ends_is_repaired():
    assert frame_range(100, 10.0, 5.0, 2.0) == frame_range(100, 10.0, 2.0, 5.0) == (19, 49)
    assert frame_range(100, 10.0, 3.0, 3.0) == (29, 39)
    assert frame_range(100, 10.0, -4.0, 1.0) == (0, 9)


def test_a_lone_negative_end_is_not_repaired():
    with pytest.raises(InputError, match="no frame between the start and -1 s"):
        frame_range(100, 10.0, None, -1.0)


def test_start_at_the_very_end_gives_the_last_frame_and_one_beyond_it_none():
    assert frame_range(50, 10.0, 5.0, None) == (49, 49)  # int(s * fps) - 1, as the reference has it
    with pytest.raises(InputError, match=r"5\.1 s and the end: the video is 5\.00 s long \(50 fr"):
        frame_range(50, 10.0, 5.1, None)


def test_more_than_32_frames_are_cut():
    assert len(sample_indices(1000, 10.0, 40)) == MAX_FRAMES
    assert len(sample_indices(1000, 10.0, None)) == MAX_FRAMES
    assert len(sample_indices(1000, 10.0, 40, max_frames=None)) == 40


def test_video_without_frames_is_refused():
    with pytest.raises(InputError, match=r"0 frames"):
        sample_indices(0, 25.0, 8)


def test_less_than_one_frame_a_second_takes_every_frame():
    assert fps_indices(4, 0.5).tolist() == [0, 1, 2, 3]
