"""Frames to `pixel_values`, as the reference's image processors do, and sound to its fbank.

Source: transformers 4.40.0, `CLIPImageProcessor` and `SiglipImageProcessor`; bit for bit the same.
Pillow alone: the resize works on uint8 with an antialiased filter. Another resampler moves values
by 1/255, which the vision tower notices. The fbank is torchaudio's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_BICUBIC = 3
_STEPS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class FrameGeometry:
    """How a frame becomes the input of one vision tower."""

    height: int  # of the result, pixels
    width: int
    # CLIP: resize the shorter edge to this, then cut (height, width) from the centre;
    # None, SigLIP: resize to (height, width), whatever the shape
    shortest_edge: int | None
    image_mean: tuple[float, float, float]  # RGB, of values in [0, 1]
    image_std: tuple[float, float, float]
    rescale_factor: float = 1 / 255
    resample: int = _BICUBIC  # Pillow's number for the filter
    is_padded: bool = (
        False  # to a square first, as in upstream's fine-tuning; never when it answers
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FrameGeometry":
        """Read a checkpoint's `preprocessor_config.json`, in its old or its new form.

        Raises:
            ValueError: the file asks for something that no VideoLLaMA 2 tower does.
        """
        is_clip = _is_clip(config)
        for step in _STEPS:
            if not config.get(step, True):
                raise ValueError(f"'{step}' is false, expected true")
        size = config.get("size", 224 if is_clip else {"height": 224, "width": 224})
        if is_clip:
            shortest_edge: int | None = _shortest_edge(size)
            height, width = _height_width(config.get("crop_size", 224), "crop_size")
        else:
            shortest_edge = None
            height, width = _height_width(size, "size")
        image_std = _three(config.get("image_std", _CLIP_STD if is_clip else _HALF))
        if not all(image_std):
            raise ValueError(f"'image_std' is {list(image_std)}, expected numbers other than 0")
        return cls(
            height=height,
            width=width,
            shortest_edge=shortest_edge,
            image_mean=_three(config.get("image_mean", _CLIP_MEAN if is_clip else _HALF)),
            image_std=image_std,
            rescale_factor=_number(config.get("rescale_factor", 1 / 255), "rescale_factor"),
            resample=_filter(config.get("resample", _BICUBIC)),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "FrameGeometry":
        """Rebuild from `dataclasses.asdict`, also after a trip through JSON."""
        mean, std = _three(fields["image_mean"]), _three(fields["image_std"])
        return cls(**{**fields, "image_mean": mean, "image_std": std})


def fit_frame(image: NDArray[np.uint8], geometry: FrameGeometry) -> NDArray[np.uint8]:
    """Resize and cut one frame.

    Args:
        image: (H, W, 3) RGB.
        geometry: where to.

    Returns:
        (height, width, 3) RGB, black where the resized frame does not reach.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"frame has shape {image.shape}, expected (H, W, 3)")
    if geometry.is_padded:
        image = expand_to_square(image, geometry.image_mean)
    height, width = _resized_shape(image.shape[0], image.shape[1], geometry)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling(geometry.resample))
    return _crop_centre(np.asarray(resized), geometry.height, geometry.width)


def expand_to_square(image: NDArray[np.uint8], mean: Sequence[float]) -> NDArray[np.uint8]:
    """Centre a frame on a square of the mean colour, as upstream's fine-tuning did ('pad').

    Args:
        image: (H, W, 3) RGB.
        mean: the tower's `image_mean`.

    Returns:
        (S, S, 3) RGB, S the longer edge.
    """
    height, width, _ = image.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    colour = [int(255 * channel) for channel in mean]
    square = np.full((side, side, 3), colour, np.uint8)
    square[top : top + height, left : left + width] = image
    return square


def normalise(crops: NDArray[np.uint8], geometry: FrameGeometry) -> NDArray[np.float32]:
    """Turn fitted frames into the tower's input.

    Args:
        crops: (T, S, S, 3) RGB.
        geometry: whose mean and deviation.

    Returns:
        (T, 3, S, S) float32, contiguous.
    """
    T, height, width, _ = crops.shape
    pixel_values = np.empty((T, 3, height, width), np.float32)
    for channel, table in enumerate(_value_tables(geometry)):
        np.take(table, crops[..., channel], out=pixel_values[:, channel], mode="clip")
    return pixel_values


