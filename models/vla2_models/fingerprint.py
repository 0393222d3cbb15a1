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
from collections.abc import Iterable
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for what vla2 remembers between runs: `$XDG_CACHE_HOME/vla2`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vla2"


def hash_weights(files: Iterable[Path], cache: Path | None = None) -> str:
    """Hash the names and contents of weight files.

    Args:
        files: all weight files of one checkpoint.
        cache: a JSON file that remembers the hashes of files by path, size and time.

    Returns:
        64 hexadecimal digits of SHA-256.
    """
    cache = cache or cache_folder() / "weights.json"
    known = _read_cache(cache)
    total = hashlib.sha256()
    fresh = False
    for path in sorted(files, key=lambda path: path.name):
        stat = path.stat()
        entry = [stat.st_size, stat.st_mtime_ns]
        remembered = known.get(str(path.resolve()))
        if not remembered or remembered[:2] != entry:
            with path.open("rb") as file:
                remembered = [*entry, hashlib.file_digest(file, "sha256").hexdigest()]
            known[str(path.resolve())] = remembered
            fresh = True
        total.update(f"{path.name}\0{remembered[2]}\0".encode())
    if fresh:
        _write_cache(cache, known)
    return total.hexdigest()


def _read_cache(path: Path) -> dict[str, list[int | str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(path: Path, content: dict[str, list[int | str]]) -> None:
    # only a convenience: a read-only home costs a second hashing, not the run
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, delete=False
        ) as file:
            json.dump(content, file)
        Path(file.name).replace(path)
