"""Videos through decord, the decoder of the reference, kept for comparing with it."""

from typing import Any

import numpy as np

from vla2cli.errors import InputError
from vla2cli.media.records import Frames
from vla2cli.media.sampling import sample_indices


def read_decord(
    path: str, num_frames: int | None, start_s: float | None, end_s: float | None
) -> Frames:
    """Sample a video as upstream does.

    Raises:
        InputError: decord is missing or cannot read the file, or the range holds no frame.
    """
    try:
        import decord
    except ImportError as error:
        message = "decord is not installed: pip install decord==0.6.0, or use --decoder pyav"
        raise InputError(message, kind="decode", stage="decode") from error
    try:
        reader = decord.VideoReader(path, num_threads=2)
        fps, num_total = float(reader.get_avg_fps()), len(reader)
        picked = sample_indices(num_total, fps, num_frames, start_s, end_s).tolist()
        images = reader.get_batch(picked).asnumpy()  # (T, H, W, 3) uint8
        timestamps_s = _timestamps(reader, picked)
    except MemoryError as error:
        raise InputError("not enough memory", kind="memory", stage="decode") from error
    # decord's error is a RuntimeError; a path it cannot spell gives a ValueError
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"decord: {_reason(error, path)}", kind="decode", stage="decode"
        ) from error
    return Frames(
        images=list(images),
        indices=tuple(picked),
        timestamps_s=timestamps_s,
        num_total=num_total,
        fps=fps,
        duration_s=num_total / fps,
        decoder="decord",
    )


def _timestamps(reader: Any, picked: list[int]) -> tuple[float, ...]:
    starts: Any = reader.get_frame_timestamp([0, *picked])[:, 0]
    return tuple(float(t) for t in np.asarray(starts[1:] - starts[0], dtype=np.float64))


def _reason(error: Exception, path: str) -> str:
    # decord prefixes a time and a source line, and appends a C++ stack
    lines = str(error).replace(path, "the file").splitlines() or [type(error).__name__]
    return lines[0].rsplit("] ", maxsplit=1)[-1].strip()[:200] or type(error).__name__
