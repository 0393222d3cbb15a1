"""Videos through PyAV: the true frame for every index, by seeking where that is exact.

The file is read once, decoding its sound but no picture, to list the presentation times of its
frames. Each wanted frame is then reached by a seek to the key frame before it and known by its
exact time. Files whose times cannot be trusted, or where a seek misses, are decoded from the start
instead.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vla2cli.errors import InputError
from vla2cli.media.container import (
    av_errors,
    find_picture,
    find_sound,
    open_container,
    packets,
    undecodable,
)
from vla2cli.media.records import Frames, Probe, SoundRequest
from vla2cli.media.sampling import sample_indices
from vla2cli.media.sound import Track, cut_track, open_track

_NEAR_FRAMES = 8  # closer than this, decoding on is cheaper than a seek
_SEEK_TRIES = 3  # each starts one key frame earlier: open GOPs need one more, MPEG-TS sometimes two
_PARTIAL = "partial-video"


@dataclass(frozen=True)
class _Table:
    pts: list[int] | None  # ascending, one per frame; None where they are missing or doubled
    key_pts: list[int]  # those of key frames
    num_total: int
    fps: float
    time_base: float  # seconds per unit of pts
    is_partial: bool  # the header promises more, or a packet is damaged


@dataclass
class _Decoded:
    images: dict[int, NDArray[np.uint8]]  # by the index asked for
    used: dict[int, int]  # index asked for: index of the frame that was to be had
    is_damaged: bool = False


def read_video(
    path: str,
    num_frames: int | None,
    start_s: float | None,
    end_s: float | None,
    sound: SoundRequest | None = None,
) -> Frames:
    """Sample a video; a damaged one gives what can be had and the flag "partial-video".

    Raises:
        InputError: no frame can be decoded, or the range holds none.
    """

    def sample(table: _Table) -> list[int]:
        indices: list[int] = sample_indices(
            table.num_total, table.fps, num_frames, start_s, end_s
        ).tolist()
        return indices

    with av_errors():
        with open_container(path) as container:
            stream = _require_picture(container)
            track = None if sound is None else open_track(container, sound)
            table = _scan(container, stream, track)
            if track is not None:
                track.finish()
            first_s = _first_s(stream, table)
            picked = sample(table)
            decoded = None
            if table.pts is not None:
                decoded = _decode_by_seeking(container, stream, table, sorted(set(picked)))
        if decoded is None:
            table, picked, decoded = _decode_from_start(path, table, sample)
    frames = _as_frames(table, picked, decoded)
    if sound is None:
        return frames
    heard, flags = cut_track(track, sound, first_s, frames.duration_s)
    return replace(frames, sound=heard, flags=(*frames.flags, *flags))


def probe_video(path: str) -> Probe:
    """Tell a video's size and length, and whether it has sound.

    Raises:
        InputError: the file is no video.
    """
    with av_errors(), open_container(path) as container:
        stream = _require_picture(container)
        has_sound = find_sound(container) is not None
        table = _scan(container, stream)
        width, height = stream.codec_context.width, stream.codec_context.height
    duration_s = _duration_s(table)
    return Probe("video", table.num_total, table.fps, duration_s, width, height, has_sound)


def _require_picture(container: InputContainer) -> VideoStream:
    stream = find_picture(container)
    if stream is not None:
        if stream.codec_context is None:
            raise undecodable("no decoder for the picture in this file")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = 2  # as the reference; there are several workers
        return stream
    message = "no video stream in this file"
    if find_sound(container) is not None:
        message = "this file has sound but no picture; a model with ears takes --modality audio"
    raise InputError(message, kind="no-video", stage="decode")


def _scan(container: InputContainer, stream: VideoStream, track: Track | None = None) -> _Table:
    # the sound is decoded as it comes by: the file is read once for both
    times: list[int | None] = []
    keys: list[int] = []
    is_partial = False
    num_hidden = 0
    streams = [stream] if track is None else [stream, track.stream]
    for packet in packets(container, *streams):
        if packet is None:  # the file ends in the middle of something
            is_partial = True
            if track is not None:
                track.is_damaged = True
            break
        if track is not None and packet.stream_index == track.stream.index:
            track.feed(packet)
            continue
        if packet.is_discard:  # cut off by an mp4 edit list: decoded, never shown
            num_hidden += 1
            continue
        is_partial |= packet.is_corrupt
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
        times.append(packet.pts)
    is_partial |= _promises_more(stream, len(times) + num_hidden)
    pts = _trusted_pts(times, keys)
    return _Table(
        pts=pts,
        key_pts=sorted(keys),
        num_total=len(times) if pts is None else len(pts),
        fps=_fps(stream),
        time_base=float(stream.time_base or 0),
        is_partial=is_partial,
    )


def _trusted_pts(times: list[int | None], keys: list[int]) -> list[int] | None:
    known = [pts for pts in times if pts is not None]
    if not keys or len(known) < len(times) or len(set(known)) < len(known):
        return None
    # a stream cut out of a longer one starts with frames that refer to what is not there
    return sorted(pts for pts in known if pts >= keys[0])


def _promises_more(stream: VideoStream, num_found: int) -> bool:
    promised: float = stream.frames
    if not promised and stream.duration and stream.time_base and stream.average_rate:
        promised = float(stream.duration * stream.time_base * stream.average_rate)
    # frame counts in headers are often off by one or two, and durations are rounded
    return num_found < 0.95 * promised - 2


def _fps(stream: VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else 25.0  # FFmpeg's own assumption for streams that do not say


def _first_s(stream: VideoStream, table: _Table) -> float:
    # where the picture begins in the container's time
    return (table.pts[0] if table.pts else stream.start_time or 0) * table.time_base


def _duration_s(table: _Table) -> float:
    if not table.pts:
        return table.num_total / table.fps
    return (table.pts[-1] - table.pts[0]) * table.time_base + 1 / table.fps


def _decode_by_seeking(
    container: InputContainer, stream: VideoStream, table: _Table, wanted: list[int]
) -> _Decoded | None:
    # None: some frame was not met at its exact time
    assert table.pts is not None
    decoded = _Decoded({}, {})
    cursor = _Cursor(container, stream)
    for index in wanted:
        try:
            frame = _reach(cursor, table, index)
        except MemoryError:
            raise
        except (av.error.FFmpegError, OSError):
            frame = None
        if frame is None:
            return None
        decoded.is_damaged |= frame.is_corrupt
        decoded.images[index], decoded.used[index] = _to_rgb(frame), index
    return decoded


def _reach(cursor: "_Cursor", table: _Table, index: int) -> VideoFrame | None:
    assert table.pts is not None
    pts = table.pts[index]
    key_idx = bisect_right(table.key_pts, pts) - 1
    if cursor.last_pts is not None:
        is_near = index - bisect_right(table.pts, cursor.last_pts) < _NEAR_FRAMES
        if (is_near or table.key_pts[key_idx] <= cursor.last_pts) and (
            frame := cursor.decode_to(pts)
        ):
            return frame
    for back in range(_SEEK_TRIES):
        cursor.seek(pts if back == 0 else table.key_pts[max(key_idx - back, 0)])
        if frame := cursor.decode_to(pts):
            return frame
    return None


class _Cursor:
    """A place in a stream: frames come out in the order of their times."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container, self.stream = container, stream
        self.frames: Iterator[VideoFrame] = iter(())
        self.last_pts: int | None = None

    def seek(self, pts: int) -> None:
        self.container.seek(pts, stream=self.stream, backward=True)
        self.frames = self.container.decode(self.stream)
        self.last_pts = None

    def decode_to(self, pts: int) -> VideoFrame | None:
        for frame in self.frames:
            self.last_pts = frame.pts
            if frame.pts is None or frame.pts >= pts:
                return frame if frame.pts == pts else None
        return None


