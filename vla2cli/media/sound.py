"""Sound through PyAV, as the reference hears it: a video's track one way, an audio file another.

The track of a video is mixed to mono, resampled by FFmpeg and rounded to int16; the pieces that the
model hears are cut out of the whole. Of an audio file the first channel is taken in float64, padded
and then resampled by FFT, so that the padding of a resampled file is not quite silent.

For a late range, too, both are decoded from the beginning: after a seek AAC fills in other noise,
Opus is placed only to the millisecond, and FFmpeg's resampler begins at another phase.

Source: upstream VideoLLaMA2, branch audio_visual @8cedfbd, mm_utils.py, `process_audio_file` and
`process_audio_from_video`.
"""

import math
import re
from contextlib import suppress
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.audio.fifo import AudioFifo
from av.audio.frame import AudioFrame, format_dtypes
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from vla2_models.sound import SAMPLE_RATE
from vla2cli.errors import InputError
from vla2cli.media.container import (
    av_errors,
    find_picture,
    find_sound,
    open_container,
    packets,
    undecodable,
)
from vla2cli.media.records import Probe, Sound, SoundRequest
from vla2cli.media.sampling import repair_range

_SHORT = "short-audio"
_NO_TRACK = "no-audio-track"
_BLOCK = 16384  # samples resampled at once: the same sound at half the cost of frame by frame
_FBANK_WINDOW_S = 0.025  # less sound than this fills no row
_MAX_RATE = 768_000  # a damaged head may say anything, and the FFT would take minutes and GB
_MAX_LEVEL = 1e9  # full scale is 1; squares of more would leave the numbers there are
_MAX_USUAL = 8  # channels for which there is a usual order; PyAV misreads more of them
_LATE_S = 1.0  # a range's end may lie this far off in a track that begins before the picture
# whose headers tell the length; others are guessed from the bit rate, or measured at the file's end
_TRUE_LENGTHS = frozenset(
    ["aiff", "asf", "au", "avi", "caf", "flac", "mov", "matroska", "wav", "w64"]
)
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


def read_sound(path: str, request: SoundRequest) -> tuple[Sound, tuple[str, ...]]:
    """Read an audio file, or what is heard when a video is only listened to.

    Returns:
        The sound, float64, and its flags: "short-audio" or none.

    Raises:
        InputError: there is no sound in the file or in the range, or it cannot be decoded.
    """
    with av_errors(), open_container(path) as container:
        stream = _require_sound(container)
        promised_s = _promised_s(container, stream)
        reader = _FileReader(stream, request, _picture_begin_s(container))
        for packet in packets(container, stream):
            if packet is None:
                reader.is_damaged = True
            elif reader.feed(packet):
                break
        reader.finish()
        return reader.result(promised_s, _duration_s(container, stream))


def probe_sound(path: str) -> Probe:
    """Tell an audio file's length, as its header has it.

    Raises:
        InputError: the file has no sound.
    """
    with av_errors(), open_container(path) as container:
        duration_s = _duration_s(container, _require_sound(container))
    return Probe("audio", 0, 0.0, duration_s or 0.0, 0, 0, has_sound=True)


def is_sound(path: str) -> bool:
    """Whether FFmpeg knows the file as one with sound and no picture."""
    try:
        with av_errors(), open_container(path) as container:
            return find_picture(container) is None and find_sound(container) is not None
    except InputError:
        return False


def read_track(
    path: str, request: SoundRequest, picture_s: float
) -> tuple[Sound | None, tuple[str, ...]]:
    """Read the track of a video whose picture of `picture_s` seconds something else decodes.

    Returns:
        As `cut_track`.
    """
    with av_errors(), open_container(path) as container:
        track = open_track(container, request)
        picture_begin_s = _picture_begin_s(container) or 0.0
        if track is not None:
            for packet in packets(container, track.stream):
                if packet is None:
                    track.is_damaged = True
                else:
                    track.feed(packet)
            track.finish()
    return cut_track(track, request, picture_begin_s, picture_s)


