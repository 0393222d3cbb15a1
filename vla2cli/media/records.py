"""The plain data that the media stage takes and gives."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla2_models.sound import SoundWindow
from vla2cli.preprocess import FrameGeometry


@dataclass(frozen=True)
class SoundRequest:
    """Which sound of a file is wanted."""

    window: SoundWindow
    is_required: bool  # whether a video without sound is heard as silence, or else not at all
    start_s: float | None = None  # range of the sound; None: from the beginning
    end_s: float | None = None  # None: to the end
    # audio files: where in the file the window begins; None: where the range does
    audio_start_s: float | None = None


@dataclass(frozen=True)
class Sound:
    """What is heard of one file."""

    # (window.num_samples,) 16 kHz mono, padded with zeros: int16 of a video's track, float64 of an
    # audio file; one sample longer for some odd rates; None: dropped, see `Clip.stripped`
    waveform: NDArray[Any] | None
    # the parts of the file that are heard, in the time of `Frames.timestamps_s`; an audio file's
    # time begins with its sound. The clips of a short track overlap; of silence there is none
    spans_s: tuple[tuple[float, float], ...]
    duration_s: float  # of the whole track or file, as far as known


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
    flags: tuple[str, ...] = ()  # partial-video, short-audio, no-audio-track
    sound: Sound | None = None


@dataclass(frozen=True)
class Probe:
    """What a file is, without its pictures and sound."""

    kind: str  # video, image or audio
    num_total: int  # frames; 0 for audio
    fps: float  # 0 for a picture and for audio
    duration_s: float  # 0 for a picture
    width: int  # as stored, before rotation; 0 for audio
    height: int
    has_sound: bool = False  # a stream of a known codec; whether it decodes is not tried


@dataclass(frozen=True)
class FileState:
    """What tells whether a file is still the same."""

    size_bytes: int
    mtime_ns: int
    sha256: str  # hex; empty where the content was not read


@dataclass(frozen=True)
class ClipRequest:
    """One file to turn into frames and sound that fit the model."""

    path: str  # bytes that are not UTF-8 as surrogates, like os.fsdecode
    kind: str  # video, image, audio (only its sound, of a video as well) or unknown
    geometry: FrameGeometry | None  # None for audio
    num_frames: int | None = None  # None takes one a second
    start_s: float | None = None
    end_s: float | None = None
    decoder: str = "pyav"
    sound: SoundRequest | None = None  # None: nothing is heard


@dataclass(frozen=True)
class Clip:
    """The chosen pictures and sound of one file, fitted to the model's input."""

    frames: NDArray[np.uint8] | None  # (T, S, S, 3) RGB; None for audio, and where dropped
    kind: str  # video, image or audio
    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]
    num_total: int
    fps: float
    duration_s: float
    decoder: str
    flags: tuple[str, ...]
    state: FileState
    timings_s: dict[str, float]  # read, preprocess
    sound: Sound | None = None  # None: nothing is heard
    is_steady: bool = True  # False: the file was seen to change while it was read

    @property
    def is_seen(self) -> bool:
        """Whether the file gave pictures, be they held or dropped."""
        return self.kind != "audio"

    def stripped(self) -> "Clip":
        """Return the same without its pixels and samples, of which no record says anything."""
        sound = None if self.sound is None else replace(self.sound, waveform=None)
        return replace(self, frames=None, sound=sound)
