"""The command `vla2 train`: its flags, and what comes out."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import Annotated

import typer

from vla2cli import options as opt
from vla2cli.console import Console, count, print_text
from vla2cli.run import open_source

EXAMPLES = (
    "\b\nExamples:\n"
    "  vla2 train pretrain.yaml\n"
    "  vla2 train pretrain.yaml --set max_steps=100 --set batch=8 --dry-run\n"
    "  torchrun --nproc-per-node 8 -m vla2cli train joint.yaml"
)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Goes before the file; repeatable."),
    ] = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", "-n", help="Say what would be trained, as JSON, and end."),
    ] = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Train a model in one of the paper's stages, and save it in a public form.

    The same command goes on with a run that was ended, and says so of one that is done.
    """
    from vla2cli.train.config import read_config

    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that a launcher started
    console = Console(quiet=quiet or not is_first, verbose=verbose and is_first)
    wanted = read_config(config, settings or ())
    console.note(f"looking at '{wanted.model}' …")
    from vla2cli.stop import Stop
    from vla2cli.train.log import SKIPPED, read_totals
    from vla2cli.train.run import describe, is_done
    from vla2cli.train.run import train as run

    source = open_source(hub_dir, offline, console)
    if dry_run:
        print_text(json_module.dumps(describe(wanted, source), ensure_ascii=False, indent=2))
        return
    if is_done(wanted):
        console.note(f"{wanted.output} is done already")
        return
    with Stop(console, unit="step") as stop:
        stop.is_running = True
        trained = run(wanted, source, console, should_stop=stop)
    if not trained.is_first:
        return
    if not trained.is_finished:
        console.note(f"stopped behind step {trained.step:,}; the same command goes on from there")
        raise typer.Exit(128 + (stop.signum or 0))
    output = Path(wanted.output)
    if skipped := read_totals(output).skipped:
        console.note(f"{count(skipped, 'sample')} skipped; '{output / SKIPPED}' names them")
    console.note(f"{count(trained.step, 'step')} done; try: vla2 ask … --model {output}")