class Track:
    """The sound of one stream as 16 kHz mono, made packet by packet."""

    def __init__(self, stream: AudioStream, promised_s: float | None, until_s: float) -> None:
        """Start; sound after `until_s`, in the container's time, may be left out."""
        self.stream, self.promised_s, self.until_s = stream, promised_s, until_s
        self.begin_s: float | None = None  # container's time of the first sample, where known
        self.is_damaged = self.is_stopped = False
        self._samples = bytearray()
        self._setup: tuple[str, str, int] | None = None
        self._resampler = _new_resampler()
        self._fifo = AudioFifo()

    def feed(self, packet: "av.Packet[AudioStream]") -> None:
        """Take the next packet; one that does not decode is left out, as `ffmpeg` does."""
        if self.is_stopped:
            return
        frames, is_whole = _decode(self.stream, packet)
        self.is_damaged |= not is_whole
        last_s = frames[-1].time if frames else None  # taking a frame takes its time away
        for frame in frames:
            self._take(frame)
        self.is_stopped = last_s is not None and last_s > self.until_s

    def finish(self) -> None:
        """Take what the decoder and the resampler still hold."""
        if not self.is_stopped:
            for frame in _drain(self.stream):
                self._take(frame)
        self._flush()

    @property
    def samples(self) -> NDArray[np.int16]:
        """(n,) what was heard so far."""
        return np.frombuffer(self._samples, np.int16)

    def _take(self, frame: AudioFrame) -> None:
        if self._setup is None:
            self.begin_s = frame.time
        self.is_damaged |= frame.is_corrupt
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        if setup != self._setup:
            self._flush()
            self._setup = setup
        if frame.layout.name.endswith(" channels"):
            if frame.layout.nb_channels > _MAX_USUAL:
                self.is_damaged = True
                return
            frame = _with_usual_layout(frame)
        # gaps in the times are not filled, as ffmpeg does not; what a decoder gives last has none
        frame.pts, frame.time_base = None, Fraction(1, frame.sample_rate)
        self._fifo.write(frame)
        if self._fifo.samples >= _BLOCK:
            self._resample(self._fifo.read())

    def _flush(self) -> None:
        if self._fifo.samples:
            self._resample(self._fifo.read())
        self._resample(None)
        self._resampler = _new_resampler()
        self._fifo = AudioFifo()

    def _resample(self, frame: AudioFrame | None) -> None:
        try:
            made = self._resampler.resample(frame)
        except MemoryError:
            raise
        except (av.error.FFmpegError, ValueError):
            self.is_damaged = True
            self._resampler = _new_resampler()  # the old one is half set up
            return
        for part in made:
            if part is not None:  # what a resampler without work gives when it is flushed
                self._samples += part.to_ndarray().tobytes()


def open_track(container: InputContainer, request: SoundRequest) -> Track | None:
    """Make ready to hear a video; None where it has no track that can be opened."""
    stream = find_sound(container)
    if stream is None:
        return None
    try:
        stream.codec_context.open(strict=False)
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError):
        return None
    _, end_s = repair_range(request.start_s, request.end_s)
    picture_begin_s = _picture_begin_s(container) or 0.0
    until_s = math.inf if end_s is None else picture_begin_s + end_s + _LATE_S
    return Track(stream, _promised_s(container, stream), until_s)


def cut_track(
    track: Track | None, request: SoundRequest, picture_begin_s: float, picture_s: float
) -> tuple[Sound | None, tuple[str, ...]]:
    """Cut out of a track what the model hears.

    Args:
        track: finished; None where the video has none.
        request: what is wanted.
        picture_begin_s: the first frame, in the container's time.
        picture_s: length of the picture.

    Returns:
        The sound, int16, and flags. None where there is no sound and none is required; where it is
        required, silence of no span.
    """
    if track is None or not len(track.samples):
        return _silence(request, 0.0), (_NO_TRACK,)
    samples, rate = track.samples, SAMPLE_RATE
    # in the picture's time, as all that follows
    begin_s = 0.0 if track.begin_s is None else track.begin_s - picture_begin_s
    start_s, end_s = repair_range(request.start_s, request.end_s)
    first = 0 if start_s is None else _sample(start_s - begin_s, rate, len(samples))
    last = len(samples) if end_s is None else _sample(end_s - begin_s, rate, len(samples))
    heard = samples[first : max(first, last)]
    duration_s = len(samples) / rate
    is_short = track.is_damaged or len(heard) < _FBANK_WINDOW_S * rate
    if track.is_stopped:
        duration_s = max(duration_s, track.promised_s or 0.0)
    elif track.promised_s is not None:
        is_short |= _is_clearly_less(duration_s, track.promised_s)
    from_s = start_s or 0.0
    until_s = picture_s if end_s is None else min(end_s, picture_s)
    covered_s = min(begin_s + len(samples) / rate, until_s) - max(begin_s, from_s)
    is_short |= _is_clearly_less(covered_s, until_s - from_s)
    flags = (_SHORT,) if is_short else ()
    if not len(heard):
        return _silence(request, duration_s), flags
    bounds = request.window.clip_bounds(len(heard))
    waveform = np.zeros(request.window.num_samples, np.int16)
    pieces = np.concatenate([heard[start:end] for start, end in bounds])[: len(waveform)]
    waveform[: len(pieces)] = pieces
    offset_s = begin_s + first / rate
    spans_s = tuple(
        (offset_s + start / rate, offset_s + min(end, len(heard)) / rate) for start, end in bounds
    )
    return Sound(waveform, spans_s, duration_s), flags


