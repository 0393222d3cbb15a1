"""`vla2 models`: what there is, whether one is sound, and one written anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from vla2cli import options as opt
from vla2cli.console import Console, count, format_size, print_data, print_text
from vla2cli.run import note_reading, open_source
from vla2cli.stop import cleaning_up

EXAMPLES = opt.epilog("vla2 models show", "vla2 models builtin")


class _ShowByDefault(TyperGroup):
    """`vla2 models NAME` is `vla2 models show NAME`; a folder called show is `./show`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_named = bool(args) and args[0] in (*self.commands, "-h", "--help")
        return super().parse_args(ctx, args if is_named else ["show", *args])


models_app = typer.Typer(
    cls=_ShowByDefault,
    help="List checkpoints, check one, or write one anew as safetensors.",
    epilog=EXAMPLES,
)


@models_app.command(epilog=EXAMPLES)
def show(
    name: Annotated[
        str | None,
        typer.Argument(help="A folder or hub id to check; without it, all there are."),
    ] = None,
    revision: opt.Revision = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """List the checkpoints on this disk and the public ones, or read one whole to check it."""
    from vla2_models.loading import check_weights
    from vla2cli import facts

    console = Console(quiet=quiet, verbose=verbose)
    source = open_source(hub_dir, offline, console)
    if name is not None:
        checkpoint, num_parameters = facts.check_headers(name, source, revision)
        note_reading(checkpoint, console)
        check_weights(checkpoint, values=True)
        _show(facts.describe_checkpoint(name, checkpoint, num_parameters), json)
        return
    here = list(facts.find_checkpoints(source))
    public = list(facts.missing_public({found["id"] for found in here}))
    for found in here + public:
        _show(found, json)
    console.note(
        f"{count(len(here), 'checkpoint')} on this disk; {len(public)} public ones are not, "
        "--model fetches them by their id"
    )
    console.detail(f"looked into {facts.describe_places(source)}")


@models_app.command(
    epilog=opt.epilog(
        "vla2 models convert builtin -o .demo/copy",
        "vla2 models convert builtin -o .demo/half --dtype float16",
    )
)
def convert(
    name: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A folder or hub id: whole, -Base or LoRA; of a folder pickles too."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="New folder, for the whole model as safetensors."),
    ],
    dtype: Annotated[
        Literal["stored", "float32", "float16", "bfloat16"],
        typer.Option("--dtype", help="stored leaves each tensor as it is."),
    ] = "stored",
    revision: opt.Revision = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write a checkpoint anew: whole, by itself, as safetensors, named as the public ones are.

    A projector is joined with its language model and tower; a LoRA adapter is merged. A pickle that
    holds more than tensors is refused, and nothing in it is run.
    """
    from vla2_models.checkpoint import open_checkpoint
    from vla2_models.loading import load_model
    from vla2_models.saving import check_folder, save_checkpoint
    from vla2cli.engine import DTYPES, Engine

    console = Console(quiet=quiet, verbose=verbose)
    check_folder(output)
    source = open_source(hub_dir, offline, console)
    checkpoint = open_checkpoint(name, source, revision=revision, allow_pickles=True)
    Engine(checkpoint, device="cpu").check()
    note_reading(checkpoint, console)
    with cleaning_up(console.note):
        save_checkpoint(load_model(checkpoint, dtype=DTYPES.get(dtype)), checkpoint, output)
    # seen from here, whatever the folder's name may also mean
    written = open_checkpoint(str(output.absolute()), source)
    console.note(
        f"{output}: {format_size(written.size_bytes)} in "
        f"{count(len(written.weight_files()), 'file')}"
    )


def _show(found: dict[str, Any], json: bool) -> None:
    if json or not sys.stdout.isatty():
        print_data(found)
    else:
        from vla2cli.facts import describe_line

        print_text(describe_line(found))
