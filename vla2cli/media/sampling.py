"""Which frames of a video the model sees: arithmetic only, no file is opened.

Source: upstream VideoLLaMA2@c0bb03a, mm_utils.py, `frame_sample` and `process_video`; the roundings
and the off-by-one at the start of a range are upstream's, because the checkpoints were trained so.
"""

import numpy as np
from numpy.typing import NDArray

from vla2cli.errors import InputError

MAX_FRAMES = 32


def uniform_indices(duration: int, num_frames: int) -> NDArray[np.int64]:
    """Pick the middle frame of each of `num_frames` equal spans.

    Args:
        duration: frames to choose from, at least 1.
        num_frames: frames wanted, at least 1.

    Returns:
        (num_frames,) int64, ascending, in [0, duration); an index repeats when there are too few.
    """
    if duration < 1 or num_frames < 1:
        raise ValueError(f"duration {duration} and num_frames {num_frames} must be at least 1")
    span = float(duration - 1) / num_frames
    i = np.arange(num_frames)
    # numpy rounds halves to even, the 1e-6 turns x.5 upward; the order of operations is upstream's
    middle = (span * i + span * (i + 1)) / 2 + 1e-6
    return np.round(middle).astype(np.int64)


def fps_indices(duration: int, fps: float) -> NDArray[np.int64]:
    """Pick the middle frame of every second.

    Args:
        duration: frames to choose from, at least 1.
        fps: frames per second; its fraction is dropped, as upstream does.

    Returns:
        (n,) int64, ascending, in [0, duration).
    """
    if duration < 1:
        raise ValueError(f"duration {duration} must be at least 1")
    # upstream divides by zero below 1 fps; every frame is then at least a second apart, so take all
    step = max(1, min(int(fps), duration))
    return np.arange(step // 2, duration, step, dtype=np.int64)


def frame_range(
    num_total: int, fps: float, start_s: float | None, end_s: float | None
) -> tuple[int, int]:
    """Turn a time range into its first and last frame, both included.

    A range with both ends is repaired (negative to 0, reversed ends swapped, equal ends one second
    apart); a range with one end is taken as it is.

    Raises:
        InputError: no frame lies in the range.
    """
    start_s, end_s = repair_range(start_s, end_s)
    first = 0 if start_s is None else max(int(start_s * fps) - 1, 0)
    last = num_total - 1 if end_s is None else min(int(end_s * fps) - 1, num_total - 1)
    if first > last:
        raise _out_of_range(num_total, fps, start_s, end_s)
    return first, last


def repair_range(start_s: float | None, end_s: float | None) -> tuple[float | None, float | None]:
    """Repair a time range that has both ends, as `frame_range` says."""
    if start_s is None or end_s is None:
        return start_s, end_s
    start_s, end_s = sorted((max(start_s, 0.0), max(end_s, 0.0)))
    return start_s, end_s + 1 if start_s == end_s else end_s


def sample_indices(
    num_total: int,
    fps: float,
    num_frames: int | None,
    start_s: float | None = None,
    end_s: float | None = None,
    *,
    max_frames: int | None = MAX_FRAMES,
) -> NDArray[np.int64]:
    """Choose the frames of a video, as the reference does.

    Args:
        num_total: frames in the video.
        fps: frames per second.
        num_frames: spread so many over the range; None takes one a second.
        start_s: start of the range, None for the beginning.
        end_s: end of the range, None for the end.
        max_frames: indices after so many are dropped; None keeps all.

    Returns:
        (n,) int64, ascending; an index repeats when the range is shorter than `num_frames`.

    Raises:
        InputError: the video has no frame, or none in the range.
    """
    first, last = frame_range(num_total, fps, start_s, end_s)
    duration = last - first + 1
    if num_frames is None:
        picked = fps_indices(duration, fps)
    else:
        picked = uniform_indices(duration, num_frames)
    return (first + picked)[:max_frames]


def _out_of_range(
    num_total: int, fps: float, start_s: float | None, end_s: float | None
) -> InputError:
    start = "the start" if start_s is None else f"{start_s:g} s"
    end = "the end" if end_s is None else f"{end_s:g} s"
    length = f"{num_total / fps:.2f} s long" if fps > 0 else "without a frame rate"
    message = f"no frame between {start} and {end}: the video is {length} ({num_total} frames)"
    return InputError(message, kind="out-of-range", stage="decode")
