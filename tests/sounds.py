"""Files of sound and moving pictures, made on the spot; sound as mathematics has it."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 16000


def tone(hertz, seconds, rate=RATE, level=0.5):
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def level_at(samples, hertz, rate=RATE):
    """The amplitude of one frequency, by projection on it."""
    phase = np.exp(-2j * np.pi * hertz * np.arange(len(samples)) / rate)
    return 2 * abs(phase @ samples) / len(samples)


def write_wav(path, channels, rate=RATE, kind="s16"):
    """Write a plain RIFF file; values are integers of the kind, or floats."""
    tag, bits = {"u8": (1, 8), "s16": (1, 16), "s24": (1, 24), "s32": (1, 32), "f32": (3, 32)}[kind]
    values = np.stack(channels, axis=1)
    if kind == "f32":
        data = values.astype("<f4").tobytes()
    else:
        wide = values.astype("<i4")
        data = np.ascontiguousarray(wide[..., None].view(np.uint8)[..., : bits // 8]).tobytes()
    num = len(channels)
    head = struct.pack("<HHIIHH", tag, num, rate, rate * num * bits // 8, num * bits // 8, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head
    body += b"data" + struct.pack("<I", len(data)) + data
    Path(path).write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return str(path)


def s16(samples):
    return np.round(np.asarray(samples) * 32767).astype(np.int16)


LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def write_media(path, *tracks, picture_s=None, **kwargs):
    """Write a file of tracks: codec, channels, rate, and if need be start_s and disposition."""
    with av.open(str(path), "w", **kwargs) as container:
        pictures = []
        if picture_s is not None:
            picture = container.add_stream(
                "libvpx" if str(path).endswith("webm") else "libx264", rate=25
            )
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")
            pictures = [(picture, frame)]
        streams = []
        for codec, channels, rate, *more in tracks:
            layout = LAYOUTS[len(channels)]
            stream = container.add_stream(codec, rate=rate, layout=layout)
            if len(more) > 1:
                stream.disposition = more[1]
            if codec == "wmav2":
                stream.bit_rate = 128_000  # it knows no default
            streams.append((stream, channels, rate, more[0] if more else 0.0))
        packets = []
        for stream, frame in pictures:
            for i in range(round(picture_s * 25)):
                frame.pts, frame.time_base = i, Fraction(1, 25)
                packets += stream.encode(frame)
            packets += stream.encode()
        for stream, channels, rate, start_s in streams:
            planar = np.stack(channels).astype(np.float32)
            layout = LAYOUTS[len(channels)]
            first = round(start_s * rate)
            for i in range(0, planar.shape[1], rate):
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(planar[:, i : i + rate]), "fltp", layout
                )
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame.pts = first + i
                packets += stream.encode(frame)
            packets += stream.encode()
        container.mux(sorted(packets, key=lambda p: float(p.dts * p.time_base)))
    return str(path)


def write_movie(path, *tracks, picture_s=2.0, **kwargs):
    return write_media(path, *tracks, picture_s=picture_s, **kwargs)


def spoil(path, first, last, fill=0xFF):
    """Overwrite the packets of the sound from the `first` to before the `last`."""
    with av.open(path) as container:
        packets = [(p.pos, p.size) for p in container.demux(audio=0) if p.size]
    with Path(path).open("r+b") as file:
        for pos, size in packets[first:last]:
            file.seek(pos)
            file.write(bytes([fill]) * size)
    return len(packets)


def patch_codec(path):
    data = Path(path).read_bytes()
    assert data.count(b"mp4a") >= 1
    Path(path).write_bytes(data.replace(b"mp4a", b"zzzz").replace(b"esds", b"free"))
