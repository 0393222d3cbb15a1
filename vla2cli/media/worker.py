"""The child process of the pool: opens, hashes and decodes; may hang, leak or crash at no cost.

Run as `python -P -m vla2cli.media.worker SOCKET_FD PARENT_PID MEMORY_BYTES`.
"""

import ctypes
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla2cli.errors import InputError
from vla2cli.media import wire
from vla2cli.media.files import check_file, hash_file, stat_file
from vla2cli.media.frames import find_kind, probe, read_frames
from vla2cli.media.patience import NICENESS
from vla2cli.media.records import Clip, ClipRequest, FileState, Frames, SoundRequest
from vla2cli.media.sound import read_sound
from vla2cli.preprocess import FrameGeometry, fit_frame

_PR_SET_PDEATHSIG = 1

_Answer = tuple[dict[str, Any], memoryview | bytes]


def main(socket_fd: int, parent_pid: int, memory_bytes: int) -> None:
    """Answer requests until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    sock = socket.socket(fileno=socket_fd)
    _die_with_parent(sock, parent_pid)
    if sys.platform == "linux":  # elsewhere nobody could tell a starving worker from one that hangs
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    _limit_memory(memory_bytes)
    try:
        wire.send(sock, {"ready": os.getpid()})
        while True:
            request, _ = wire.receive(sock, None)
            wire.send(sock, *_answer(request))
    except (EOFError, OSError):
        return


def _answer(request: dict[str, Any]) -> _Answer:
    try:
        return _OPERATIONS[request.pop("op")](request)
    except InputError as error:
        return _error(str(error), error.kind, error.stage), b""
    except MemoryError:
        return _error("not enough memory for this file", "memory", "decode"), b""
    # one odd file must not end a batch: whatever a decoder throws becomes its error record
    except Exception as error:
        return _error(f"cannot decode: {type(error).__name__}: {error}", "decode", "decode"), b""


def _error(message: str, kind: str, stage: str) -> dict[str, Any]:
    line = " ".join(message.split())
    return {"error": {"message": line, "kind": kind, "stage": stage}}


def _stat(request: dict[str, Any]) -> _Answer:
    return asdict(stat_file(request["path"])), b""


def _hash(request: dict[str, Any]) -> _Answer:
    # an empty file has a hash like any other, by which it is known again when it was touched
    check_file(request["path"], allow_folder=True, allow_empty=True)
    return asdict(hash_file(request["path"])), b""


def _probe(request: dict[str, Any]) -> _Answer:
    return asdict(probe(request["path"], request["kind"])), b""


def _clip(request: dict[str, Any]) -> _Answer:
    state = FileState(**request.pop("state"))
    wanted = wire.unpack_request(request)
    kind = find_kind(wanted.path, wanted.kind)
    if kind == "audio" and wanted.sound is not None:
        clip = _hear(wanted, wanted.sound, state)
    else:
        clip = _see(wanted, kind, state)
    return wire.pack_clip(clip)


def _hear(wanted: ClipRequest, request: SoundRequest, state: FileState) -> Clip:
    start = time.perf_counter()
    check_file(wanted.path)
    sound, flags = read_sound(wanted.path, request)
    return Clip(
        frames=None,
        kind="audio",
        indices=(),
        timestamps_s=(),
        num_total=0,
        fps=0.0,
        duration_s=sound.duration_s,
        decoder="pyav",
        flags=flags,
        state=state,
        timings_s={"read": time.perf_counter() - start, "preprocess": 0.0},
        sound=sound,
    )


def _see(wanted: ClipRequest, kind: str, state: FileState) -> Clip:
    if wanted.geometry is None:
        raise ValueError("a request for frames needs their geometry")
    start = time.perf_counter()
    frames = read_frames(
        wanted.path,
        kind,
        num_frames=wanted.num_frames,
        start_s=wanted.start_s,
        end_s=wanted.end_s,
        decoder=wanted.decoder,
        sound=wanted.sound,
    )
    decoded = time.perf_counter()
    fitted = _fit_all(frames, wanted.geometry)
    return Clip(
        frames=fitted,
        kind=kind,
        indices=frames.indices,
        timestamps_s=frames.timestamps_s,
        num_total=frames.num_total,
        fps=frames.fps,
        duration_s=frames.duration_s,
        decoder=frames.decoder,
        flags=frames.flags,
        state=state,
        timings_s={"read": decoded - start, "preprocess": time.perf_counter() - decoded},
        sound=frames.sound,
    )


_OPERATIONS: dict[str, Callable[[dict[str, Any]], _Answer]] = {
    "stat": _stat,
    "hash": _hash,
    "probe": _probe,
    "clip": _clip,
}


def _fit_all(frames: Frames, geometry: FrameGeometry) -> NDArray[np.uint8]:
    # a frame that was picked twice is one array: fit it once
    fitted = {id(image): fit_frame(image, geometry) for image in frames.images}
    return np.stack([fitted[id(image)] for image in frames.images])


def _die_with_parent(sock: socket.socket, parent_pid: int) -> None:
    if sys.platform == "linux":
        # the signal comes when the thread that started us ends: that thread owns us all its life
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it was gone before we asked
            os._exit(1)
    threading.Thread(target=_exit_on_hang_up, args=(sock.fileno(),), daemon=True).start()


def _exit_on_hang_up(socket_fd: int) -> None:
    poll = select.poll()
    poll.register(socket_fd, 0)  # a hang-up is always reported
    poll.poll()
    os._exit(0)


def _limit_memory(memory_bytes: int) -> None:
    # the limit counts address space, of which libraries take a lot without using it
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + memory_bytes
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
