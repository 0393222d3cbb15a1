"""The command line that a plan is of: its flags as they were given, quoted for a shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import typer

# what is the plan's own, and says nothing of the run
OWN = frozenset({"calibrate", "json", "quiet", "verbose", "debug"})


def command_line(ctx: typer.Context, name: str) -> str:
    """Write the command that does what was planned.

    Args:
        ctx: of `plan`; variables and the defaults of a `--config` file hold for the run as well.
        name: of the command to run, which has the same flags.
    """
    flags: list[str] = []
    for param in ctx.command.params:
        name_of = param.name or ""
        if name_of not in {*OWN, "paths"} and is_typed(ctx, name_of):
            flags += _spell(param, ctx.params[name_of])
    paths: Sequence[str] = ctx.params["paths"] or ()
    # a path that looks like a flag goes behind all of them
    if any(path.startswith("-") and path != "-" for path in paths):
        return _join(["vla2", name, *flags, "--", *paths])
    return _join(["vla2", name, *paths, *flags])


def _join(words: Sequence[str]) -> str:
    """Quote words so that they can be copied: in print nobody can tell a newline from another."""
    return " ".join(
        shlex.quote(word) if word.isprintable() else f"$'{_escape(word)}'" for word in words
    )


def _escape(word: str) -> str:
    raw = os.fsencode(word).decode("latin-1")  # a character for each byte
    return re.sub(r"[^\w/. -]", lambda found: f"\\x{ord(found[0]):02x}", raw, flags=re.ASCII)


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Tell whether a flag stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _spell(param: Any, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield (param.opts if value else param.secondary_opts)[0]
        return
    for each in value if isinstance(value, list | tuple) else [value]:
        yield from (param.opts[0], str(each))
