"""The ledger: an append-only file of JSON Lines that a killed run can take up again.

One object a line; the key of a record is its id, task, question, segment and the questions asked
before; the last record of a key wins. While it is written, an exclusive lock is held on FILE.lock.

    FILE         whole records, each fsynced before `append` returns
    FILE.torn    unfinished last lines that a killed run or a power cut left in FILE
    FILE.bak-N   what FILE was before `force`
    FILE.part    what is to become FILE at once, see `new_ledger`; a killed merge leaves it

No byte of FILE is ever removed but such an unfinished line, and that only after it is in FILE.torn.
"""

import contextlib
import fcntl
import gc
import hashlib
import json
import math
import os
import stat
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import orjson

from vla2cli.errors import LedgerBusyError, LedgerError, UsageError, why

Record = dict[str, Any]
Segment = tuple[float | None, float | None]  # start_s, end_s
Key = tuple[str, str, str, Segment | None, tuple[str, ...]]

MAX_BRACKETS = 500  # Python's reader gives up at some 1,000 levels, orjson a little later

_RECORD_START = b'{"id": "'  # what `append` begins each line with
_SHAPE = bytes.maketrans(b"123456789{", b"000000000[")
_LONG = b"0" * 20  # may not fit into 64 bits
_LONG_NEGATIVE = b"-" + b"0" * 19
_TEXT = (str, type(None))  # a union would be made anew for each record
_INTEGER = (int, type(None))
_LIST = (list, tuple)


def key_of(record: Mapping[str, Any]) -> Key:
    """Return what tells a record from others: id, task, question, segment, earlier questions.

    Raises:
        ValueError: the record has no id or task, or one of the fields has the wrong type.
    """
    id_, task, question = record.get("id"), record.get("task"), record.get("question") or ""
    if not isinstance(id_, str) or not isinstance(task, str):
        raise ValueError("a record needs 'id' and 'task', both text")
    history = record.get("history") or ()
    if not isinstance(question, str) or not isinstance(history, _LIST):
        raise ValueError("'question' must be text and 'history' a list")
    segment = record.get("segment")
    span = None if segment is None else _span_of(segment)
    asked = _questions_of(history) if history else ()
    # the same few tasks and questions stand in every key of a large ledger
    return str(id_), sys.intern(str(task)), sys.intern(str(question)), span, asked


def _span_of(segment: Any) -> Segment | None:
    if not isinstance(segment, Mapping):
        raise ValueError("'segment' must hold start_s and end_s")
    span = (segment.get("start_s"), segment.get("end_s"))
    if not all(end is None or isinstance(end, int | float) for end in span):
        raise ValueError("'segment' must hold numbers")
    return None if span == (None, None) else span


def _questions_of(history: Sequence[Any]) -> tuple[str, ...]:
    if not all(
        isinstance(turn, Mapping) and isinstance(turn.get("question"), str) for turn in history
    ):
        raise ValueError("each turn of 'history' needs a 'question'")
    return tuple(sys.intern(str(turn["question"])) for turn in history)


def settings_digest(record: Mapping[str, Any]) -> str:
    """Digest what changes a text besides file and model: `generation` and `seed`."""
    settings = {"generation": record.get("generation"), "seed": record.get("seed")}
    try:
        return _digest(orjson.dumps(settings))
    except TypeError:  # what only the plain writer takes
        return _digest(json.dumps(clean(settings), allow_nan=False).encode())


@lru_cache(maxsize=1024)  # a large ledger holds the same few settings
def _digest(settings: bytes) -> str:
    text = json.dumps(json.loads(settings), sort_keys=True, allow_nan=False)
    return sys.intern(hashlib.sha256(text.encode()).hexdigest()[:16])


def clean(value: Any) -> Any:
    """Copy a JSON value with null for each NaN and infinity, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {name: clean(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clean(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Entry(NamedTuple):
    """What resuming needs to know of the last record of a key."""

    is_error: bool
    path: str | None
    size_bytes: int | None
    mtime_ns: int | None
    sha256: str | None
    model_sha256: str | None
    settings: str  # see `settings_digest`

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Take the entry out of a record."""
        model = record.get("model")
        model_sha256 = model.get("sha256") if isinstance(model, Mapping) else None
        return cls(
            record.get("error") is not None,
            record.get("path"),
            record.get("size_bytes"),
            record.get("mtime_ns"),
            record.get("sha256"),
            sys.intern(model_sha256) if isinstance(model_sha256, str) else None,
            settings_digest(record),
        )


