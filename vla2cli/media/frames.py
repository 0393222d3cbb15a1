"""One entry to the pictures of a file: videos, .gif files, folders of frames, single images."""

from pathlib import Path

from vla2cli.media import stills
from vla2cli.media.decord_video import read_decord
from vla2cli.media.files import check_file
from vla2cli.media.records import Frames, Probe
from vla2cli.media.video import probe_video, read_video

__all__ = ["DECODERS", "KINDS", "Frames", "Probe", "find_kind", "probe", "read_frames"]

DECODERS = ("pyav", "decord")
KINDS = ("video", "image", "unknown")


def read_frames(
    path: str,
    kind: str,
    *,
    num_frames: int | None,
    start_s: float | None = None,
    end_s: float | None = None,
    decoder: str = "pyav",
) -> Frames:
    """Read the frames of a file that the model is to see.

    Args:
        path: a file, or a folder of pictures as a video of 3 frames a second.
        kind: video, image, or unknown to look into the file.
        num_frames: spread so many over the range, at most 32 are kept; None takes one a second.
        start_s: start of the range; for pictures without meaning.
        end_s: end of the range.
        decoder: pyav or decord, for videos.

    Raises:
        InputError: the file cannot be used.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is '{decoder}', expected one of {DECODERS}")
    check_file(path, allow_folder=kind != "image")
    if find_kind(path, kind) == "image":
        return stills.read_image(path)
    if Path(path).is_dir():
        return stills.read_folder(path, num_frames, start_s, end_s)
    if _is_gif(path):
        return stills.read_gif(path, num_frames, start_s, end_s)
    read = read_decord if decoder == "decord" else read_video
    return read(path, num_frames, start_s, end_s)


def probe(path: str, kind: str) -> Probe:
    """Tell what a file is and how long, as `read_frames` would count it with PyAV.

    Raises:
        InputError: the file cannot be used.
    """
    check_file(path, allow_folder=kind != "image")
    if find_kind(path, kind) == "image":
        return stills.probe_image(path)
    if Path(path).is_dir():
        return stills.probe_folder(path)
    return stills.probe_gif(path) if _is_gif(path) else probe_video(path)


def find_kind(path: str, kind: str) -> str:
    """Return `kind`, or look into the file where it is unknown: image if Pillow can read it."""
    if kind not in KINDS:
        raise ValueError(f"kind is '{kind}', expected one of {KINDS}")
    if kind != "unknown":
        return kind
    return "video" if Path(path).is_dir() or not stills.is_image(path) else "image"


def _is_gif(path: str) -> bool:
    # lower case only, as upstream; PyAV reads the others, at their own frame rate
    return path.endswith(".gif")
