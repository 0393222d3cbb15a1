"""A second look at a ledger: errors, doubtful texts, broken lines, files that have changed."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes

from vla2cli.errors import LedgerError, why
from vla2cli.ledger import Entry, Key, Record, is_torn, paused_collector, read_keyed, start_of

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


@paused_collector()
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
    winners: dict[Key, _Winner] = {}
    broken: list[Finding] = []
    num_records = 0
    is_foreign = False
    for line_no, found, raw in read_keyed(path):
        if found is not None:
            key, record = found
            num_records += 1
            winners.pop(key, None)  # so that they stand in the order of their lines
            entry = Entry.of(record) if check_files and _has_file(record) else None
            winners[key] = _Winner(line_no, _judge(line_no, record), entry)
        elif raw.endswith(b"\n") or not is_torn(raw):
            is_foreign = True
            broken.append(Finding("not-a-record", line_no, None, f"begins with {start_of(raw)}"))
        else:
            message = f"{len(raw)} bytes of an unfinished record; the next run repairs this"
            broken.append(Finding("torn", line_no, None, message))
    if is_foreign and not winners:
        raise LedgerError(f"'{os.fspath(path)}' is not a vla2 ledger: no line of it is a record")
    judged = [winner.finding for winner in winners.values() if winner.finding is not None]
    errors = sum(finding.kind == "error" for finding in judged)
    summary = Summary(num_records, len(winners), len(winners) - errors, errors)
    changed = _look_at_files(winners, _FileCheck(rehash, root))
    return Verification(summary, merge(broken, judged, changed, key=lambda found: found.line))


class _Winner(NamedTuple):
    """The last record of a key, as far as it is looked at."""

    line: int
    finding: Finding | None
    entry: Entry | None  # of its file, where that is to be looked at


def _judge(line_no: int, record: Record) -> Finding | None:
    error = record.get("error")
    if error is not None:
        parts = [error.get("kind"), error.get("message")] if isinstance(error, dict) else [error]
        message = ": ".join(str(part) for part in parts if part)
        return Finding("error", line_no, record["id"], message)
    flags = record.get("flags")
    texts = [flag for flag in flags if isinstance(flag, str)] if isinstance(flags, list) else []
    doubtful = [flag for flag in texts if flag in DOUBTFUL_FLAGS]
    return Finding("flagged", line_no, record["id"], ", ".join(doubtful)) if doubtful else None


def _has_file(record: Record) -> bool:
    path = record.get("path")
    return record.get("error") is None and path is not None and "://" not in path


def _look_at_files(winners: Mapping[Key, _Winner], files: "_FileCheck") -> Iterator[Finding]:
    for key, winner in winners.items():
        if winner.entry is not None:
            found = files.check(key[0], winner.entry)
            if found is not None:
                yield Finding(found[0], winner.line, key[0], found[1])


class _FileCheck:
    """Compares files with what records say of them; hashes a file once for all its records."""

    def __init__(self, rehash: bool, root: str | os.PathLike[str] | None) -> None:
        self._rehash = rehash
        self._root = root
        self._hashes: dict[str, str] = {}

    def check(
        self, id_: str, entry: Entry
    ) -> tuple[Literal["missing-file", "changed-file"], str] | None:
        located = self._locate(id_, entry)
        if located is None:
            return "missing-file", f"'{entry.path}' does not exist"
        path, status = located
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
            return "missing-file", f"'{entry.path}' is not a regular file"
        if entry.size_bytes not in (None, status.st_size):
            message = f"'{entry.path}' has {status.st_size:,} bytes, it had {entry.size_bytes:,}"
            return "changed-file", message
        is_touched = entry.mtime_ns not in (None, status.st_mtime_ns)
        if entry.sha256 is None:
            message = f"'{entry.path}' has another modification time and was never hashed"
            return ("changed-file", message) if is_touched else None
        if not is_touched and not self._rehash:
            return None
        if path not in self._hashes:
            try:
                self._hashes[path] = hash_file(path)
            except OSError as error:
                return "missing-file", f"'{entry.path}' cannot be read: {why(error)}"
        if self._hashes[path] != entry.sha256:
            return "changed-file", f"'{entry.path}' has other content than it had"
        return None

    def _locate(self, id_: str, entry: Entry) -> tuple[str, os.stat_result] | None:
        assert entry.path is not None, f"{id_} has no file"
        names = [entry.path] if self._root is None else [entry.path, id_]
        for name in names:
            for decode in (str, _decode_name):
                with contextlib.suppress(OSError, ValueError):
                    path = os.path.join(self._root or "", decode(name))  # noqa: PTH118  a million
                    return path, os.stat(path)  # noqa: PTH116
        return None


def _decode_name(name: str) -> str:
    """Turn the %FF of a name that is not UTF-8 back into its bytes."""
    return os.fsdecode(unquote_to_bytes(name.encode("utf-8", "replace")))


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
