"""A lock on a name, between processes: one writes, or several read."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(
    path: Path, *, is_shared: bool = False, on_wait: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is absent and stays.

    Args:
        path: the file; it is free to be removed by whoever holds its lock alone.
        is_shared: with others that share it, too.
        on_wait: called once where another holds it; without it, that is an error.

    Raises:
        BlockingIOError: another holds it, and there is no `on_wait`.
        OSError: the file cannot be made or locked.
    """
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise
                on_wait()
                on_wait = _say_nothing
                fcntl.flock(fd, kind)
            if not _is_in_place(fd, path):  # it was removed by whom we have waited for
                continue
            yield
            return
        finally:
            os.close(fd)


def _is_in_place(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _say_nothing() -> None:
    pass
