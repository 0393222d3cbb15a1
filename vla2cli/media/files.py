"""Look at a path before any decoder does: is it a file, can it be read, what is its hash."""

import hashlib
import os
import stat
from pathlib import Path

from vla2cli.errors import InputError
from vla2cli.media.records import FileState

_CHUNK_BYTES = 1 << 20
_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: str, *, allow_folder: bool = False, allow_empty: bool = False) -> int:
    """Refuse what no decoder should be given; opening a pipe would wait for ever.

    Args:
        path: the file.
        allow_folder: of frames.
        allow_empty: of which nothing is decoded.

    Returns:
        The size in bytes; of a folder, that of the files directly in it.

    Raises:
        InputError: missing, unreadable, not-a-file or empty-file.
    """
    try:
        mode = Path(path).stat()
        for is_special, name in _SPECIAL:
            if is_special(mode.st_mode):
                raise _refused(f"this is {name}, not a file", "not-a-file")
        if stat.S_ISDIR(mode.st_mode):
            if not allow_folder:
                raise _refused("this is a folder, not a file", "not-a-file")
            return sum(Path(entry).stat().st_size for entry in _regular(path))
        with Path(path).open("rb"):
            pass
    except (OSError, ValueError) as error:
        raise _open_error(error) from error
    if mode.st_size == 0 and not allow_empty:
        raise _refused("the file is empty", "empty-file")
    return mode.st_size


def stat_file(path: str) -> FileState:
    """Return a file's size and time, without its hash; whatever the file is.

    Raises:
        InputError: there is none.
    """
    try:
        state = Path(path).stat()
    except (OSError, ValueError) as error:
        raise _open_error(error) from error
    return FileState(state.st_size, state.st_mtime_ns, "")


def list_folder(path: str) -> list[str]:
    """List a folder of frames in plain string order ("10.png" before "2.png"), as upstream does.

    Raises:
        InputError: the folder is empty or cannot be read.
    """
    try:
        names = sorted(os.listdir(path))  # noqa: PTH208 the order is that of the names as strings
    except OSError as error:
        raise _open_error(error) from error
    if not names:
        raise _refused("the folder is empty", "empty-file")
    return [str(Path(path) / name) for name in names]


def hash_file(path: str) -> FileState:
    """Hash a file's content, or a folder's file names and their contents.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        if Path(path).is_dir():
            return _hash_folder(path)
        with Path(path).open("rb") as file:
            before = os.fstat(file.fileno())
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except (OSError, ValueError) as error:
        raise _open_error(error) from error
    return FileState(before.st_size, before.st_mtime_ns, digest.hexdigest())


def _hash_folder(path: str) -> FileState:
    digest = hashlib.sha256()
    size_bytes, mtime_ns = 0, Path(path).stat().st_mtime_ns
    for entry in _regular(path):
        state = hash_file(entry)
        digest.update(os.fsencode(Path(entry).name) + b"\0" + bytes.fromhex(state.sha256))
        size_bytes, mtime_ns = size_bytes + state.size_bytes, max(mtime_ns, state.mtime_ns)
    return FileState(size_bytes, mtime_ns, digest.hexdigest())


def _regular(path: str) -> list[str]:
    return [entry for entry in list_folder(path) if Path(entry).is_file()]


def _open_error(error: OSError | ValueError) -> InputError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return _refused("no such file", "missing")
    if isinstance(error, PermissionError):
        return _refused("no permission to read this file", "unreadable")
    # a ValueError is a path with a null byte, or one the file system's encoding cannot spell
    detail = error.strerror if isinstance(error, OSError) and error.strerror else error
    return _refused(f"cannot read: {detail}", "unreadable")


def _refused(message: str, kind: str) -> InputError:
    return InputError(message, kind=kind, stage="open")