def fbank(waveform: NDArray[Any]) -> "Tensor":
    """Turn sound into the encoder's input: log-mel energies, one row every 10 ms.

    Args:
        waveform: (n,) 16 kHz mono: int16, computed in float32, or float64 in [-1, 1), computed in
            float64, as the reference does for a video's track and for an audio file.

    Returns:
        (1 + (n - 400) // 160, 128) bfloat16.

    Source: upstream VideoLLaMA2, branch audio_visual @8cedfbd, mm_utils.py, `process_audio_file`.
    """
    # those who only decode, and --help, do not wait for torch
    import torch
    from torchaudio.compliance import kaldi

    is_known = waveform.dtype in (np.int16, np.float64)
    if not is_known or waveform.ndim != 1 or len(waveform) < 400:
        found = f"{waveform.dtype} {waveform.shape}"
        raise ValueError(f"waveform is {found}, expected at least (400,) int16 or float64")
    if waveform.dtype == np.int16:
        samples = torch.from_numpy(waveform.astype(np.float32))  # n / 2**15 * 2**15, exactly
    else:
        samples = torch.from_numpy(waveform * 2.0**15)
    rows: Tensor = kaldi.fbank(
        samples[None],
        num_mel_bins=128,
        sample_frequency=16000,
        frame_length=25,
        frame_shift=10,
    )
    # half precision this early costs more than all later roundings: the checkpoint expects it
    return rows.to(torch.bfloat16)


def _value_tables(geometry: FrameGeometry) -> NDArray[np.float32]:
    # (3, 256): a byte has few values, so a table is exact and as fast as the arithmetic is not;
    # the product is rounded to float32 before the mean is taken off, as the processors do
    scaled = (np.arange(256, dtype=np.float64) * geometry.rescale_factor).astype(np.float32)
    mean = np.array(geometry.image_mean, np.float32)[:, None]
    std = np.array(geometry.image_std, np.float32)[:, None]
    return (scaled - mean) / std


def _resized_shape(height: int, width: int, geometry: FrameGeometry) -> tuple[int, int]:
    short = geometry.shortest_edge
    if short is None:
        return geometry.height, geometry.width
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def _crop_centre(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    # a side that is too short gives a negative offset; floor division puts its odd pixel in front
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        return np.ascontiguousarray(image[top : top + height, left : left + width])
    canvas = np.zeros((height, width, 3), np.uint8)
    part = image[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    y, x = max(-top, 0), max(-left, 0)
    canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
    return canvas


def _is_clip(config: Mapping[str, Any]) -> bool:
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    crops = bool(config.get("do_center_crop", "crop_size" in config))
    if name is None:
        return crops
    is_clip = str(name).startswith("CLIP")
    if not is_clip and not str(name).startswith("Siglip"):
        raise ValueError(f"image processor '{name}' is not known, expected a CLIP or SigLIP one")
    # CLIP's processors crop unless told otherwise, SigLIP's never
    if bool(config.get("do_center_crop", is_clip)) != is_clip:
        raise ValueError(f"'do_center_crop' is {not is_clip}, expected {is_clip} for '{name}'")
    return is_clip


def _shortest_edge(size: Any) -> int:
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        size = size["shortest_edge"]
    return _positive(size, "size", "a number or {'shortest_edge': number}")


def _height_width(size: Any, name: str) -> tuple[int, int]:
    expected = "a number or {'height': number, 'width': number}"
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return _positive(size["height"], name, expected), _positive(size["width"], name, expected)
    side = _positive(size, name, expected)
    return side, side


def _positive(value: Any, name: str, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"'{name}' is {value!r}, expected {expected}")
    return value


def _three(values: Any) -> tuple[float, float, float]:
    if not isinstance(values, Sequence) or len(values) != 3:
        raise ValueError(f"'image_mean' or 'image_std' is {values!r}, expected three numbers")
    r, g, b = (_number(value, "image_mean' or 'image_std") for value in values)
    return r, g, b


def _number(value: Any, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"'{name}' holds {value!r}, expected a number")
    return float(value)


def _filter(resample: Any) -> int:
    known = [int(member) for member in Image.Resampling]
    if resample not in known:
        raise ValueError(f"'resample' is {resample!r}, expected one of {known}")
    return int(resample)
