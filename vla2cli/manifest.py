"""A manifest: JSON Lines that name a file and a question about it, a line for each question.

    {"path": "clips/1.mp4", "question": "Which way does it move?", "choices": ["left", "right"]}

Paths start from the manifest's folder. A line may have an `id`, which is its path otherwise, and
`choices` of its own; what else it has, such as `answer` and `kind`, is for whoever scores the run.
"""

from __future__ import annotations

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
from vla2cli.plan import KINDS_OF, Choices, is_choice


@dataclass(frozen=True)
class Manifest:
    """What to ask of which files."""

    name: str  # as the user gave it
    items: tuple[Item, ...]  # in the order in which they come up first, with what is asked of each

    def found(self, modality: str) -> Found:
        """Return the files as a search gives them; those of another modality are counted only."""
        wanted = KINDS_OF[modality] | {"unknown"}
        kinds = Counter(item.kind for item in self.items)
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
            skipped=len(self.items) - len(kept),
            unreadable=(),
        )
        return Found(kept, (note,))


def read_manifest(path: str, *, choices: Choices = (), stdin: BinaryIO | None = None) -> Manifest:
    """Read a manifest whole.

    Args:
        path: the file, or `-` for standard input, whose paths start from the current folder.
        choices: of the lines that have none of their own.
        stdin: by default standard input.

    Raises:
        UsageError: it cannot be read, or a line of it is wrong; the message has its number.
        NoInputError: it holds no line.
    """
    if path == "-":
        return _Reading("standard input", "", choices).read(stdin or sys.stdin.buffer)
    try:
        with open(path, "rb") as file:  # noqa: PTH123  the name may hold any bytes
            return _Reading(path, os.path.dirname(path), choices).read(file)  # noqa: PTH120
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {why(error)}") from error


@dataclass(frozen=True)
class Line:
    """One line of a manifest: what every one has to have, and the rest of it."""

    where: str  # file and number, for messages
    number: int  # from 1
    id: str
    path: str
    question: str
    entry: dict[str, Any]  # as it stands there

    def text(self, key: str) -> str:
        """Return a text of the entry.

        Raises:
            UsageError: there is none, or it is blank.
        """
        return _text(self.entry, key, self.where)


def read_lines(file: Iterable[bytes], name: str) -> Iterator[Line]:
    """Read what each line of a manifest is about; blank ones are none.

    Raises:
        UsageError: a line is wrong; the message has the file's name and the line's number.
    """
    for number, raw in enumerate(file, 1):
        if raw.strip():
            where = f"{name}: line {number}"
            entry = _parse(raw, where)
            path, question = (_text(entry, key, where) for key in ("path", "question"))
            is_named = entry.get("id") is not None
            id_ = _text(entry, "id", where) if is_named else encode_name(path)
            yield Line(where, number, id_, path, question, entry)


@dataclass
class _Reading:
    """What the lines so far have said."""

    name: str
    folder: str
    choices: Choices
    items: dict[str, tuple[Item, int]] = field(default_factory=dict)  # id -> item, its first line
    asked: dict[str, dict[str, Choices]] = field(default_factory=dict)
    lines: dict[tuple[str, str], int] = field(default_factory=dict)  # id and question -> line

    def read(self, file: Iterable[bytes]) -> Manifest:
        for line in read_lines(file, self.name):
            self._take(line)
        if not self.items:
            raise NoInputError(f"'{self.name}' holds no line with a path and a question")
        items = (replace(item, asked=self.asked[item.id]) for item, _ in self.items.values())
        return Manifest(self.name, tuple(items))

    def _take(self, line: Line) -> None:
        where, id_, path, question = line.where, line.id, line.path, line.question
        item = Item(id_, os.path.join(self.folder, path), kind_of(path))  # noqa: PTH118
        first, first_number = self.items.setdefault(id_, (item, line.number))
        if first.path != item.path:
            raise UsageError(
                f"{where}: id {id_!r} is of {path!r} here and of another path in line "
                f"{first_number}"
            )
        choices = _choices(line.entry, where) or self.choices
        known = self.asked.setdefault(id_, {})
        if known.setdefault(question, choices) != choices:
            raise UsageError(
                f"{where}: {question!r} is asked of {id_!r} with other choices in line "
                f"{self.lines[id_, question]}; give one of them an id of its own"
            )
        self.lines.setdefault((id_, question), line.number)


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
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
