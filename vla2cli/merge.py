"""The ledgers of shards, or of any runs, joined into one.

Within one ledger the last record of a key wins. Of several ledgers, the same record is taken once,
and an error gives way to a text, or to the error of a later ledger; two texts that say different
things are a conflict, and nothing is written. What is written are the lines as they stand, by input
and by line.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from vla2cli.console import count
from vla2cli.errors import LedgerError, UsageError, why
from vla2cli.ledger import (
    Key,
    Record,
    check_new,
    is_torn,
    new_ledger,
    paused_collector,
    read_keyed,
    refuse_held,
)

# between two records that are the same; a mean's last bits depend on what else was in the batch
MAY_DIFFER = ("created", "timings_s", "logprob_mean")
SHOWN_CHARS = 60  # of a question in a message


@dataclass
class Input:
    """One ledger that is merged."""

    path: str
    records: int = 0
    keys: int = 0
    taken: int = 0  # records that the output has from here
    bad_lines: list[int] = field(default_factory=list)  # numbers of those that are no records
    torn_bytes: int = 0  # of an unfinished last line


@dataclass(frozen=True)
class Merged:
    """What a merge has written."""

    output: str
    records: int
    done: int
    errors: int
    inputs: tuple[Input, ...]

    @property
    def is_short(self) -> bool:
        """Whether lines of the inputs were left out that are no records."""
        return any(source.bad_lines or source.torn_bytes for source in self.inputs)


class _Kept(NamedTuple):
    """The record of a key, as far as others are held against it."""

    input_idx: int
    line: int  # from 1
    is_error: bool
    content: bytes  # digest, see `_content`


def merge_ledgers(
    paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, force: bool = False
) -> Merged:
    """Join ledgers into a new one, which is there whole or not at all.

    Args:
        paths: the ledgers; they are not changed.
        output: the new one.
        force: rename a file that is there to FILE.bak-N.

    Raises:
        UsageError: the output is one of the inputs, or exists.
        LedgerBusyError: a run writes to one of the files.
        LedgerError: two ledgers contradict each other, or a file cannot be read or written.
    """
    inputs = [Input(os.fspath(path)) for path in paths]
    for source in inputs:
        if _is_same_file(source.path, output):
            raise UsageError(f"'{source.path}' is an input; choose another -o")
    check_new(output, force=force)
    states = [_state_of(source) for source in inputs]
    kept = _choose(inputs)
    lines: list[set[int]] = [set() for _ in inputs]
    for chosen in kept.values():
        lines[chosen.input_idx].add(chosen.line)
    with new_ledger(output, force=force) as write:
        for source, taken, state in zip(inputs, lines, states, strict=True):
            source.taken = len(taken)
            for raw in _lines(source, taken):
                write(raw)
            if _state_of(source) != state:
                raise LedgerError(
                    f"'{source.path}' was changed while it was read; run the same command again"
                )
    errors = sum(chosen.is_error for chosen in kept.values())
    return Merged(os.fspath(output), len(kept), len(kept) - errors, errors, tuple(inputs))


def _is_same_file(first: str, second: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(first, second)  # noqa: PTH121
    except OSError:
        return False


def _state_of(source: Input) -> tuple[int, ...]:
    """Say which file it is and how it stands; a pipe could not be read twice."""
    try:
        status = os.stat(source.path)  # noqa: PTH116
    except OSError as error:
        raise LedgerError(f"cannot read '{source.path}': {why(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise LedgerError(f"'{source.path}' is not a regular file")
    refuse_held(source.path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@paused_collector()
def _choose(inputs: Sequence[Input]) -> dict[Key, _Kept]:
    kept: dict[Key, _Kept] = {}
    conflicts: dict[Key, tuple[_Kept, _Kept]] = {}
    for idx, source in enumerate(inputs):
        for key, new in _read(source, idx).items():
            old = kept.get(key)
            if old is None or old.is_error:
                kept[key] = new
            elif not new.is_error and old.content != new.content:
                conflicts.setdefault(key, (old, new))
    if conflicts:
        raise LedgerError(_describe(conflicts, inputs))
    return kept


def _read(source: Input, idx: int) -> dict[Key, _Kept]:
    last: dict[Key, _Kept] = {}
    for line, found, raw in read_keyed(source.path):
        if found is not None:
            key, record = found
            source.records += 1
            last[key] = _Kept(idx, line, record.get("error") is not None, _content(record))
        elif raw.endswith(b"\n") or not is_torn(raw):
            source.bad_lines.append(line)
        else:
            source.torn_bytes = len(raw)
    if source.bad_lines and not last:
        raise LedgerError(f"'{source.path}' is not a vla2 ledger: no line of it is a record")
    source.keys = len(last)
    return last


def _content(record: Record, only: str | None = None) -> bytes:
    """Digest all of a record, or one field, but what may differ; of a `choice` only the text."""
    fixed = {
        name: value
        for name, value in record.items()
        if name not in MAY_DIFFER and only in (None, name)
    }
    if isinstance(choice := fixed.get("choice"), dict):
        fixed["choice"] = choice.get("text")  # probabilities depend on the batch like means do
    try:
        text = orjson.dumps(fixed, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # what only the plain writer takes
        text = json.dumps(fixed, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def _lines(source: Input, wanted: set[int]) -> Iterator[bytes]:
    """Yield the wanted lines as they stand, each with its end and without an editor's mark."""
    try:
        with open(source.path, "rb") as file:  # noqa: PTH123
            for line, raw in enumerate(file, 1):
                if line in wanted:
                    yield raw.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n") + b"\n"
    except OSError as error:
        raise LedgerError(f"cannot read '{source.path}': {why(error)}") from error


def _describe(conflicts: dict[Key, tuple[_Kept, _Kept]], inputs: Sequence[Input]) -> str:
    key, pair = next(iter(conflicts.items()))
    first, second = (_record(inputs[kept.input_idx], kept.line) for kept in pair)
    names = dict.fromkeys([*first, *second])
    differing = [name for name in names if _content(first, name) != _content(second, name)]
    places = " and ".join(f"'{inputs[kept.input_idx].path}' line {kept.line}" for kept in pair)
    keys = "1 key has" if len(conflicts) == 1 else f"{len(conflicts):,} keys have"
    return (
        f"{keys} two different records, nothing was written: {_describe_key(key)} in {places}, "
        f"which differ in {', '.join(differing)}; leave one of the ledgers out"
    )


def _describe_key(key: Key) -> str:
    id_, task, question, segment, asked = key
    parts = [f"id '{id_}'", f"task {task}"]
    shown = question if len(question) <= SHOWN_CHARS else f"{question[:SHOWN_CHARS]}…"
    parts += [f"question '{shown}'"] if question else []
    parts += [f"after {count(len(asked), 'question')}"] if asked else []
    if segment is not None:
        parts.append("segment {}-{} s".format(*("" if end is None else end for end in segment)))
    return ", ".join(parts)


def _record(source: Input, line: int) -> dict[str, Any]:
    found = next(found for number, found, _ in read_keyed(source.path) if number == line)
    return {} if found is None else found[1]
