"""Which sound a model hears: arithmetic only, no file is opened and no tensor made.

Source: upstream VideoLLaMA2, branch audio_visual @8cedfbd, mm_utils.py, `process_audio_file` and
`process_audio_from_video`; the clips are those of pytorchvideo 0.1.5,
`ConstantClipsPerVideoSampler`.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

SAMPLE_RATE = 16000

_WINDOW = 400  # samples of one fbank row: 25 ms
_HOP = 160  # samples between two rows: 10 ms
_MIN_SAMPLES = _WINDOW + 15 * _HOP  # 16 rows: one patch of the encoder
_MAX_S = 600.0


@dataclass(frozen=True)
class SoundWindow:
    """How much a model hears at once, and which pieces of a longer track."""

    duration_s: float = 30.0  # heard at once; shorter sound is padded with silence
    num_clips: int = 8  # pieces taken of a video's track
    clip_s: float = 2.0  # length of one piece

    def __post_init__(self) -> None:
        """Refuse what no encoder could be given.

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("duration_s", "clip_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"'{name}' is {value!r}, expected a positive number of seconds")
        if self.duration_s > _MAX_S:
            raise ValueError(f"'duration_s' is {self.duration_s:g}, expected at most {_MAX_S:g}")
        if self.num_samples < _MIN_SAMPLES:
            least_s = _MIN_SAMPLES / SAMPLE_RATE
            raise ValueError(f"'duration_s' is {self.duration_s:g}, expected at least {least_s:g}")
        if self.num_clips < 1 or self.num_clips != int(self.num_clips):
            raise ValueError(f"'num_clips' is {self.num_clips!r}, expected a whole number above 0")
        if self.clip_s * SAMPLE_RATE < _WINDOW:
            raise ValueError(
                f"'clip_s' is {self.clip_s:g}, expected at least {_WINDOW / SAMPLE_RATE:g}"
            )
        if self.num_clips * self.clip_s > self.duration_s:
            pieces = f"{self.num_clips} clips of {self.clip_s:g} s"
            raise ValueError(f"{pieces} do not fit into 'duration_s' {self.duration_s:g}")

    @property
    def num_samples(self) -> int:
        """Samples heard at once."""
        return round(self.duration_s * SAMPLE_RATE)

    @property
    def num_frames(self) -> int:
        """Rows of the fbank of `num_samples` samples."""
        return 1 + (self.num_samples - _WINDOW) // _HOP

    def clip_bounds(self, num_samples: int) -> tuple[tuple[int, int], ...]:
        """Choose the pieces of a track that are heard.

        They overlap in a short track and leave gaps in a long one. The division is by their number
        and not by one less, as upstream's library does: the end of a long track is never heard.

        Args:
            num_samples: of the track, at `SAMPLE_RATE`.

        Returns:
            `num_clips` pairs (start, end) in samples; an end may lie beyond the track.
        """
        # exact from the first rounding on: in doubles a quarter of all lengths is off by a sample
        most = Fraction(max(num_samples / float(SAMPLE_RATE) - self.clip_s, 0))
        starts = [most / self.num_clips * i for i in range(self.num_clips)]
        clip_s = Fraction(self.clip_s)
        return tuple(
            (math.floor(start * SAMPLE_RATE), math.floor((start + clip_s) * SAMPLE_RATE))
            for start in starts
        )
