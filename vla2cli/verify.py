"""A second look at a ledger: errors, doubtful texts, broken lines, files that have changed."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes

from vla2cli.errors import LedgerError, why
from vla2cli.ledger import (
    Key,
    Record,
    is_torn,
    key_of,
    read_records,
    start_of,
)

# flags that say a text may be no true answer; the others only describe
DOUBTFUL_FLAGS = frozenset({"empty", "repeating", "not-finite", "partial-video", "short-audio"})


@dataclass(frozen=True)
class Finding:
    """One thing about a ledger that somebody should look at."""

    kind: Literal[
        "error", "flagged", "not-a-record", "torn", "missing-file", "changed-file"
    ]  # the first two and the last two are about the last record of a key
    line: int  # from 1
    id: str | None
    message: str


@dataclass(frozen=True)
class Summary:
    """A ledger in numbers."""

    records: int
    keys: int
    done: int  # keys whose last record is no error
    errors: int  # keys whose last record is an error


@dataclass(frozen=True)
class Verification:
    """A ledger's numbers, and its findings in the order of their lines; iterate over it once."""

    summary: Summary
    findings: Iterator[Finding]  # lazy: files are looked at as it goes

    def __iter__(self) -> Iterator[Finding]:
        return self.findings


def verify(
    path: str | os.PathLike[str],
    *,
    check_files: bool = True,
    rehash: bool = False,
    root: str | os.PathLike[str] | None = None,
) -> Verification:
    """Look for errors, doubtful texts, broken lines and files that are no longer the same.

    Args:
        path: the ledger; it is not locked and not changed.
        check_files: compare the files with size, time and hash in their records.
        rehash: hash every file, not only those whose size or time differ.
        root: the folder that relative paths, or else ids, start from; by default paths from here.

    Raises:
        LedgerError: the file cannot be read or holds no record at all.
    """
    winners: dict[Key, tuple[int, bool]] = {}  # line number, is it an error
    num_records = num_lines = 0
    is_foreign = False
    for line_no, record, raw in read_records(path):
        num_lines = line_no
        if record is not None:
            num_records += 1
            winners[key_of(record)] = (line_no, record.get("error") is not None)
        elif raw.endswith(b"\n") or not is_torn(raw):
            is_foreign = True
    if is_foreign and not winners:
        raise LedgerError(f"'{os.fspath(path)}' is not a vla2 ledger: no line of it is a record")
    errors = sum(is_error for _, is_error in winners.values())
    summary = Summary(num_records, len(winners), len(winners) - errors, errors)
    lines = frozenset(line_no for line_no, _ in winners.values())
    files = _FileCheck(rehash, root) if check_files else None
    return Verification(summary, _find(path, num_lines, lines, files))


def _find(
    path: str | os.PathLike[str],
    num_lines: int,
    winners: frozenset[int],
    files: "_FileCheck | None",
) -> Iterator[Finding]:
    for line_no, record, raw in read_records(path):
        if line_no > num_lines:  # written since
            return
        if record is None:
            if raw.endswith(b"\n") or not is_torn(raw):
                yield Finding("not-a-record", line_no, None, f"begins with {start_of(raw)}")
            else:
                message = f"{len(raw)} bytes of an unfinished record; the next run repairs this"
                yield Finding("torn", line_no, None, message)
        elif line_no in winners:
            yield from _judge(line_no, record, files)


def _judge(line_no: int, record: Record, files: "_FileCheck | None") -> Iterator[Finding]:
    error = record.get("error")
    if error is not None:
        parts = [error.get("kind"), error.get("message")] if isinstance(error, dict) else [error]
        message = ": ".join(str(part) for part in parts if part)
        yield Finding("error", line_no, record["id"], message)
        return
    flags = record.get("flags")
    doubtful = [flag for flag in flags if flag in DOUBTFUL_FLAGS] if isinstance(flags, list) else []
    if doubtful:
        yield Finding("flagged", line_no, record["id"], ", ".join(doubtful))
    if files is not None and isinstance(record.get("path"), str) and "://" not in record["path"]:
        found = files.check(record)
        if found is not None:
            yield Finding(found[0], line_no, record["id"], found[1])


class _FileCheck:
    """Compares files with what records say of them; hashes a file once for all its records."""

    def __init__(self, rehash: bool, root: str | os.PathLike[str] | None) -> None:
        self._rehash = rehash
        self._root = root
        self._hashes: dict[Path, str] = {}

    def check(self, record: Record) -> tuple[Literal["missing-file", "changed-file"], str] | None:
        located = self._locate(record)
        if located is None:
            return "missing-file", f"'{record['path']}' does not exist"
        path, status = located
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
            return "missing-file", f"'{record['path']}' is not a regular file"
        size, mtime, sha256 = (record.get(name) for name in ("size_bytes", "mtime_ns", "sha256"))
        if size not in (None, status.st_size):
            message = f"'{record['path']}' has {status.st_size:,} bytes, it had {size:,}"
            return "changed-file", message
        is_touched = mtime not in (None, status.st_mtime_ns)
        if sha256 is None:
            message = f"'{record['path']}' has another modification time and was never hashed"
            return ("changed-file", message) if is_touched else None
        if not is_touched and not self._rehash:
            return None
        if path not in self._hashes:
            try:
                self._hashes[path] = hash_file(path)
            except OSError as error:
                return (
                    "missing-file",
                    f"'{record['path']}' cannot be read: {why(error)}",
                )
        if self._hashes[path] != sha256:
            return "changed-file", f"'{record['path']}' has other content than it had"
        return None

    def _locate(self, record: Record) -> tuple[Path, os.stat_result] | None:
        names = [record["path"]] if self._root is None else [record["path"], record["id"]]
        for name in names:
            for written in (name, _decode_name(name)):
                path = Path(self._root or ".", written)
                with contextlib.suppress(OSError, ValueError):
                    return path, path.stat()
        return None


def _decode_name(name: str) -> str:
    """Turn the %FF of a name that is not UTF-8 back into its bytes."""
    return os.fsdecode(unquote_to_bytes(name.encode("utf-8", "replace")))


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
