"""Exports that are kept: `$XDG_CACHE_HOME/vla2/frontends`, a folder each.

    fp32-1f0c…            an export, named by its precision and key
    fp32-1f0c….lock       held alone by who makes or removes it, shared by who is opening it
    .unfinished-fp32-1f…  being written, or left by a process that was killed

A key covers the weights, what else decides the graphs, and the versions of all that takes part. An
export whose files are not those that were written is made anew.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vla2_models.files import UNFINISHED
from vla2_models.fingerprint import default_cache, is_remembered
from vla2cli.console import Say, format_size
from vla2cli.errors import FrontendError, why
from vla2cli.frontend.manifest import MANIFEST, PRECISIONS, Manifest, versions
from vla2cli.lock import locked

LONG_BYTES = 1e9  # hashing more takes seconds: say so

_NAME = re.compile(rf"(?:{re.escape(UNFINISHED)})?((?:{'|'.join(PRECISIONS)})-[0-9a-f]{{32}})")


@dataclass(frozen=True)
class Entry:
    """What the cache holds under one name."""

    folder: Path
    manifest: Manifest | None  # None where there is none that can be read
    problem: str | None  # why it cannot be used; None where it can
    size_bytes: int  # of all there is

    @classmethod
    def of(cls, folder: Path, say: Say) -> Entry:
        """Look at a folder, which need not be in the cache."""
        size_bytes = sum(_size_of(path) for path in folder.rglob("*"))
        if folder.name.startswith(UNFINISHED):
            return cls(folder, None, "unfinished", size_bytes)
        try:
            manifest = Manifest.read(folder)
        except FrontendError as error:
            return cls(folder, None, str(error), size_bytes)
        problem = _find_stale(manifest) or find_problem(folder, manifest.origin.key, say)
        return cls(folder, manifest, problem, size_bytes)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # being written, or removed, by another process
        return 0


def cache_root() -> Path:
    """Return the folder that holds the exports."""
    return default_cache().with_name("frontends")


def list_exports(say: Say) -> list[Entry]:
    """List what the cache holds, usable or not."""
    return [Entry.of(folder, say) for folder in _folders()]


def clean_exports(say: Say, *, everything: bool = False) -> list[Entry]:
    """Remove what cannot be used here, or everything; what another process is at work on stays.

    Returns:
        What was removed.

    Raises:
        FrontendError: a folder cannot be removed.
    """
    removed = []
    for folder in _folders():
        match = _NAME.match(folder.name)
        assert match is not None, folder
        lock = _lock_of(folder.with_name(match[1]))
        try:
            with locked(lock):
                entry = Entry.of(folder, say)
                if entry.problem is None and not everything:
                    continue
                shutil.rmtree(folder)
                lock.unlink()
        except BlockingIOError:
            say(f"'{folder}' is in use; it stays")
        except FileNotFoundError:  # no longer there, or no longer under this name
            continue
        except OSError as error:
            raise FrontendError(f"'{folder}' cannot be removed: {why(error)}") from error
        else:
            removed.append(entry)
    return removed


def find_problem(folder: Path, key: str, say: Say) -> str | None:
    """Say why a folder is not the whole export of this key; None where it is."""
    try:
        manifest = Manifest.read(folder)
        if manifest.origin.key != key:
            return f"'{folder / MANIFEST}' is of another export"
        damage = manifest.find_missing(folder)
        if damage is not None:
            return damage
        if manifest.size_bytes > LONG_BYTES and not is_remembered(manifest.paths(folder)):
            say(f"checking the {format_size(manifest.size_bytes)} of an export …")
        return manifest.find_changed(folder)
    except FrontendError as error:
        return str(error)
    except OSError as error:
        return f"'{folder}' cannot be read: {why(error)}"


@contextmanager
def held_with_others(folder: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Keep others from removing or replacing an export; `wait` as `on_wait` of `locked`."""
    with ExitStack() as stack:
        with suppress(OSError):  # a cache that is only read: whoever may write it is trusted
            stack.enter_context(locked(_lock_of(folder), is_shared=True, on_wait=wait))
        yield


@contextmanager
def held_alone(folder: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Keep all others from an export, to make it; `wait` as `on_wait` of `locked`.

    Raises:
        FrontendError: the cache cannot be written.
    """
    root = folder.parent
    with ExitStack() as stack:
        try:
            # without a home, its name stays as it is: "~" in the working folder
            if not root.is_absolute():
                raise FileNotFoundError(errno.ENOENT, "there is no home folder")
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(_lock_of(folder), on_wait=wait))
        except OSError as error:
            raise FrontendError(
                f"exports cannot be kept in '{root}': {why(error)}; set XDG_CACHE_HOME to a folder "
                "that can be written, or give --frontend torch"
            ) from error
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _folders() -> list[Path]:
    root = cache_root()
    found = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in found if _NAME.match(path.name) and path.is_dir())


def _find_stale(manifest: Manifest) -> str | None:
    for name, here in versions().items():
        made = manifest.versions.get(name)
        if made != here:
            return f"made with {name} {made}, here is {here}"
    return None
