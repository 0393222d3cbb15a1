"""Pictures through Pillow: one image, the frames of a .gif, a folder of images as a video.

Source: upstream VideoLLaMA2@c0bb03a, mm_utils.py, `process_video` and `process_image`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vla2cli.errors import InputError
from vla2cli.media.files import check_file, list_folder
from vla2cli.media.records import Frames, Probe
from vla2cli.media.sampling import MAX_FRAMES, sample_indices

GIF_FPS = 25.0  # upstream's, whatever the file says
FOLDER_FPS = 3.0
# what photographs come in; left out on purpose: EPS, which Pillow hands to ghostscript to run
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM"),
    *("SGI", "TGA", "TIFF", "WEBP", "XBM"),
)


def read_image(path: str) -> Frames:
    """Read one picture as RGB; an orientation note in its EXIF data is not applied, as upstream.

    Raises:
        InputError: the file is not a whole picture.
    """
    with _open_image(path) as image:
        pixels = _to_rgb(image)
    return Frames([pixels], (0,), (0.0,), 1, 0.0, 0.0, "pillow")


def read_gif(
    path: str, num_frames: int | None, start_s: float | None, end_s: float | None
) -> Frames:
    """Sample a .gif; a frame chosen twice is taken once and black frames fill up, as upstream.

    Raises:
        InputError: the file cannot be decoded, or the time range holds no frame.
    """
    with _open_image(path) as image:
        num_total = getattr(image, "n_frames", 1)
        # the cut to 32 comes after the doubles are gone
        picked = sample_indices(num_total, GIF_FPS, num_frames, start_s, end_s, max_frames=None)
        indices = tuple(np.unique(picked)[:MAX_FRAMES].tolist())
        images = []
        for index in indices:
            image.seek(index)
            images.append(_to_rgb(image))
    if num_frames is not None:
        images = pad_with_black(images, min(num_frames, MAX_FRAMES))
    return _as_video(images, indices, num_total, GIF_FPS)


def read_folder(
    path: str, num_frames: int | None, start_s: float | None, end_s: float | None
) -> Frames:
    """Sample a folder of pictures as a video of 3 frames a second.

    Raises:
        InputError: the folder is empty, a chosen entry is no picture, or the range holds no frame.
    """
    entries = list_folder(path)
    picked = sample_indices(len(entries), FOLDER_FPS, num_frames, start_s, end_s)
    images: dict[int, NDArray[np.uint8]] = {}
    for index in np.unique(picked).tolist():
        with _in_folder(entries[index]):
            check_file(entries[index])
            images[index] = read_image(entries[index]).images[0]
    indices = tuple(picked.tolist())
    return _as_video([images[i] for i in indices], indices, len(entries), FOLDER_FPS)


def pad_with_black(images: list[NDArray[np.uint8]], num_frames: int) -> list[NDArray[np.uint8]]:
    """Append black frames up to `num_frames`, each as wide as the one before it is high.

    Upstream swaps rows and columns each time; kept, since a frame's shape decides its crop.
    """
    padded = list(images)
    while len(padded) < num_frames:
        height, width, _ = padded[-1].shape
        padded.append(np.zeros((width, height, 3), np.uint8))
    return padded


def probe_image(path: str) -> Probe:
    """Tell a picture's size.

    Raises:
        InputError: the file is not a picture.
    """
    with _open_image(path) as image:
        return Probe("image", 1, 0.0, 0.0, image.width, image.height)


def probe_gif(path: str) -> Probe:
    """Tell a .gif's size and length at upstream's 25 frames a second."""
    with _open_image(path) as image:
        num_total = getattr(image, "n_frames", 1)
        return Probe("video", num_total, GIF_FPS, num_total / GIF_FPS, image.width, image.height)


def probe_folder(path: str) -> Probe:
    """Tell the length of a folder of frames, and the size of the first."""
    entries = list_folder(path)
    with _in_folder(entries[0]):
        check_file(entries[0])
        first = probe_image(entries[0])
    num_total = len(entries)
    return Probe("video", num_total, FOLDER_FPS, num_total / FOLDER_FPS, first.width, first.height)


def is_image(path: str) -> bool:
    """Whether Pillow knows the file as a picture that does not move."""
    try:
        with _open_image(path) as image:
            # animated WebP counts as a picture: FFmpeg cannot read it, Pillow gives its first frame
            return image.format not in ("GIF", "PNG") or getattr(image, "n_frames", 1) == 1
    except InputError:
        return False


@contextmanager
def _open_image(path: str) -> Iterator[Image.Image]:
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF is missing in some builds
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on, and refuses at twice that: only the refusal counts
            warnings.simplefilter("ignore")
            with Image.open(path, formats=formats) as image:
                yield image
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(
            "not enough memory for this picture", kind="memory", stage="decode"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError("this is not a picture", kind="decode", stage="decode") from error
    # Pillow's parsers let any error of theirs through (struct.error, IndexError, SyntaxError, ...)
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot decode: {detail}", kind="decode", stage="decode") from error


@contextmanager
def _in_folder(entry: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        name = Path(entry).name
        raise InputError(f"'{name}': {error}", kind=error.kind, stage=error.stage) from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _as_video(
    images: list[NDArray[np.uint8]], indices: tuple[int, ...], num_total: int, fps: float
) -> Frames:
    timestamps_s = tuple(index / fps for index in indices)
    return Frames(images, indices, timestamps_s, num_total, fps, num_total / fps, "pillow")
