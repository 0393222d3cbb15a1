"""One entry to a file's pictures: videos, .gif files, folders of frames, single images."""

from dataclasses import replace
from pathlib import Path

from vla2cli.media import stills
from vla2cli.media.decord_video import read_decord
from vla2cli.media.files import check_file
from vla2cli.media.records import Frames, Probe, SoundRequest
from vla2cli.media.sound import cut_track, is_sound, probe_sound, read_track
from vla2cli.media.video import probe_video, read_video

__all__ = ["DECODERS", "KINDS", "Frames", "Probe", "find_kind", "probe", "read_frames"]

DECODERS = ("pyav", "decord")
KINDS = ("video", "image", "audio", "unknown")


def read_frames(
    path: str,
    kind: str,
    *,
    num_frames: int | None,
    start_s: float | None = None,
    end_s: float | None = None,
    decoder: str = "pyav",
    sound: SoundRequest | None = None,
) -> Frames:
    """Read the frames of a file that the model is to see, and what it is to hear with them.

    Args:
        path: a file, or a folder of pictures as a video of 3 frames a second.
        kind: video, image, or unknown to look into the file.
        num_frames: spread so many over the range, at most 32 are kept; None takes one a second.
        start_s: start of the range; for pictures without meaning.
        end_s: end of the range.
        decoder: pyav or decord, for videos; the sound is PyAV's with both.
        sound: what is heard of a video's track; None for nothing.

    Raises:
        InputError: the file cannot be used; of kind "no-video" where it is only to be heard.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is '{decoder}', expected one of {DECODERS}")
    check_file(path, allow_folder=kind != "image")
    is_image = find_kind(path, kind) == "image"
    if not is_image and not Path(path).is_dir() and not _is_gif(path):
        if decoder == "pyav":
            return read_video(path, num_frames, start_s, end_s, sound)
        frames = read_decord(path, num_frames, start_s, end_s)
        heard = None if sound is None else read_track(path, sound, frames.duration_s)
    else:
        if is_image:
            frames = stills.read_image(path)
        elif Path(path).is_dir():
            frames = stills.read_folder(path, num_frames, start_s, end_s)
        else:
            frames = stills.read_gif(path, num_frames, start_s, end_s)
        heard = None if sound is None else cut_track(None, sound, 0.0, 0.0)
    if heard is None:
        return frames
    return replace(frames, sound=heard[0], flags=(*frames.flags, *heard[1]))


def probe(path: str, kind: str) -> Probe:
    """Tell what a file is and how long, as `read_frames` would count it with PyAV.

    Raises:
        InputError: the file cannot be used.
    """
    check_file(path, allow_folder=kind not in ("image", "audio"))
    found = find_kind(path, kind)
    if found == "image":
        return stills.probe_image(path)
    if found == "audio":
        return probe_sound(path)
    if Path(path).is_dir():
        return stills.probe_folder(path)
    return stills.probe_gif(path) if _is_gif(path) else probe_video(path)


def find_kind(path: str, kind: str) -> str:
    """Return `kind`, or look into the file where it is unknown.

    An image is what Pillow can read, audio what FFmpeg finds sound and no picture in.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is '{kind}', expected one of {KINDS}")
    if kind != "unknown":
        return kind
    if Path(path).is_dir():
        return "video"
    if stills.is_image(path):
        return "image"
    return "audio" if is_sound(path) else "video"


def _is_gif(path: str) -> bool:
    # lower case only, as upstream; PyAV reads the others, at their own frame rate
    return path.endswith(".gif")
