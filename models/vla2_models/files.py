"""The JSON files of a checkpoint, and what a folder is called while it is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import CheckpointError

UNFINISHED = ".unfinished-"  # how the name begins of what is being written


def check_readable(path: Path) -> None:
    """Check that a file can be opened: a pipe would wait, and libraries say little of the cause.

    Raises:
        CheckpointError: it is absent, no plain file, or may not be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"'{path}' cannot be read: it is no plain file")
        path.open("rb").close()
    except FileNotFoundError:
        raise CheckpointError(f"'{path.parent}' has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: the file is absent, unreadable or no JSON object.
    """
    check_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}, expected an object")
    return content


def is_count(value: Any) -> bool:
    """Tell whether a JSON value is a whole number from 0 (true and false are none)."""
    return type(value) is int and value >= 0


def is_positive(value: Any) -> bool:
    """Tell whether a JSON value is a finite number above 0 (true is none)."""
    return type(value) in (int, float) and 0 < value < math.inf


def write_json(path: Path, content: object) -> None:
    """Write a JSON file of a checkpoint, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is the old one or the new one, whenever the process is ended."""
    aside = path.with_name(f"{UNFINISHED}{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
