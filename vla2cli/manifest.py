"""A manifest: a line for each file, or part of one, and question about it.

    {"path": "clips/1.mp4", "question": "Which way does it move?", "choices": ["left", "right"]}

JSON Lines, or CSV where its name ends so: a header line, `left|right` for choices, and an empty
cell for what is not given.

Paths start from the manifest's folder. A line may have an `id`, which is its path otherwise,
`start_s` and `end_s` as the flags take them, and `choices` of its own; what else it has, such as
`answer` and `kind`, is for whoever scores the run.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from vla2_models.errors import one_line
from vla2cli.errors import NoInputError, UsageError, why
from vla2cli.inputs import Found, Item, Note, encode_name, kind_of
from vla2cli.plan import KINDS_OF, Choices, is_choice, parse_time

_Range = tuple[float | None, float | None]  # start_s, end_s
_Part = tuple[str, _Range]  # id and range: what tells items apart


@dataclass(frozen=True)
class Manifest:
    """What to ask of which files."""

    name: str  # as the user gave it
    items: tuple[Item, ...]  # in the order in which they come up first, with what is asked of each

    def found(self, modality: str) -> Found:
        """Return the files as a search gives them; those of another modality are counted only."""
        wanted = KINDS_OF[modality] | {"unknown"}
        kind_of_file = {item.id: item.kind for item in self.items}
        kinds = Counter(kind_of_file.values())
        kept = tuple(item for item in self.items if item.kind in wanted)
        if not kept:
            raise NoInputError(f"'{self.name}' names no file of --modality {modality}")
        note = Note(
            root=self.name,
            videos=kinds["video"],
            images=kinds["image"],
            audio=kinds["audio"],
            unknown=kinds["unknown"],
            others=0,
            skipped=sum(kinds[kind] for kind in kinds.keys() - wanted),
            unreadable=(),
        )
        return Found(kept, (note,))


def read_manifest(
    path: str,
    *,
    choices: Choices = (),
    needs_question: bool = True,
    stdin: BinaryIO | None = None,
) -> Manifest:
    """Read a manifest whole.

    Args:
        path: the file, or `-` for standard input, whose paths start from the current folder.
        choices: of the lines that have none of their own.
        needs_question: refuse a line without one, which is about what the command asks.
        stdin: by default standard input.

    Raises:
        UsageError: it cannot be read, or a line of it is wrong; the message has its number.
        NoInputError: it holds no line.
    """
    if path == "-":
        reading = _Reading("standard input", "", choices)
        return reading.read(stdin or sys.stdin.buffer, needs_question)
    reading = _Reading(path, os.path.dirname(path), choices)  # noqa: PTH120
    try:
        with open(path, "rb") as file:  # noqa: PTH123  the name may hold any bytes
            return reading.read(file, needs_question)
    except OSError as error:
        raise _unreadable(path, "--manifest", error) from error


@dataclass(frozen=True)
class Line:
    """One line of a manifest: what every one has to have, and the rest of it."""

    where: str  # file and number, for messages
    number: int  # from 1
    id: str
    path: str
    question: str | None
    range_s: _Range
    entry: dict[str, Any]  # as it stands there

    def text(self, key: str) -> str:
        """Return a text of the entry.

        Raises:
            UsageError: there is none, or it is blank.
        """
        return _text(self.entry, key, self.where)


def read_lines(file: Iterable[bytes], name: str, *, needs_question: bool = True) -> Iterator[Line]:
    """Read what each line of a manifest is about; blank ones are none.

    Raises:
        UsageError: a line is wrong; the message has the file's name and the line's number.
    """
    read = _read_csv if name.lower().endswith(".csv") else _read_json
    for number, entry in read(file, name):
        where = f"{name}: line {number}"
        path = _text(entry, "path", where)
        id_ = _text(entry, "id", where) if entry.get("id") is not None else encode_name(path)
        is_asked = needs_question or entry.get("question") is not None
        question = _text(entry, "question", where) if is_asked else None
        yield Line(where, number, id_, path, question, _range(entry, where), entry)


@dataclass
class _Reading:
    """What the lines so far have said."""

    name: str
    folder: str
    choices: Choices
    items: dict[_Part, Item] = field(default_factory=dict)
    asked: dict[_Part, dict[str | None, Choices]] = field(default_factory=dict)
    first: dict[str, tuple[str, int]] = field(default_factory=dict)  # id -> path, its first line
    lines: dict[tuple[_Part, str | None], int] = field(default_factory=dict)

    def read(self, file: Iterable[bytes], needs_question: bool) -> Manifest:
        for line in read_lines(file, self.name, needs_question=needs_question):
            self._take(line)
        if not self.items:
            what = "a path and a question" if needs_question else "a path"
            raise NoInputError(f"'{self.name}' holds no line with {what}")
        items = (replace(item, asked=self.asked[part]) for part, item in self.items.items())
        return Manifest(self.name, tuple(items))

    def _take(self, line: Line) -> None:
        where, id_, path, question = line.where, line.id, line.path, line.question
        full_path = os.path.join(self.folder, path)  # noqa: PTH118
        first_path, first_number = self.first.setdefault(id_, (full_path, line.number))
        if first_path != full_path:
            raise UsageError(
                f"{where}: id {id_!r} is of {path!r} here and of another path in line "
                f"{first_number}"
            )
        item = Item(id_, full_path, kind_of(path), *line.range_s)
        if item.kind == "image" and item.is_part:
            raise UsageError(f"{where}: {path!r} is a picture, which has no start_s and no end_s")
        part = id_, line.range_s
        self.items.setdefault(part, item)
        choices = _choices(line.entry, where) or self.choices
        if self.asked.setdefault(part, {}).setdefault(question, choices) != choices:
            asked = "the same" if question is None else repr(question)
            raise UsageError(
                f"{where}: {asked} is asked of {id_!r} with other choices in line "
                f"{self.lines[part, question]}; give one of them an id of its own"
            )
        self.lines.setdefault((part, question), line.number)


def read_questions(path: str, *, stdin: BinaryIO | None = None) -> list[str]:
    """Read a text with a question in each line, every one once; blank lines are none.

    Args:
        path: the file, or `-` for standard input.
        stdin: by default standard input.

    Raises:
        UsageError: it cannot be read, is not UTF-8, or holds no question.
    """
    try:
        if path == "-":
            data = (stdin or sys.stdin.buffer).read()
        else:
            with open(path, "rb") as file:  # noqa: PTH123  the name may hold any bytes
                data = file.read()
    except OSError as error:
        raise _unreadable(path, "--questions", error) from error
    name = "standard input" if path == "-" else path
    questions: dict[str, None] = {}
    for number, raw in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        line = raw.strip().decode(errors="replace")
        if line and (not _is_text(line) or "\ufffd" in line):
            raise UsageError(f"{name}: line {number}: {_show(line)} is no text in UTF-8")
        questions |= {line: None} if line else {}
    if not questions:
        raise UsageError(f"'{name}' holds no question; expected one in each line")
    return list(questions)


def _unreadable(path: str, flag: str, error: OSError) -> UsageError:
    if isinstance(error, IsADirectoryError):
        return UsageError(f"'{path}' is a folder; {flag} takes a file")
    return UsageError(f"'{path}' cannot be read: {why(error)}")


def _read_json(file: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, raw in enumerate(file, 1):
        if raw.strip():
            yield number, _parse(raw, f"{name}: line {number}")


def _read_csv(file: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    columns: list[str] = []
    for number, row in _rows(file, name):
        where = f"{name}: line {number}"
        if not columns:
            columns = _columns(row, where)
            continue
        if len(row) != len(columns):
            raise UsageError(
                f"{where}: has {len(row)} cells, the header has {len(columns)}: {_show(row)}"
            )
        entry: dict[str, Any] = {c: cell for c, cell in zip(columns, row) if c and cell.strip()}
        if "choices" in entry:
            entry["choices"] = [option.strip() for option in entry["choices"].split("|")]
        yield number, entry


def _rows(file: Iterable[bytes], name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of CSV that hold something, each with the number of its first line."""
    rows = csv.reader(codecs.iterdecode(file, "utf-8-sig"), strict=True)
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}: line {number}: is not UTF-8; save the table so") from error
        except csv.Error as error:
            raise UsageError(f"{name}: line {number}: is no CSV: {error}") from error
        if any(map(str.strip, row)):
            yield number, row


