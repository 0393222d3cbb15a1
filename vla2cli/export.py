"""`vla2 export`: the front-end of a checkpoint as ONNX graphs, and the cache of those."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vla2cli import options as opt
from vla2cli.console import Console, count, format_size, print_data, print_text, printable
from vla2cli.errors import UsageError
from vla2cli.run import open_source

if TYPE_CHECKING:
    from vla2_models.checkpoint import Checkpoint
    from vla2cli.frontend.store import Entry

EXAMPLES = opt.epilog(
    "vla2 export builtin",
    "vla2 export builtin --precision int8",
)


def export(
    name: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A checkpoint: a folder or a hub id.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="New folder; without it, the cache that runs look into."
        ),
    ] = None,
    precision: opt.Precision = "fp32",
    force: Annotated[
        bool,
        typer.Option(
            "--force", "-f", help="Export though the cache has it; with --clean, remove all."
        ),
    ] = False,
    is_list: Annotated[bool, typer.Option("--list", help="List what the cache holds.")] = False,
    is_clean: Annotated[
        bool,
        typer.Option(
            "--clean",
            help="Remove from the cache what cannot be used: unfinished, changed, or of other "
            "versions. What is in use stays.",
        ),
    ] = False,
    revision: opt.Revision = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write towers and connectors as ONNX graphs, checked against PyTorch.

    Runs with --frontend onnx make what they need by themselves; this does it beforehand, or for
    another place. What is written is whole, or nothing is.
    """
    console = Console(quiet=quiet, verbose=verbose)
    if is_list or is_clean:
        if name is not None or output is not None or (is_list and is_clean):
            raise UsageError("--list and --clean are about the cache; each stands alone")
        _clean(console, json, everything=force) if is_clean else _list(console, json)
        return
    if name is None:
        raise UsageError("no MODEL: give a folder or a hub id, or --list")
    if output is not None and force:
        raise UsageError("--force is about the cache; with -o, give a new folder")
    console.note(f"looking at '{name}' …")
    from vla2_models.checkpoint import open_checkpoint

    source = open_source(hub_dir, offline, console)
    checkpoint = open_checkpoint(name, source, revision=revision)
    from vla2cli.frontend.store import Entry

    with _exported(checkpoint, precision, output, console, is_anew=force) as folder:
        _show(_describe(Entry.of(folder, console.note)), json)


@contextmanager
def _exported(
    checkpoint: Checkpoint, precision: str, output: Path | None, console: Console, *, is_anew: bool
) -> Iterator[Path]:
    """Export into the cache, where that is needed, or to a new folder."""
    if output is None:
        from vla2cli.frontend.cache import cached_export

        with cached_export(checkpoint, precision, console.note, is_anew=is_anew) as folder:
            yield folder
        return
    from vla2_models.saving import check_folder
    from vla2cli.frontend.export import export_checkpoint
    from vla2cli.stop import cleaning_up

    check_folder(output)
    with cleaning_up(console.note):
        export_checkpoint(checkpoint, output, precision, console.note)
    yield output


def _list(console: Console, json: bool) -> None:
    from vla2cli.frontend.store import cache_root, list_exports

    entries = list_exports(console.note)
    for entry in entries:
        _show(_describe(entry), json)
    size = format_size(sum(entry.size_bytes for entry in entries))
    console.note(f"{count(len(entries), 'export')}, {size}, in {cache_root()}")


def _clean(console: Console, json: bool, *, everything: bool) -> None:
    from vla2cli.frontend.store import cache_root, clean_exports

    removed = clean_exports(console.note, everything=everything)
    for entry in removed:
        _show(_describe(entry), json)
    size = format_size(sum(entry.size_bytes for entry in removed))
    console.note(f"{count(len(removed), 'export')} removed, {size}, from {cache_root()}")


def _describe(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(entry.folder), "size_bytes": entry.size_bytes}
    if entry.manifest is not None:
        origin = entry.manifest.origin
        found |= {"model": origin.id, "revision": origin.revision, "sha256": origin.sha256}
        found |= {"precision": origin.precision, "versions": dict(entry.manifest.versions)}
        found["graphs"] = {
            name: dataclasses.asdict(difference)
            for name, difference in entry.manifest.graphs.items()
        }
    return {**found, "usable": entry.problem is None, "why": entry.problem}


def _show(found: dict[str, Any], json: bool) -> None:
    if json or not sys.stdout.isatty():
        print_data(found)
        return
    words = [found.get("model"), found.get("precision"), format_size(found["size_bytes"])]
    why = found["why"] or "usable"
    print_text(printable("  ".join([found["path"], *filter(None, words), why])))
