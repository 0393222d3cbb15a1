"""The hash of a checkpoint's weights: which model said this.

It covers the names and contents of all weight files. Reading 15 GB takes a while, so the hash of
each file is remembered beside its size and time of change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_Entry = list[int | str]  # size in bytes, time of change in ns, SHA-256


def default_cache() -> Path:
    """Return the file that remembers hashes between runs: `$XDG_CACHE_HOME/vla2/weights.json`."""
    # without a home the name stays as it is, in the working folder's "~": then nothing is kept
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(root) / "vla2" / "weights.json"


def hash_weights(files: Iterable[Path], cache: Path | None = None) -> str:
    """Hash the names and contents of weight files.

    Args:
        files: all weight files of one checkpoint.
        cache: a JSON file that remembers the hashes of files by path, size and time.

    Returns:
        64 hexadecimal digits of SHA-256.
    """
    digests = hash_files(files, cache)
    total = hashlib.sha256()
    for path in sorted(digests, key=lambda path: path.name):
        total.update(f"{path.name}\0{digests[path]}\0".encode())
    return total.hexdigest()


def hash_files(files: Iterable[Path], cache: Path | None = None) -> dict[Path, str]:
    """Hash the contents of files, each by itself; arguments and digits as in `hash_weights`."""
    cache = cache or default_cache()
    known = _read_cache(cache)
    fresh: dict[str, _Entry] = {}
    digests: dict[Path, str] = {}
    for path in files:
        digest = _recall(known, path)
        if digest is None:
            stat = path.stat()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            fresh[str(path.resolve())] = [stat.st_size, stat.st_mtime_ns, digest]
        digests[path] = digest
    if fresh:
        _write_cache(cache, {**known, **fresh})
    return digests


def is_remembered(files: Iterable[Path], cache: Path | None = None) -> bool:
    """Tell whether `hash_weights` would read none of the files."""
    known = _read_cache(cache or default_cache())
    return all(_recall(known, path) for path in files)


def _recall(known: Mapping[str, Any], path: Path) -> str | None:
    stat = path.stat()
    match known.get(str(path.resolve())):
        case [stat.st_size, stat.st_mtime_ns, str(digest)]:
            return digest
    return None


def _read_cache(path: Path) -> dict[str, _Entry]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(path: Path, content: dict[str, _Entry]) -> None:
    # only a convenience: a read-only home costs a second hashing, not the run
    if not path.is_absolute():
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            whole = Path(aside, path.name)
            whole.write_text(json.dumps(content), encoding="utf-8")
            whole.replace(path)
