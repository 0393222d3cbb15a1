"""A clip to read where the user names none."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def make_video(path: Path, duration_s: int = 10, fps: int = 25) -> str:
    """Write a moving gradient of 1280 x 720 with a stereo tone, as H.264 and AAC."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=fps)
        picture.width, picture.height, picture.pix_fmt = 1280, 720, "yuv420p"
        sound = container.add_stream("aac", rate=48000, layout="stereo")
        ramp = np.add.outer(np.arange(720), np.arange(1280)).astype(np.uint8)[..., None]
        speed = np.array([5, 3, 1])
        for i in range(duration_s * fps):
            pixels = ramp + (i * speed).astype(np.uint8)  # beyond 255 it begins at 0 again
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        times = np.arange(duration_s * 48000) / 48000
        tone = (0.3 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        container.mux(sound.encode(frame))
        container.mux(picture.encode(None) + sound.encode(None))
    return str(path)
