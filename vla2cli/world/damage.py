"""What a codec does to pictures, so that a model does not learn from clean ones alone."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_JPEG_SHARE, _JPEG_QUALITY = 0.5, (30, 90)
_NOISE = 6.0  # at most, in grey levels


def spoil(frames: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Damage (T, S, S, 3) frames a little, as a codec does: noise, and half of them JPEG."""
    noisy = frames + rng.standard_normal(frames.shape, np.float32) * rng.uniform(0, _NOISE)
    frames = noisy.clip(0, 255).astype(np.uint8)
    if rng.random() >= _JPEG_SHARE:
        return frames
    quality = int(rng.integers(*_JPEG_QUALITY))
    return np.stack([_as_jpeg(frame, quality) for frame in frames])


def _as_jpeg(frame: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))