def _decode_from_start(
    path: str, table: _Table, sample: Callable[[_Table], list[int]]
) -> tuple[_Table, list[int], _Decoded]:
    picked = sample(table)
    decoded, seen = _decode_in_order(path, table, picked)
    if not seen:
        raise undecodable("no frame can be decoded")
    found = [pts for pts in seen if pts is not None]
    is_timed = len(found) == len(seen) and all(a < b for a, b in pairwise(found))
    counted = _Table(
        pts=found if is_timed else None,
        key_pts=[],
        num_total=len(seen),
        fps=table.fps,
        time_base=table.time_base,
        is_partial=table.is_partial or decoded.is_damaged,
    )
    if decoded.is_damaged and table.pts is not None and set(seen) <= set(table.pts):
        return table, picked, decoded
    if (counted.pts, counted.num_total) != (table.pts, table.num_total):
        # packets and frames differ in number: what a full decode gives is the truth
        picked = sample(counted)
        decoded, _ = _decode_in_order(path, counted, picked)
    return counted, picked, decoded


def _decode_in_order(
    path: str, table: _Table, picked: list[int]
) -> tuple[_Decoded, list[int | None]]:
    # wanted frames that do not come are replaced by the nearest one before, else the first after
    decoded = _Decoded({}, {})
    wanted = sorted(set(picked), reverse=True)  # the next one last
    positions = {pts: i for i, pts in enumerate(table.pts)} if table.pts is not None else None
    seen: list[int | None] = []
    previous: tuple[int, VideoFrame] | None = None

    def take(index: int, source: tuple[int, VideoFrame]) -> None:
        decoded.images[index] = _to_rgb(source[1])
        decoded.used[index] = source[0]
        decoded.is_damaged |= source[1].is_corrupt or source[0] != index

    with open_container(path) as container:
        stream = _require_picture(container)
        for frame in _all_frames(container, stream, decoded):
            seen.append(frame.pts)
            if positions is None:
                position = len(seen) - 1
            elif frame.pts in positions:
                position = positions[frame.pts]
            else:
                continue  # the caller sees it in `seen` and counts again
            while wanted and wanted[-1] < position:
                take(wanted.pop(), previous or (position, frame))
            if wanted and wanted[-1] == position:
                take(wanted.pop(), (position, frame))
            previous = position, frame
    while wanted and previous:
        take(wanted.pop(), previous)
    return decoded, seen