def resample_fft(samples: NDArray[np.float64], num: int) -> NDArray[np.float64]:
    """Resample by Fourier transform: the spectrum is cut off, or filled up with zeros.

    Args:
        samples: (n,)
        num: samples wanted.

    Returns:
        (num,) the same time at another rate, as if the sound were periodic.

    Source: scipy 1.17, `signal.resample`, for real numbers and without a window.
    """
    n = len(samples)
    shorter = min(n, num)
    spectrum = np.zeros(num // 2 + 1, np.complex128)
    spectrum[: shorter // 2 + 1] = np.fft.rfft(samples)[: shorter // 2 + 1]
    if shorter % 2 == 0 and num != n:
        # at this bin two frequencies, plus and minus, are one in the shorter spectrum
        spectrum[shorter // 2] *= 2 if num < n else 0.5
    return np.asarray(np.fft.irfft(spectrum, num) * (num / n), np.float64)


class _FileReader:
    """The window of an audio file, at the file's own rate until `result`."""

    def __init__(
        self, stream: AudioStream, request: SoundRequest, picture_begin_s: float | None
    ) -> None:
        self.stream, self.window = stream, request.window
        start_s, self.end_s = repair_range(request.start_s, request.end_s)
        self.start_s = start_s if request.audio_start_s is None else request.audio_start_s
        self.picture_begin_s = picture_begin_s
        self.is_damaged = self.is_at_end = False
        self.rate = self.num_seen = self.first = self.last = 0
        self.begin_s = 0.0  # of the first sample, in the picture's time where there is one
        self.parts: list[NDArray[np.float64]] = []

    def feed(self, packet: "av.Packet[AudioStream]") -> bool:
        """Take the next packet; tell whether the window is full."""
        frames, is_whole = _decode(self.stream, packet)
        self.is_damaged |= not is_whole
        for frame in frames:
            self._take(frame)
        return self._is_full()

    def finish(self) -> None:
        if self._is_full():
            return
        for frame in _drain(self.stream):
            self._take(frame)
        self.is_at_end = not self._is_full()

    def result(
        self, promised_s: float | None, duration_s: float | None
    ) -> tuple[Sound, tuple[str, ...]]:
        if not self.num_seen:
            raise undecodable("no sound can be decoded")
        rate, seen_s = self.rate, self.num_seen / self.rate
        num_heard = sum(map(len, self.parts))
        if not num_heard:
            raise self._out_of_range(seen_s)
        heard = np.zeros(int(self.window.duration_s * rate))
        heard[:num_heard] = np.concatenate(self.parts)
        if not (np.abs(heard) < _MAX_LEVEL).all():
            raise undecodable("the sound holds NaN, infinite values or such as no recording has")
        is_short = self.is_damaged or num_heard < _FBANK_WINDOW_S * rate
        if self.is_at_end:
            duration_s = seen_s
            wanted_s = min(promised_s or 0.0, self.last / rate)
            is_short |= _is_clearly_less(seen_s, wanted_s)
        if rate != SAMPLE_RATE:
            # the order of these operations is upstream's: their rounding may add a sample
            heard = resample_fft(heard, math.ceil(len(heard) * (SAMPLE_RATE / rate)))
        # whole samples of an odd rate may be a little less than the window
        missing = max(self.window.num_samples - len(heard), 0)
        heard = np.pad(heard, (0, missing))
        start_s = self.begin_s + self.first / rate
        spans_s = ((start_s, start_s + num_heard / rate),)
        duration_s = max(duration_s or 0.0, seen_s)
        return Sound(heard, spans_s, duration_s), (_SHORT,) if is_short else ()

    def _take(self, frame: AudioFrame) -> None:
        if not self.rate:
            self._begin(frame)
        if frame.sample_rate != self.rate:
            # what follows is another recording: end here, and say so
            self.is_damaged = self.is_at_end = True
            self.last = min(self.last, self.num_seen)
            return
        if self._is_full():
            return
        self.is_damaged |= frame.is_corrupt
        skipped = max(self.first - self.num_seen, 0)
        wanted = self.last - self.num_seen
        if skipped < min(frame.samples, wanted):
            self.parts.append(_first_channel(frame)[skipped:wanted])
        self.num_seen += frame.samples

    def _begin(self, frame: AudioFrame) -> None:
        self.rate = frame.sample_rate
        if self.rate > _MAX_RATE:
            raise undecodable(f"{self.rate} Hz is no sample rate of sound, at most {_MAX_RATE} Hz")
        if self.picture_begin_s is not None and frame.time is not None:
            self.begin_s = frame.time - self.picture_begin_s
        if self.start_s is not None:
            self.first = _sample(self.start_s - self.begin_s, self.rate)
        self.last = self.first + int(self.window.duration_s * self.rate)
        if self.end_s is not None:
            self.last = min(self.last, _sample(self.end_s - self.begin_s, self.rate))

    def _is_full(self) -> bool:
        return bool(self.rate) and self.num_seen >= self.last

    def _out_of_range(self, seen_s: float) -> InputError:
        start = "the start" if self.start_s is None else f"{self.start_s:g} s"
        end = "the end" if self.end_s is None else f"{self.end_s:g} s"
        if self.is_at_end:
            what = f"the file is {self.begin_s + seen_s:.2f} s long"
        else:
            what = f"it begins at {self.begin_s:.2f} s"
        message = f"no sound between {start} and {end}: {what}"
        return InputError(message, kind="out-of-range", stage="decode")


def _require_sound(container: InputContainer) -> AudioStream:
    stream = find_sound(container)
    if stream is not None:
        return stream
    if container.streams.audio:
        raise undecodable("no decoder for the sound in this file")
    message = "no sound in this file"
    if find_picture(container) is not None:
        message = "this file has a picture but no sound"
    raise InputError(message, kind="no-audio", stage="decode")


def _decode(stream: AudioStream, packet: "av.Packet[AudioStream]") -> tuple[list[AudioFrame], bool]:
    # frames, and whether the packet was whole
    try:
        return stream.codec_context.decode(packet), not packet.is_corrupt
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError):
        return [], False


def _drain(stream: AudioStream) -> list[AudioFrame]:
    # EOFError: the decoder was never given anything, or was drained before
    with suppress(av.error.FFmpegError, EOFError, ValueError):
        return stream.codec_context.decode(None)
    return []


def _new_resampler() -> AudioResampler:
    return AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)


def _with_usual_layout(frame: AudioFrame) -> AudioFrame:
    # "6 channels" in no known order: ffmpeg takes the usual one of that number
    layout = f"{frame.layout.nb_channels}c"
    made = AudioFrame.from_ndarray(frame.to_ndarray(), frame.format.name, layout)
    made.sample_rate = frame.sample_rate
    return made


def _first_channel(frame: AudioFrame) -> NDArray[np.float64]:
    if frame.format.name not in format_dtypes:
        raise undecodable(f"samples of type '{frame.format.name}' are not known")
    # not frame.to_ndarray(): with more than 8 planes PyAV 18 reads beyond the last one
    dtype = np.dtype(format_dtypes[frame.format.name])
    step = 1 if frame.format.is_planar else frame.layout.nb_channels
    plane: NDArray[Any] = np.frombuffer(bytes(frame.planes[0]), dtype, frame.samples * step)
    floats = plane[::step].astype(np.float64)
    if dtype == np.uint8:
        return (floats - 128) / 128
    if np.issubdtype(dtype, np.integer):
        return floats / 2.0 ** (8 * dtype.itemsize - 1)
    return floats


def _silence(request: SoundRequest, duration_s: float) -> Sound | None:
    if not request.is_required:
        return None
    return Sound(np.zeros(request.window.num_samples, np.int16), (), duration_s)


def _sample(time_s: float, rate: int, num_samples: int | None = None) -> int:
    index = max(round(time_s * rate), 0)
    return index if num_samples is None else min(index, num_samples)


def _is_clearly_less(found_s: float, wanted_s: float) -> bool:
    return wanted_s - found_s > max(0.5, 0.05 * wanted_s)


def _picture_begin_s(container: InputContainer) -> float | None:
    # the container's time of the first picture, as the header has it
    picture = find_picture(container)
    if picture is None:
        return None
    return float((picture.start_time or 0) * (picture.time_base or 0))


def _duration_s(container: InputContainer, stream: AudioStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if clock := _CLOCK.match(stream.metadata.get("DURATION", "")):
        # Matroska's, of one track: the time at its end
        hours, minutes, seconds = map(float, clock.groups())
        begin_s = float((stream.start_time or 0) * (stream.time_base or 0))
        return hours * 3600 + minutes * 60 + seconds - begin_s
    if container.duration is not None and find_picture(container) is None:
        return container.duration / av.time_base
    return None


def _promised_s(container: InputContainer, stream: AudioStream) -> float | None:
    is_true = not _TRUE_LENGTHS.isdisjoint(container.format.name.split(","))
    return _duration_s(container, stream) if is_true else None
