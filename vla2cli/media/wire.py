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

from vla2cli.media.records import Clip, ClipRequest, FileState
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
    return ClipRequest(**{**header, "geometry": FrameGeometry.from_dict(header["geometry"])})


def pack_clip(clip: Clip) -> tuple[dict[str, Any], memoryview]:
    """Turn a clip into a header and the bytes of its frames."""
    header = {name: getattr(clip, name) for name in clip.__dataclass_fields__ if name != "frames"}
    header |= {"state": asdict(clip.state), "shape": clip.frames.shape}
    return header, np.ascontiguousarray(clip.frames).reshape(-1).data


def unpack_clip(header: dict[str, Any], body: bytearray) -> Clip:
    """Rebuild a clip; its frames live in `body`."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in header.items()}
    shape = fields.pop("shape")
    fields["state"] = FileState(**fields["state"])
    return Clip(frames=np.frombuffer(body, np.uint8).reshape(shape), **fields)