def _columns(row: list[str], where: str) -> list[str]:
    columns = [cell.strip() for cell in row]
    names = [column for column in columns if column]
    if "path" not in names or len(set(names)) < len(names):
        raise UsageError(
            f"{where}: {_show(row)} is no header; expected the names of the columns, each once, "
            "with commas between them: path, question, …"
        )
    return columns


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):  # which of the two is meant?
            names = Counter(name for name, _ in pairs)
            raise UsageError(f"{where}: {_show(names.most_common(1)[0][0])} stands there twice")
        return fields

    try:
        entry = json.loads(raw, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        line = one_line(raw.decode(errors="replace"))[:80]
        raise UsageError(f"{where}: '{line}' is no JSON") from error
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: {_show(entry)} is no object with a path and a question")
    return entry


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    if key not in entry:
        raise UsageError(f"{where}: has no {key!r}: {_show(entry)}")
    value = entry[key]
    if not _is_text(value):
        raise UsageError(f"{where}: {key} is {_show(value)}, expected text")
    text: str = value
    return text


def _range(entry: dict[str, Any], where: str) -> _Range:
    start_s, end_s = (_time(entry, key, where) for key in ("start_s", "end_s"))
    if end_s is not None and end_s <= (start_s or 0.0):
        raise UsageError(
            f"{where}: end_s is {_show(entry['end_s'])}: the range ends before it begins"
        )
    return start_s, end_s


def _time(entry: dict[str, Any], key: str, where: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return parse_time(str(value))
    except UsageError:
        pass
    raise UsageError(f"{where}: {key} is {_show(value)}, expected seconds like 12.5, or 1:02:03")


def _choices(entry: dict[str, Any], where: str) -> Choices:
    value = entry.get("choices")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(map(_is_text, value)) or not is_choice(value):
        raise UsageError(
            f"{where}: choices is {_show(value)}, expected a list of two texts or more, each once"
        )
    return tuple(value)


def _is_text(value: Any) -> bool:
    """Tell whether a value can be a name or a question: not blank, and writable as UTF-8."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)[:80]
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate
