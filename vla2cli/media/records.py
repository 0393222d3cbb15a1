"""The plain data that the media stage takes and gives."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla2cli.preprocess import FrameGeometry


@dataclass(frozen=True)
class Frames:
    """The chosen pictures of one file, as decoded."""

    images: list[NDArray[np.uint8]]  # (H, W, 3) RGB each; sizes may differ
    # where each image stands in the file; black frames added at the end have none, so that
    # `indices` and `timestamps_s` are then shorter than `images`
    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]  # from the first frame of the file
    num_total: int
    fps: float  # 0 for a picture
    duration_s: float  # 0 for a picture
    decoder: str  # pyav, decord or pillow
    flags: tuple[str, ...] = ()  # partial-video


@dataclass(frozen=True)
class Probe:
    """What a file is, without its pictures."""

    kind: str  # video or image
    num_total: int
    fps: float  # 0 for a picture
    duration_s: float  # 0 for a picture
    width: int  # as stored, before rotation
    height: int


@dataclass(frozen=True)
class FileState:
    """What tells whether a file is still the same."""

    size_bytes: int
    mtime_ns: int
    sha256: str  # hex; empty where the content was not read


@dataclass(frozen=True)
class ClipRequest:
    """One file to turn into frames that fit the model."""

    path: str  # bytes that are not UTF-8 as surrogates, like os.fsdecode
    kind: str  # video, image or unknown
    geometry: FrameGeometry
    num_frames: int | None = None  # None takes one a second
    start_s: float | None = None
    end_s: float | None = None
    decoder: str = "pyav"


@dataclass(frozen=True)
class Clip:
    """The chosen pictures of one file, fitted to the model's input."""

    frames: NDArray[np.uint8]  # (T, S, S, 3) RGB
    kind: str  # video or image
    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]
    num_total: int
    fps: float
    duration_s: float
    decoder: str
    flags: tuple[str, ...]
    state: FileState
    timings_s: dict[str, float]  # read, preprocess
