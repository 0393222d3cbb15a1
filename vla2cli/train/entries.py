"""The public data format, checked: a JSON list, or JSON Lines, of conversations about files.

    {"id": ..., "video" | "image" | "audio": path, "conversations": [{"from": ..., "value": ...}]}

An entry about a text alone has none of the three keys. One that is otherwise not in the format is
handed on with the reason: among millions there may be some.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla2cli.errors import InputError, UsageError, why
from vla2cli.train.conversation import ROLES, Utterance

MEDIA = ("video", "image", "audio")


@dataclass(frozen=True, slots=True)  # there may be millions
class Entry:
    """One conversation of a data file."""

    id: str  # the file's, or its place in the file where it has none
    medium: str  # video, image, audio or text
    path: str | None  # relative to the data's folder; None for a text
    conversation: tuple[Utterance, ...]
    fault: str | None = None  # why it cannot be used, whatever the rest is


def read_entries(path: Path) -> list[Entry]:
    """Read a whole data file.

    Raises:
        UsageError: it is no list and no JSON Lines, or empty.
    """
    content = _read(path)
    if not content:
        raise UsageError(f"'{path}' has no entry")
    return [_entry(entry, f"'{path}': entry {i}", i) for i, entry in enumerate(content, 1)]


def _entry(entry: Any, where: str, number: int) -> Entry:
    id_ = str(entry.get("id", number) if isinstance(entry, dict) else number)
    try:
        return _parse_entry(entry, where, id_)
    except InputError as error:
        return Entry(id_, "text", None, (), str(error))


def _read(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("["):
            return [_parse_line(line, path, i) for i, line in _lines(text)]
        content = json.loads(text)
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {why(error)}") from error
    except ValueError as error:
        raise UsageError(f"'{path}' is not JSON in UTF-8: {error}") from error
    assert isinstance(content, list)
    return content


def _lines(text: str) -> Iterable[tuple[int, str]]:
    # not `splitlines`: a string in JSON may hold other line breaks as they are
    return ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _parse_line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UsageError(f"'{path}': line {number} is not JSON: {error}") from error


def _parse_entry(entry: Any, where: str, id_: str) -> Entry:
    if not isinstance(entry, dict):
        raise _bad(f"{where} is {entry!r:.80}, expected an object")
    media = [medium for medium in MEDIA if medium in entry]
    if len(media) > 1:
        raise _bad(f"{where} has both '{media[0]}' and '{media[1]}', expected one of them")
    path = entry[media[0]] if media else None
    if media and not (isinstance(path, str) and path):
        raise _bad(f"{where}: '{media[0]}' is {path!r:.80}, expected a path")
    turns = entry.get("conversations")
    if not isinstance(turns, list):
        raise _bad(f"{where}: 'conversations' is {turns!r:.80}, expected a list")
    return Entry(
        id_,
        media[0] if media else "text",
        path,
        tuple(
            _utterance(turn, f"{where}: turn {i} of 'conversations'")
            for i, turn in enumerate(turns, 1)
        ),
    )


def _utterance(turn: Any, where: str) -> Utterance:
    if not isinstance(turn, dict):
        raise _bad(f"{where} is {turn!r:.80}, expected an object with 'from' and 'value'")
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in list(ROLES):  # it may be anything, also what has no hash
        raise _bad(f"{where}: 'from' is {speaker!r:.80}, expected {' or '.join(ROLES)}")
    if not isinstance(text, str):
        raise _bad(f"{where}: 'value' is {text!r:.80}, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a character
        half = text[error.start]
        raise _bad(f"{where}: 'value' has {half!r}, which is no character") from error
    return Utterance(speaker, text)


def _bad(what: str) -> InputError:
    return InputError(what, kind="conversation", stage="preprocess")
