"""Open a media file through PyAV, and say in one line what is wrong with it.

Pictures and sound share one opening: who reads both opens the file once.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from vla2cli.errors import InputError

_HLS = b"#EXTM3U"

logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False
av.logging.set_level(None)


@contextmanager
def av_errors() -> Iterator[None]:
    """Turn PyAV's errors into an InputError with FFmpeg's reason."""
    try:
        yield
    except MemoryError as error:  # PyAV's own ENOMEM is one as well
        message = "not enough memory to decode this file"
        raise InputError(message, kind="memory", stage="decode") from error
    # UnicodeDecodeError comes from odd metadata, EOFError from files that end in their header
    except (av.error.FFmpegError, ValueError, OSError, EOFError) as error:
        raise undecodable(_reason(error)) from error


def undecodable(reason: str) -> InputError:
    """Return the error of a file that no decoder takes."""
    return InputError(f"cannot decode: {reason}", kind="decode", stage="decode")


@contextmanager
def open_container(path: str) -> Iterator[InputContainer]:
    """Open a plain file, and nothing that it may point to; to be used within `av_errors`."""
    with Path(path).open("rb") as file:
        if file.read(len(_HLS)) == _HLS:  # FFmpeg would retry its parts for minutes
            raise undecodable("this is a playlist, not a video")
    # FFmpeg's words are kept only while opening, for the message: during decoding its threads log
    av.logging.set_level(av.logging.ERROR)
    try:
        # a playlist may name other files or the network: only plain files are followed
        container = av.open(path, options={"protocol_whitelist": "file"})
    finally:
        av.logging.set_level(None)
    with container:
        yield container


def find_picture(container: InputContainer) -> VideoStream | None:
    """Return the first video stream that is not the cover picture of a song."""
    cover = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & cover), None)


def find_sound(container: InputContainer) -> AudioStream | None:
    """Return the audio stream that the `ffmpeg` command takes, of those with a known codec.

    The default one, else the one with most channels, the first of several. PyAV's own choice is
    the first, or the one of the highest bit rate.
    """
    # no codec context: FFmpeg does not know the codec; no rate: it found no packet to learn it from
    streams = [
        s
        for s in container.streams.audio
        if s.codec_context is not None and s.codec_context.sample_rate
    ]
    is_default = av.stream.Disposition.default
    return max(
        streams,
        key=lambda s: (
            not _is_empty(s),
            bool(s.disposition & is_default),
            s.codec_context.channels,
        ),
        default=None,
    )


def packets(container: InputContainer, *streams: Any) -> Iterator["av.Packet[Any] | None"]:
    """Yield the packets of some streams; None at the end where the file breaks off in one."""
    try:
        for packet in container.demux(*streams):
            if packet.size:  # the last one is empty: it asks the decoder for what it still holds
                yield packet
    except MemoryError:
        raise
    except IndexError as error:  # damaged MPEG-TS: PyAV holds fewer streams than FFmpeg
        raise undecodable("the file's streams contradict each other") from error
    except (av.error.FFmpegError, OSError):
        yield None


def _is_empty(stream: AudioStream) -> bool:
    # an mp4 track without a sample; ffmpeg prefers streams of which it saw packets while probing
    return stream.duration == 0


def _reason(error: Exception) -> str:
    log = getattr(error, "log", None)  # (level, module, text) of FFmpeg's last complaint
    if log and log[2].strip():
        return str(log[2].strip().splitlines()[-1])
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