def is_current(
    entry: Entry,
    *,
    size_bytes: int | None,
    mtime_ns: int | None,
    model_sha256: str | None,
    settings: str,
) -> Literal["same", "changed", "hash"]:
    """Say whether a record still holds for a file, a model and settings.

    Returns:
        `same`: it does. `hash`: it does if the file's SHA-256 is still `entry.sha256`.
        `changed`: it does not.
    """
    if entry.model_sha256 != model_sha256 or entry.settings != settings:
        return "changed"
    if (entry.size_bytes, entry.mtime_ns) == (size_bytes, mtime_ns):
        return "same"
    is_touched = entry.size_bytes == size_bytes and entry.sha256 is not None
    return "hash" if is_touched else "changed"


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[int, Record | None, bytes]]:
    """Read a ledger line by line, without a lock and whatever it holds.

    Yields:
        line number from 1, the record (None where the line is not one), the raw bytes with their
        newline; only the last line may lack it.

    Raises:
        LedgerError: the file cannot be read.
    """
    for line_no, found, raw in read_keyed(path):
        yield line_no, None if found is None else found[1], raw


def read_keyed(
    path: str | os.PathLike[str],
) -> Iterator[tuple[int, tuple[Key, Record] | None, bytes]]:
    """Read a ledger as `read_records` does, each record with its key."""
    try:
        with Path(path).open("rb") as file:
            for line_no, raw in enumerate(file, 1):
                yield line_no, _parse(raw), raw
    except OSError as error:
        raise LedgerError(f"cannot read '{os.fspath(path)}': {why(error)}") from error


def read_index(path: str | os.PathLike[str]) -> dict[Key, Entry]:
    """Read what a ledger holds without locking or changing it; nothing where there is none.

    Raises:
        LedgerError: the file cannot be read.
    """
    if not os.path.lexists(path):
        return {}
    keyed = (found for _, found, _ in read_keyed(path) if found is not None)
    return {key: Entry.of(record) for key, record in keyed}


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Keep Python from looking for cycles again and again while millions of objects are made.

    Also a decorator. None of what a ledger is read into has any.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Ledger:
    """A ledger open for writing, under its lock; a context manager. See `Ledger.open`."""

    def __init__(self, path: Path, name: str, lock_fd: int) -> None:
        self.path = path  # links resolved
        self.torn_bytes = 0  # moved to FILE.torn by opening
        self.bad_lines: list[int] = []  # numbers of whole lines that are not records; they stay
        self._name = name  # as the user gave it
        self._lock_fd = lock_fd
        self._fd = -1
        self._size = 0  # of the whole lines, all there should be
        self._index: dict[Key, Entry] = {}
        _open_ledgers.add(self)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, force: bool = False) -> Self:
        """Lock a ledger, read what is done, move an unfinished last line away.

        Args:
            path: created where it does not exist.
            force: rename an existing file to FILE.bak-N and start anew.

        Raises:
            UsageError: as `check_output`.
            LedgerBusyError: another process holds the lock.
            LedgerError: the file cannot be written or is not a ledger; it was not changed.
        """
        name = os.fspath(path)
        real = check_output(name)
        ledger = cls(real, name, _lock(_beside(real, "lock"), name))
        try:
            if force and os.path.lexists(real):
                _set_aside(real)
            ledger._load()
        except OSError as error:
            ledger.close()
            raise LedgerError(f"cannot write '{name}': {why(error)}") from error
        except BaseException:
            ledger.close()
            raise
        return ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Count the keys."""
        return len(self._index)

    def close(self) -> None:
        """Give the lock back; closing twice does nothing."""
        if self._lock_fd >= 0:
            lock = _beside(self.path, "lock")
            with contextlib.suppress(OSError):
                # unlinked while held: who opened it meanwhile sees that it is no longer in place;
                # another file in its place is another run's
                if os.path.samestat(os.fstat(self._lock_fd), lock.lstat()):
                    lock.unlink()
        self._close_files()

    def lookup(self, key: Key) -> Entry | None:
        """Return the entry of the last record of a key."""
        return self._index.get(key)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it is on the disk when this returns.

        Raises:
            LedgerError: it could not be written; the ledger is as it was before.
            ValueError: the record has no id or task.
        """
        assert self._fd >= 0, f"'{self._name}' is closed"
        key = key_of(record)
        # a torn line is known by its start, so the id comes first
        value = clean({"id": record["id"], **record})
        text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
        # a lone surrogate becomes the JSON escape of itself
        line = text.encode("utf-8", "backslashreplace")
        self._check_in_place()
        try:
            _write(self._fd, line)
            os.fsync(self._fd)
            self._size += len(line)
        except BaseException as error:
            state = self._roll_back()
            if not isinstance(error, OSError):
                raise
            raise LedgerError(f"cannot write '{self._name}': {why(error)}; {state}") from error
        self._index[key] = Entry.of(value)

    @paused_collector()
    def _load(self) -> None:
        is_new = not self.path.exists()
        # no O_TRUNC, and not a byte is written before the whole file has been read
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._fd = os.open(self.path, flags, 0o666)
        if is_new:
            _sync_folder(self.path.parent)
        torn, is_last_unended = b"", False
        for line_no, found, raw in read_keyed(self.path):
            if found is not None:
                key, record = found
                self._index[key] = Entry.of(record)
                is_last_unended = not raw.endswith(b"\n")
            elif raw.endswith(b"\n"):
                self.bad_lines.append(line_no)
            elif is_torn(raw):
                torn = raw
                continue
            else:
                raise self._refusal(line_no, raw)
            self._size += len(raw)
        if self.bad_lines and not self._index:
            raise self._refusal(self.bad_lines[0], b"")
        if torn:
            self._move_torn(torn)
        if is_last_unended:
            _write(self._fd, b"\n")
            os.fsync(self._fd)
            self._size += 1

    def _move_torn(self, torn: bytes) -> None:
        with _beside(self.path, "torn").open("ab") as file:
            file.write(torn)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.path.parent)
        os.ftruncate(self._fd, self._size)
        os.fsync(self._fd)
        self.torn_bytes = len(torn)

    def _refusal(self, line_no: int, raw: bytes) -> LedgerError:
        what = f"begins with {start_of(raw)}" if raw else "is no record"
        return LedgerError(
            f"'{self._name}' is not a vla2 ledger: line {line_no} {what}; choose another -o"
        )

    def _check_in_place(self) -> None:
        """Refuse to write into a file that was deleted, or that someone else writes too."""
        ours = os.fstat(self._fd)
        try:
            there = self.path.stat()
        except OSError:
            there = None
        if there is None or not os.path.samestat(ours, there):
            raise LedgerError(f"'{self._name}' was removed or replaced while it was written")
        if ours.st_size != self._size:
            raise LedgerError(
                f"'{self._name}' was changed by something else while it was written;"
                " run the same command again"
            )

    def _roll_back(self) -> str:
        try:
            os.ftruncate(self._fd, self._size)
            os.fsync(self._fd)
        except OSError as error:
            return f"its last line may be unfinished ({why(error)}), the next run repairs that"
        return "it is whole, free some space and run the same command again"

    def _close_files(self) -> None:
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1
        _open_ledgers.discard(self)


