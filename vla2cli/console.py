"""What people read: everything on stderr, and the plain text at a terminal.

Data never passes through here. Bars are drawn only at a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vla2cli.errors import LedgerError, why

Say = Callable[[str], None]  # how what takes long tells people about it: `Console.note`


def say_once(say: Say) -> Say:
    """Return what says its first message alone."""
    has_said = False

    def say_first(message: str) -> None:
        nonlocal has_said
        if not has_said:
            say(message)
        has_said = True

    return say_first


class Console:
    """Writes to stderr what a run has to say.

    Args:
        quiet: say nothing but what ends the run.
        verbose: say more.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._print: Callable[[str], None] = _print_line

    def note(self, message: str) -> None:
        """Say something that helps."""
        if not self.quiet:
            self._print(message)

    def detail(self, message: str) -> None:
        """Say something that only `--verbose` asks for."""
        if self.verbose:
            self._print(message)

    @contextmanager
    def printing(self, print_line: Callable[[str], None]) -> Iterator[None]:
        """Let messages go another way for a while, such as above a bar."""
        before, self._print = self._print, print_line
        try:
            yield
        finally:
            self._print = before


def _print_line(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)  # noqa: T201


def printable(text: str) -> str:
    """Spell out what a terminal would obey: control characters in a file's name."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_data(record: Mapping[str, Any]) -> None:
    """Write one JSON object as a line on stdout, flushed."""
    print_text(json.dumps(record, ensure_ascii=False))


def print_text(text: str) -> None:
    """Write a text as a line on stdout, flushed; always UTF-8, as a ledger is."""
    try:
        sys.stdout.buffer.write((text + "\n").encode("utf-8", "backslashreplace"))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LedgerError(f"cannot write to stdout: {why(error)}") from error


def format_rate(per_second: float) -> str:
    """Write a rate in the unit that keeps its number readable: `6.1/s`, `4.2/min`."""
    for factor, unit in ((1, "s"), (60, "min")):
        if per_second * factor >= 1:
            return f"{per_second * factor:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


def format_duration(seconds: float) -> str:
    """Write a duration as `0.8 s`, `2:31` or `1:02:31`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_size(num_bytes: float) -> str:
    """Write a size as `14.5 GB` or `2.4 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def count(number: int, noun: str) -> str:
    """Write a number with its noun: `1 video`, `1,204 videos`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
