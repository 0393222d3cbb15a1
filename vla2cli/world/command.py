"""`vla2 world`: write clips of the drawn world, and judge what a model says of them."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vla2cli import options as opt
from vla2cli.console import (
    Console,
    count,
    format_duration,
    format_size,
    print_data,
    print_text,
)
from vla2cli.errors import UsageError
from vla2cli.stop import cleaning_up

if TYPE_CHECKING:
    from rich.progress import Progress

    from vla2cli.world.facts import Thing
    from vla2cli.world.score import Row

_MAX_WORKERS = 16
_MAX_NAMED = 10  # of what is missing, without --verbose
_EXAMPLES = (
    "\b\nExamples:\n"
    "  vla2 world -o .demo/heldout --count 12 --seed 7 --split heldout\n"
    "  vla2 world -o .demo/unheard --count 12 --seed 7 --split heldout --mute"
)
_SCORE_EXAMPLES = (
    "\b\nExamples (after vla2 world -o DIR and vla2 ask --manifest DIR/manifest.jsonl -o LEDGER):\n"
    "  vla2 world score LEDGER DIR/manifest.jsonl\n"
    "  vla2 world score LEDGER DIR/manifest.jsonl --json"
)

world_app = typer.Typer(
    help="Write clips of a drawn world with all that is true of them, or judge answers about them.",
    epilog=_EXAMPLES,
)


@world_app.callback(invoke_without_command=True)
def make(
    ctx: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the clips, new or empty.", metavar="DIR"),
    ] = None,
    number: Annotated[int, typer.Option("--count", min=1, help="Clips to write.")] = 100,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="The same one gives the same clips.")
    ] = 0,
    split: Annotated[
        Literal["train", "heldout"],
        typer.Option(
            "--split",
            help="Each heldout clip pairs what no train clip does: an object and a motion, "
            "an object and a sound, or a colour and a shape.",
        ),
    ] = "train",
    mute: Annotated[
        bool,
        typer.Option("--mute", help="A control: the same clips and questions, but no sound."),
    ] = False,
    shuffle: Annotated[
        bool,
        typer.Option(
            "--shuffle",
            help="A control: the same clips and questions, but frames in a random order.",
        ),
    ] = False,
    guest: Annotated[
        str | None,
        typer.Option(
            "--guest",
            metavar="NAME=PICTURE",
            help="Put an object of your own into every clip: a picture with transparency.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes; by default one a core, up to 16."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", "-f", help="Remove such clips from DIR first; other files stay."),
    ] = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write clips of a drawn world with all that is true of them, or judge answers about them."""
    if ctx.invoked_subcommand is not None:
        if output is not None:
            raise UsageError(f"'-o {output}' does not go with {ctx.invoked_subcommand}")
        return
    if output is None:
        raise UsageError("clips need a folder: -o DIR")
    from vla2cli.world.write import World, write_world

    console = Console(quiet=quiet, verbose=verbose)
    started = time.monotonic()
    processes = min(workers or min(os.cpu_count() or 1, _MAX_WORKERS), number)
    world = World(seed, split, number, mute, shuffle, guest=_read_guest(guest))
    written = write_world(world, output, workers=processes, force=force)
    size_bytes = 0
    with cleaning_up(console.note), closing(written), _bar(number, is_shown=not quiet) as bar:
        for name in written:
            bar.advance(bar.task_ids[0])
            size_bytes += (output / name).stat().st_size
    console.detail(f"drawn and encoded by {processes} at a time")
    controls = ", muted" * mute + ", shuffled" * shuffle
    console.note(
        f"{output}: {count(number, f'{split} clip')} of seed {seed}{controls}, "
        f"{format_size(size_bytes)}, in {format_duration(time.monotonic() - started)}"
    )


def _read_guest(text: str | None) -> Thing | None:
    if text is None:
        return None
    from vla2cli.world.facts import Thing
    from vla2cli.world.picture import open_picture
    from vla2cli.world.vocabulary import OBJECTS, SHAPES

    name, separator, picture = text.partition("=")
    if not (separator and picture and re.fullmatch(r"[a-z]+( [a-z]+)*", name)):
        raise UsageError(f"'--guest {text}': expected NAME=PICTURE, the name in small letters")
    if name in OBJECTS or name in SHAPES:
        raise UsageError(f"'--guest {text}': the world has its own {name}; give another name")
    open_picture(picture)
    return Thing(name, picture=picture)


@world_app.command(epilog=_SCORE_EXAMPLES)
def score(
    ledger: Annotated[Path, typer.Argument(help="JSON Lines that vla2 ask wrote.")],
    manifest: Annotated[Path, typer.Argument(help="The manifest that was asked.")],
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Count the answers that are exactly right, for each kind of question."""
    from vla2cli.world.score import format_table
    from vla2cli.world.score import score as compare

    rows = compare(ledger, manifest)
    if json or not sys.stdout.isatty():
        for row in rows:
            print_data(row.as_record())
    else:
        print_text(format_table(rows))
    console = Console(quiet=quiet, verbose=verbose)
    _name_unanswered(rows, console)
    num, right = sum(row.num for row in rows), sum(row.right for row in rows)
    console.note(f"{ledger}: {right:,} of {num:,} exactly right, {right / num:.1%}")
    raise typer.Exit(3 if any(row.missing or row.errors for row in rows) else 0)


def _name_unanswered(rows: list[Row], console: Console) -> None:
    for what in ("missing", "errors"):
        items = [item for row in rows for item in getattr(row, what)]
        for idx, item in enumerate(items):
            say = console.note if idx < _MAX_NAMED else console.detail
            say(f"{what}: {item.id}: {item.question}")
        if len(items) > _MAX_NAMED and not console.verbose:
            console.note(f"{what}: {len(items) - _MAX_NAMED:,} more, which -v names")


@contextmanager
def _bar(total: int, *, is_shown: bool) -> Iterator[Progress]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(bar_width=28), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    is_hidden = not is_shown or not sys.stderr.isatty()
    with Progress(
        *columns, console=RichConsole(stderr=True), transient=True, disable=is_hidden
    ) as bar:
        bar.add_task("", total=total)
        yield bar