@contextlib.contextmanager
def new_ledger(
    path: str | os.PathLike[str], *, force: bool = False
) -> Iterator[Callable[[bytes], object]]:
    """Write a ledger at once: when the block ends it is there whole, before that nothing is.

    Args:
        path: where; lines are gathered in FILE.part beside it, under its lock.
        force: rename an existing file to FILE.bak-N.

    Yields:
        What takes the lines, each with its newline.

    Raises:
        UsageError: it exists, or as `check_output`.
        LedgerBusyError: another process holds the lock.
        LedgerError: it cannot be written; nothing was changed.
    """
    name = os.fspath(path)
    real = check_output(name)
    part = _beside(real, "part")
    with Ledger(real, name, _lock(_beside(real, "lock"), name)):
        check_new(name, force=force)
        try:
            with part.open("wb") as file:
                yield file.write
                file.flush()
                os.fsync(file.fileno())
            if os.path.lexists(real):
                _set_aside(real)
            part.rename(real)
            _sync_folder(real.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise LedgerError(f"cannot write '{name}': {why(error)}") from error


def check_new(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Check that a new ledger can stand there.

    Raises:
        UsageError: something does, and it is not to be renamed by `force`.
        UsageError, LedgerError: as `check_output`.
    """
    name = os.fspath(path)
    if os.path.lexists(check_output(name)) and not force:
        raise UsageError(f"'{name}' exists; --force renames it to FILE.bak-N")


def belongs_to(path: str | os.PathLike[str], ledger: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a ledger or one of the files beside it, be they there or not."""
    found, real = Path(os.path.realpath(path)), Path(os.path.realpath(ledger))
    if found in (real, *(_beside(real, ending) for ending in ("lock", "part", "torn"))):
        return True
    return str(found).startswith(str(_beside(real, "bak-")))


def refuse_held(path: str | os.PathLike[str]) -> None:
    """Refuse a ledger that another process writes; nothing is locked or made.

    Raises:
        LedgerBusyError: its lock is held.
        LedgerError: its lock cannot be looked at.
    """
    name = os.fspath(path)
    lock = _beside(Path(os.path.realpath(name)), "lock")
    try:
        fd = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LedgerError(f"cannot read '{lock}': {why(error)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LedgerBusyError(_describe_holder(name, os.pread(fd, 4096, 0))) from None
    except OSError as error:
        raise LedgerError(f"cannot look at '{lock}': {why(error)}") from error
    finally:
        os.close(fd)


_open_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _forget_in_child() -> None:
    # a lock belongs to every process that has its file open: a decoder must not keep it alive
    for ledger in list(_open_ledgers):
        ledger._close_files()


os.register_at_fork(after_in_child=_forget_in_child)


def _parse(raw: bytes) -> tuple[Key, Record] | None:
    try:
        record = _load_json(raw)
        if not isinstance(record, dict) or not _has_right_types(record):
            return None
        return key_of(record), record
    except (ValueError, RecursionError):
        return None


def _load_json(raw: bytes) -> Any:
    """Read a line as `json.loads` does, several times as fast.

    What orjson refuses may still be JSON for Python: NaN, lone surrogates, a mark in front. Where
    it would take what Python does not, or make a float of an integer, it is not asked.
    """
    shape = raw.translate(_SHAPE)  # one digit and one bracket stand for all
    has_long_numbers = _LONG in shape or _LONG_NEGATIVE in shape
    if not has_long_numbers and shape.count(b"[") < MAX_BRACKETS:
        try:
            return orjson.loads(raw)
        except ValueError:
            pass  # as below
    return json.loads(raw.decode("utf-8-sig"))  # an editor may have put its mark in front


def _has_right_types(record: Mapping[str, Any]) -> bool:
    return (
        isinstance(record.get("path"), _TEXT)
        and isinstance(record.get("sha256"), _TEXT)
        and isinstance(record.get("size_bytes"), _INTEGER)
        and isinstance(record.get("mtime_ns"), _INTEGER)
    )


def is_torn(raw: bytes) -> bool:
    """Say whether a line without newline is the start of one of our records, or a power cut's."""
    return raw.startswith(_RECORD_START) or _RECORD_START.startswith(raw) or not raw.strip(b"\0")


def start_of(raw: bytes) -> str:
    """Quote how a line begins."""
    return ascii(raw[:24].decode("utf-8", "replace"))


def check_output(name: str) -> Path:
    """Follow links and check that a regular file stands there, or can.

    Returns:
        The path without links.

    Raises:
        UsageError: it is something else, or its folder does not exist.
        LedgerError: it cannot be looked at.
    """
    real = Path(os.path.realpath(name))
    # /dev/stdout may lead to a regular file, which the shell has open already
    if str(Path(name).absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        raise UsageError(f"'{name}' is not a regular file; -o - writes to stdout")
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        if name.endswith("/"):
            raise UsageError(f"'{name}' is a folder; -o takes a file") from None
        if not real.parent.is_dir():
            raise UsageError(
                f"'{name}': there is no folder '{real.parent}'; create it or choose another -o"
            ) from None
        return real
    except OSError as error:
        raise LedgerError(f"cannot write '{name}': {why(error)}") from error
    if stat.S_ISDIR(mode):
        raise UsageError(f"'{name}' is a folder; -o takes a file")
    if not stat.S_ISREG(mode):
        raise UsageError(f"'{name}' is not a regular file; -o - writes to stdout")
    return real


def _lock(path: Path, name: str) -> int:
    """Take the lock and write into it who holds it; return its descriptor."""
    for _ in range(100):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise LedgerError(f"cannot write '{path}': {why(error)}; choose another -o") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_in_place = os.path.lexists(path) and os.path.samestat(os.fstat(fd), path.lstat())
        except BlockingIOError:
            holder = os.pread(fd, 4096, 0)
            os.close(fd)
            raise LedgerBusyError(_describe_holder(name, holder)) from None
        except FileNotFoundError:
            is_in_place = False
        except OSError as error:
            os.close(fd)
            raise LedgerError(
                f"cannot lock '{path}': {why(error)}; choose an -o on another file system"
            ) from error
        if is_in_place:
            break
        os.close(fd)  # its holder has just closed and unlinked it
        time.sleep(0.01)
    else:
        raise LedgerBusyError(_describe_holder(name, b""))
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "since": since}).encode()
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name on it
        os.ftruncate(fd, 0)
        os.pwrite(fd, holder + b"\n", 0)
    return fd


def _describe_holder(name: str, holder: bytes) -> str:
    try:
        info = json.loads(holder)
        pid, host = int(info["pid"]), str(info["host"])
        since = datetime.fromisoformat(info["since"]).astimezone()
    except (ValueError, KeyError, TypeError):
        return f"'{name}' is being written by another process"
    is_today = since.date() == datetime.now().date()
    when = f"{since:%H:%M}" if is_today else f"{since:%Y-%m-%d %H:%M}"
    return f"'{name}' is being written by process {pid} on host {host} since {when}"


def _set_aside(path: Path) -> None:
    number = 1
    while os.path.lexists(_beside(path, f"bak-{number}")):
        number += 1
    path.rename(_beside(path, f"bak-{number}"))
    _sync_folder(path.parent)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot; they need not
            os.fsync(fd)
    finally:
        os.close(fd)
