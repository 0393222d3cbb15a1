"""One clip of the world -> an mp4 file: H.264, and AAC where it has a track."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from vla2cli.errors import Vla2Error
from vla2cli.world.clip import WorldClip
from vla2cli.world.facts import DURATION_S, generator
from vla2cli.world.sound import SAMPLE_RATE

SIDE = 320  # pixels
FPS = 10
NUM_FRAMES = round(DURATION_S * FPS)
# what the clip's own generators do not use
_TRACK, _SHUFFLING = 6, 7
_NO_TRACK_SHARE = 1 / 3  # of the silent clips; the others have a silent track
_CRF = "23"  # x264's default: about 40 kB with the sound
_X264 = "mbtree=0"  # which does not give the same bytes each time
_SOUND_BIT_RATE = 48_000


def encode(
    clip: WorldClip, path: Path, *, is_muted: bool = False, is_shuffled: bool = False
) -> None:
    """Write a clip; the same clip gives the same bytes with the same FFmpeg.

    Args:
        clip: drawn at the middle of each of its frames.
        path: what stands there is overwritten.
        is_muted: its track, where it has one, is silent; the picture is the same.
        is_shuffled: its frames come in an order that chance has drawn for this clip; the sound is
            the same.

    Raises:
        Vla2Error: the file cannot be written.
    """
    order = _shuffle(clip) if is_shuffled else np.arange(NUM_FRAMES)
    frames = clip.frames(((order + 0.5) / NUM_FRAMES).tolist(), SIDE)
    track = clip.track() if has_track(clip) else None
    if track is not None and is_muted:
        track = np.zeros_like(track)
    try:
        _write(path, frames, track)
    except (av.error.FFmpegError, OSError) as error:
        raise Vla2Error(f"cannot write '{path}': {str(error.strerror).lower()}") from error


def has_track(clip: WorldClip) -> bool:
    """Tell whether the file has a track of sound at all; chance decides for a silent clip."""
    rng = generator(clip.seed, clip.index, clip.split, purpose=_TRACK)
    return clip.facts.sound is not None or bool(rng.random() >= _NO_TRACK_SHARE)


def _shuffle(clip: WorldClip) -> NDArray[np.int64]:
    rng = generator(clip.seed, clip.index, clip.split, purpose=_SHUFFLING)
    return rng.permutation(NUM_FRAMES)


def _write(path: Path, frames: NDArray[np.uint8], track: NDArray[np.int16] | None) -> None:
    # bitexact: FFmpeg's version would stand in the file
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream("libx264", FPS, options={"crf": _CRF, "x264-params": _X264})
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        video.thread_count = 1  # the bytes would depend on the number of threads
        if track is not None:
            # before the first packet of either stream: that one writes the header of both; 16 kHz
            # needs no resampling and comes back nearer to what was made than 44.1 kHz
            sound = container.add_stream(
                "aac", SAMPLE_RATE, layout="mono", bit_rate=_SOUND_BIT_RATE
            )
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(video.encode(None))
        if track is not None:
            samples = av.AudioFrame.from_ndarray(track[None], "s16", "mono")
            samples.sample_rate = SAMPLE_RATE
            samples.pts = 0  # else the encoder's delay, 64 ms of silence, would be heard first
            container.mux(sound.encode(samples))
            container.mux(sound.encode(None))