def _all_frames(
    container: InputContainer, stream: VideoStream, decoded: _Decoded
) -> Iterator[VideoFrame]:
    # goes on after a damaged packet, which container.decode() does not
    for packet in packets(container, stream):
        if packet is None:
            decoded.is_damaged = True
            break
        try:
            yield from stream.codec_context.decode(packet)
        except (av.error.InvalidDataError, av.error.EOFError):
            decoded.is_damaged = True
    try:
        yield from stream.codec_context.decode(None)
    except (av.error.InvalidDataError, av.error.EOFError):
        decoded.is_damaged = True


def _to_rgb(frame: VideoFrame) -> NDArray[np.uint8]:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns), dtype=np.uint8)


def _as_frames(table: _Table, picked: list[int], decoded: _Decoded) -> Frames:
    used = tuple(decoded.used[index] for index in picked)
    if table.pts is None:
        timestamps_s = tuple(index / table.fps for index in used)
    else:
        timestamps_s = tuple((table.pts[i] - table.pts[0]) * table.time_base for i in used)
    return Frames(
        images=[decoded.images[index] for index in picked],
        indices=used,
        timestamps_s=timestamps_s,
        num_total=table.num_total,
        fps=table.fps,
        duration_s=_duration_s(table),
        decoder="pyav",
        flags=(_PARTIAL,) if table.is_partial or decoded.is_damaged else (),
    )
