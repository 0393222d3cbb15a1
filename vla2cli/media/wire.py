"""What the pool and its workers say to each other: a JSON header and raw bytes, never pickle.

A message is its two lengths, the header and the body. The receiver keeps a deadline for the whole
message, so that a worker which stops in the middle of one cannot hold its owner.
"""

import json
import socket
import struct
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from vla2_models.sound import SoundWindow
from vla2cli.media.records import Clip, ClipRequest, FileState, Sound, SoundRequest
from vla2cli.preprocess import FrameGeometry

_LENGTHS = struct.Struct("!QQ")


def send(sock: socket.socket, header: dict[str, Any], body: memoryview | bytes = b"") -> None:
    """Send one message; raises OSError when the other side is gone."""
    # JSON escapes surrogates, so that a path of any bytes arrives as it was
    sock.settimeout(None)  # `receive` leaves its own behind
    text = json.dumps(header).encode("ascii")
    sock.sendall(_LENGTHS.pack(len(text), len(body)) + text)
    sock.sendall(body)


def receive(sock: socket.socket, limit_s: float | None) -> tuple[dict[str, Any], bytearray]:
    """Receive one message.

    Raises:
        TimeoutError: it was not whole after `limit_s` seconds.
        EOFError: the other side is gone.
    """
    deadline = None if limit_s is None else time.monotonic() + limit_s
    header_size, body_size = _LENGTHS.unpack(_receive_exactly(sock, _LENGTHS.size, deadline))
    header: dict[str, Any] = json.loads(_receive_exactly(sock, header_size, deadline))
    return header, _receive_exactly(sock, body_size, deadline)


def _receive_exactly(sock: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if deadline is not None:
            # 0 would mean non-blocking; a message that is already there is still taken
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            count = sock.recv_into(view)
        except ConnectionResetError as error:
            raise EOFError from error
        if count == 0:
            raise EOFError
        view = view[count:]
    return data


def pack_request(request: ClipRequest) -> dict[str, Any]:
    """Turn a request into a header."""
    return asdict(request)


def unpack_request(header: dict[str, Any]) -> ClipRequest:
    """Rebuild a request from its header."""
    fields = dict(header)
    if fields["geometry"] is not None:
        fields["geometry"] = FrameGeometry.from_dict(fields["geometry"])
    if fields["sound"] is not None:
        window = SoundWindow(**fields["sound"]["window"])
        fields["sound"] = SoundRequest(**{**fields["sound"], "window": window})
    return ClipRequest(**fields)


def pack_clip(clip: Clip) -> tuple[dict[str, Any], bytes]:
    """Turn a clip into a header and the bytes of its sound and frames; none if it is stripped."""
    header = {name: getattr(clip, name) for name in clip.__dataclass_fields__}
    header |= {"state": asdict(clip.state), "frames": None, "sound": None}
    body = b""
    # the sound goes first, so that its numbers lie at even addresses
    if clip.sound is not None:
        waveform = clip.sound.waveform
        header["sound"] = {"spans_s": clip.sound.spans_s, "duration_s": clip.sound.duration_s}
        if waveform is not None:
            header["sound"] |= {"dtype": waveform.dtype.str, "size": waveform.size}
            body += waveform.tobytes()
    if clip.frames is not None:
        header["frames"] = clip.frames.shape
        body += clip.frames.tobytes()
    return header, body


def unpack_clip(header: dict[str, Any], body: bytearray) -> Clip:
    """Rebuild a clip; its sound and frames live in `body`."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in header.items()}
    fields["state"] = FileState(**fields["state"])
    offset = 0
    if fields["sound"] is not None:
        sound = fields["sound"]
        waveform = None
        if "dtype" in sound:
            waveform = np.frombuffer(body, np.dtype(sound["dtype"]), sound["size"])
            offset = waveform.nbytes
        spans_s = tuple((start, end) for start, end in sound["spans_s"])
        fields["sound"] = Sound(waveform, spans_s, sound["duration_s"])
    if fields["frames"] is not None:
        frames = np.frombuffer(body, np.uint8, offset=offset)
        fields["frames"] = frames.reshape(fields["frames"])
    return Clip(**fields)
