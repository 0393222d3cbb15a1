"""Decoding in processes that can be killed: one file that hangs or crashes costs one record.

Each worker belongs to one thread of the pool, which sends it one request at a time, watches the
clock, and starts another when it is lost. Nothing here touches a file: even asking for its size can
hang on a dead network share.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from vla2cli.config import is_debug
from vla2cli.errors import InputError
from vla2cli.media import wire
from vla2cli.media.patience import wait_answer
from vla2cli.media.records import Clip, ClipRequest, FileState, Probe

__all__ = ["Clip", "ClipRequest", "DecodePool", "FileState", "Probe"]

_START_LIMIT_S = 60.0  # a cold disk and many workers at once
_HASH_BYTES_PER_S = 20e6  # the slowest disk that is not called hanging
_REAP_LIMIT_S = 2.0  # a process stuck in the kernel may not even die
_MAX_HASHED = 64
_MAX_REQUESTS = 500  # decoders leak

_MOST_WORKERS = 16  # more cannot be kept busy by one model, and each holds clips in memory

T = TypeVar("T")


def default_num_workers() -> int:
    """Count the cores this process may use, up to 16."""
    is_linux = sys.platform == "linux"
    num_cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    return min(num_cores, _MOST_WORKERS)


class _WorkerDied(Exception):  # noqa: N818 an event, not an error yet: the request is tried again
    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class _Worker:
    """The parent's side of one child process."""

    def __init__(self, memory_bytes: int) -> None:
        self.num_requests = 0
        self.sock, child_sock = socket.socketpair()
        with child_sock:
            # nothing but its socket is passed on: above all no lock of ours
            self.process = subprocess.Popen(
                _command(child_sock.fileno(), memory_bytes),
                pass_fds=(child_sock.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if is_debug() else subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )

    def wait_ready(self) -> None:
        try:
            wire.receive(self.sock, _START_LIMIT_S)
        except (EOFError, OSError) as error:
            raise _WorkerDied(self._how_it_ended()) from error

    def ask(self, header: dict[str, Any], limit_s: float) -> tuple[dict[str, Any], bytearray]:
        self.num_requests += 1
        try:
            wire.send(self.sock, header)
            wait_answer(self.sock, self.process.pid, limit_s)
            answer, body = wire.receive(self.sock, limit_s)
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise _WorkerDied(self._how_it_ended()) from error
        if "error" in answer:
            raise InputError(**answer["error"])
        return answer, body

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()

    def stop(self) -> None:
        self.kill()
        self.sock.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_REAP_LIMIT_S)

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(_REAP_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        return signal.Signals(-code).name


class DecodePool:
    """Decodes, probes and hashes files in `num_workers` processes, started when first needed.

    The results come as futures, which raise InputError for a file that cannot be used, with the
    kinds of the readers and `timeout` and `worker-died`. To be closed, best by `with`.
    """

    def __init__(
        self, num_workers: int, *, timeout_s: float = 60.0, memory_bytes: int = 4 * 2**30
    ) -> None:
        """Start the threads, no process yet.

        Args:
            num_workers: processes, at least 1.
            timeout_s: for one file, without the time in which there was no core for it; hashing
                has another limit that grows with the size.
            memory_bytes: what a worker may take on top of what it has when it starts.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}, expected at least 1")
        self.num_workers, self.timeout_s, self.memory_bytes = num_workers, timeout_s, memory_bytes
        self._tasks: queue.SimpleQueue[_Task[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self.busy_s = 0.0  # that all workers together have worked
        # the last files, done or in work: segments of one come together, to several workers
        self._hashes: dict[tuple[str, FileState], Future[FileState]] = {}
        self._is_closed = self._is_cancelled = False
        # daemons: a pool that nobody closed must not keep the interpreter from ending
        self._threads = [
            threading.Thread(target=self._serve, name=f"decode-{i}", daemon=True)
            for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, request: ClipRequest, recall: Callable[[FileState], T | None] | None = None
    ) -> Future[Clip | T]:
        """Hash a file and read the frames and the sound that the model is given.

        Args:
            request: what is wanted of it.
            recall: given the file's hash, returns what makes reading it needless, or None.
        """

        def run(owner: _Owner) -> Clip | T:
            # two requests, so that hashing a large file does not eat the decoder's time
            state = self._hash(owner, request.path)
            if recall is not None and (known := recall(state)) is not None:
                return known
            header = {"op": "clip", "state": asdict(state), **wire.pack_request(request)}
            with _remember(state):
                clip = wire.unpack_clip(*owner.ask(header, self.timeout_s, "decoding"))
                if recall is None:
                    return clip
                after, _ = owner.ask(
                    {"op": "stat", "path": request.path}, self.timeout_s, "opening"
                )
            times = (state.size_bytes, state.mtime_ns)
            return replace(clip, is_steady=times == (after["size_bytes"], after["mtime_ns"]))

        return self._submit(run)

    def submit_probe(self, path: str, kind: str) -> Future[Probe]:
        """Tell what a file is and how long."""

        def run(owner: _Owner) -> Probe:
            header = {"op": "probe", "path": path, "kind": kind}
            return Probe(**owner.ask(header, self.timeout_s, "looking into the file")[0])

        return self._submit(run)

    def submit_hash(self, path: str) -> Future[FileState]:
        """Tell a file's size, time and SHA-256."""
        return self._submit(lambda owner: self._hash(owner, path))

    def worker_pids(self) -> list[int]:
        """List the processes that are alive now."""
        with self._lock:
            return [worker.process.pid for worker in self._workers]

    def close(self, cancel: bool = True) -> None:
        """End all workers; with `cancel` at once, as `with` does, else when all work is done.

        The futures of work that was cancelled raise `concurrent.futures.CancelledError`.
        """
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
            self._is_cancelled |= cancel
            if self._is_cancelled:
                for worker in self._workers:
                    worker.kill()
        if is_first:
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _hash(self, owner: "_Owner", path: str) -> FileState:
        key = path, self._stat(owner, path)
        mine: Future[FileState] = Future()
        with self._lock:
            first = self._hashes.setdefault(key, mine)
            if len(self._hashes) > _MAX_HASHED:
                del self._hashes[next(iter(self._hashes))]
        # whoever hashes waits for its own worker alone and for a limited time, so this ends; where
        # it fails, each tries for itself
        if first is not mine and first.exception() is None:
            return first.result()
        task = _Task(mine, lambda owner: self._read_hash(owner, *key))
        task.finish(owner)
        if mine.exception() is not None or replace(mine.result(), sha256="") != key[1]:
            with self._lock:
                if self._hashes.get(key) is mine:
                    del self._hashes[key]
        return mine.result()

    def _read_hash(self, owner: "_Owner", path: str, state: FileState) -> FileState:
        limit_s = self.timeout_s + state.size_bytes / _HASH_BYTES_PER_S
        with _remember(state):
            answer, _ = owner.ask({"op": "hash", "path": path}, limit_s, "reading the file")
        return FileState(**answer)

    def _stat(self, owner: "_Owner", path: str) -> FileState:
        found, _ = owner.ask({"op": "stat", "path": path}, self.timeout_s, "opening")
        return FileState(**found)

    def _submit(self, run: "Callable[[_Owner], T]") -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the pool is closed")
            self._tasks.put(_Task(future, run))
        return future

    def _serve(self) -> None:
        owner = _Owner(self)
        try:
            while (task := self._tasks.get()) is not None:
                if self._is_cancelled:
                    task.future.cancel()
                with self._busy():
                    task.finish(owner)
        finally:
            owner.drop()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.busy_s += time.monotonic() - started

    def _start(self) -> _Worker:
        if self._is_cancelled:
            raise CancelledError
        worker = _Worker(self.memory_bytes)
        with self._lock:
            self._workers.add(worker)
            if self._is_cancelled:  # closed meanwhile: `close` has not seen this one
                worker.kill()
        return worker

    def _stop(self, worker: _Worker) -> None:
        worker.stop()
        with self._lock:
            self._workers.discard(worker)


@contextmanager
def _remember(state: FileState) -> Iterator[None]:
    # the file may be another one by the time that somebody asks which one failed
    try:
        yield
    except InputError as error:
        error.state = state
        raise


class _Owner:
    """What one thread knows of its worker: replaces it when lost, tries a request twice."""

    def __init__(self, pool: DecodePool) -> None:
        self.pool = pool
        self.worker: _Worker | None = None

    def ask(
        self, header: dict[str, Any], limit_s: float, what: str
    ) -> tuple[dict[str, Any], bytearray]:
        reason = ""
        for _ in range(2):
            try:
                return self._ready_worker().ask(header, limit_s)
            except TimeoutError as error:
                self.drop()
                message = f"{what} took longer than {limit_s:.4g} s"
                raise InputError(message, kind="timeout", stage="decode") from error
            except _WorkerDied as died:
                self.drop()
                reason = str(died)
                if self.pool._is_cancelled:
                    raise CancelledError from died
        message = f"{what} ended the decoder twice ({reason})"
        raise InputError(message, kind="worker-died", stage="decode")

    def drop(self) -> None:
        if self.worker is not None:
            self.pool._stop(self.worker)
            self.worker = None

    def _ready_worker(self) -> _Worker:
        if self.worker is not None and self.worker.num_requests >= _MAX_REQUESTS:
            self.drop()
        if self.worker is None:
            self.worker = self.pool._start()
            self.worker.wait_ready()
        return self.worker


@dataclass(frozen=True)
class _Task(Generic[T]):
    future: Future[T]
    run: Callable[[_Owner], T]

    def finish(self, owner: _Owner) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.run(owner)
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


def _command(socket_fd: int, memory_bytes: int) -> list[str]:
    module = "vla2cli.media.worker"
    arguments = [str(socket_fd), str(os.getpid()), str(memory_bytes)]
    return [sys.executable, "-P", "-m", module, *arguments]
