"""A folder of files that holds at most so many bytes: what was not used for longest goes first.

    ab/abcdef….safetensors        an entry, whole: it was written aside and renamed
    ab/abcdef….safetensors.part   being written, or left by a process that was killed
    .lock                         held by who writes or evicts
    .total                        bytes of all files; more than there are, perhaps, but not less

Any number of processes use it at once. Who reads takes no lock: what vanishes meanwhile was not
there. A file's time of change is that of its last use; that of its last reading is kept by few
systems. Files of other names are somebody else's, and are neither counted nor removed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vla2cli.console import Say
from vla2cli.errors import UsageError, why
from vla2cli.lock import locked

ENDING = ".safetensors"
PART = ".part"
LOCK = ".lock"
TOTAL = ".total"
# whoever sees a part holds the lock that its writer held; but some network file systems keep locks
# to one machine, and then the writer may be at work on another
OLD_PART_S = 3600

_OURS = re.compile(rf"[0-9a-f]{{64}}{re.escape(ENDING)}(?:{re.escape(PART)})?")


class _File(NamedTuple):
    """A file as it was when the folder was listed; the least recently used sorts first."""

    used_ns: int
    size_bytes: int
    path: str


class BoundedFolder:
    """Files of bytes under keys of 64 hexadecimal digits, at most `max_bytes` together.

    Where it cannot be written, or no longer, that is said once; it is then only read.

    Args:
        root: the folder, which is made where it is absent.
        max_bytes: of all files; what there is too much of is removed now.
        say: told why nothing more is written.

    Raises:
        UsageError: `root` is no folder, or cannot be made.
    """

    def __init__(self, root: Path, max_bytes: int, say: Say) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._say = say
        self._is_written = True
        # what the last listing found and is still there, the least recently used last. What was
        # used or written since is newer than all of these: they go first, without a new listing
        self._oldest: list[_File] = []
        try:
            root.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UsageError(f"'{root}' is a file; expected a folder, or one to make") from error
        except OSError as error:
            raise UsageError(f"folder '{root}' cannot be made: {why(error)}") from error
        # killed processes leave a total that is too high, and people one that is anything
        self._change(lambda: self._make_room(0, self._list()))
        self._oldest.clear()  # hundreds of bytes for each file, and perhaps never needed

    def read(self, key: str) -> bytes | None:
        """Return what is kept under a key, which is thereby used; None where nothing is."""
        path = self._place_of(key)
        try:
            data = path.read_bytes()
            _mark_used(path)
        except FileNotFoundError:
            return None
        except OSError:
            self.remove(key)
            return None
        return data

    def write(self, key: str, data: bytes) -> None:
        """Keep bytes under a key, unless there are some; more than `max_bytes` are not kept."""
        path = self._place_of(key)

        def keep() -> None:
            if not path.exists():
                self._make_room(len(data), self._read_total())
                _write_aside(path, data)

        if self._is_written and len(data) <= self.max_bytes:
            self._change(keep)

    def remove(self, key: str) -> None:
        """Take away what is kept under a key, where there is something and that is possible."""
        with suppress(OSError):
            self._place_of(key).unlink()

    def _place_of(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}{ENDING}"

    def _change(self, change: Callable[[], None]) -> None:
        """Change the folder while nobody else does; a failure ends the writing, not the run."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)  # it may have been removed
            with locked(self.root / LOCK, on_wait=lambda: None):
                change()
        except OSError as error:
            self._is_written = False
            self._say(f"vla2: '{self.root}' cannot be written: {why(error)}; nothing more is kept")

    def _make_room(self, size_bytes: int, total: int | None) -> None:
        """Evict until so many bytes fit in, and count them: a crash leaves the total too high.

        Args:
            size_bytes: at most `max_bytes`.
            total: bytes that there are; None where that is not known.
        """
        if total is None:
            total = self._list()
        while total + size_bytes > self.max_bytes:
            if self._oldest:
                total -= _evict(self._oldest.pop())
            else:
                total = self._list()
        (self.root / TOTAL).write_text(str(total + size_bytes), encoding="ascii")

    def _read_total(self) -> int | None:
        try:
            return int((self.root / TOTAL).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _list(self) -> int:
        """Look at all files, remove parts that are nobody's, and return the bytes of the others."""
        before_ns = time.time_ns() - OLD_PART_S * 10**9
        files = []
        for file in _find(self.root):
            if file.path.endswith(PART) and file.used_ns < before_ns:
                Path(file.path).unlink()
            else:
                files.append(file)
        self._oldest = sorted(files, reverse=True)
        return sum(file.size_bytes for file in files)


def _find(root: Path) -> Iterator[_File]:
    for name in os.listdir(root):  # noqa: PTH208 their paths are not needed
        if not re.fullmatch("[0-9a-f]{2}", name):
            continue
        with os.scandir(root / name) as entries:
            for entry in entries:
                if entry.name.startswith(name) and _OURS.fullmatch(entry.name):
                    try:
                        state = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # it was bad, and somebody read it
                        continue
                    yield _File(state.st_mtime_ns, state.st_size, entry.path)


def _evict(file: _File) -> int:
    """Remove a file that was not used since it was listed; return the bytes that are gone."""
    path = Path(file.path)
    try:
        if path.lstat().st_mtime_ns != file.used_ns:
            return 0
        path.unlink()
    except FileNotFoundError:
        return 0
    return file.size_bytes


def _write_aside(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there; not synced, since a power cut only costs a clip."""
    aside = path.with_name(f"{path.name}{PART}")
    path.parent.mkdir(exist_ok=True)
    try:
        aside.write_bytes(data)
        _mark_used(aside)
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


def _mark_used(path: Path) -> None:
    now_ns = time.time_ns()  # the kernel's own stamps are some milliseconds apart
    with suppress(OSError):  # it is another user's, or gone
        os.utime(path, ns=(now_ns, now_ns))
