"""The command `vla2 bench`: its flags, what they mean together, and where its rows go."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from vla2cli import options as opt
from vla2cli.console import Console, print_data, print_text
from vla2cli.errors import UsageError, why
from vla2cli.stop import cleaning_up

if TYPE_CHECKING:
    import torch

    from vla2cli.bench.networks import Networks
    from vla2cli.bench.rows import Row
    from vla2cli.bench.run import Bench

DEFAULT_LAYERS = 1  # of a --spec: 7 billion parameters take 29 GB in float32

EXAMPLES = (
    "\b\nExamples (the first two after make demo):\n"
    "  vla2 bench builtin --stages read,tower,connector\n"
    "  vla2 bench builtin --json > .demo/bench.jsonl\n"
    "  vla2 bench --spec VideoLLaMA2-7B --dtype float32 --dtype bfloat16 --plot bench.png\n"
    "  vla2 bench --compare before.jsonl after.jsonl"
)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint: a folder or a hub id (owner/name)."),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Option(
            "--spec",
            help="A public checkpoint's shapes with random weights, such as VideoLLaMA2-7B; "
            "nothing is fetched.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            min=1,
            help="Leave the language model so many layers.",
            show_default=f"{DEFAULT_LAYERS} with --spec, all with MODEL",
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            "--stages",
            help="With commas: read, preprocess, tower, connector, beats, prefill, generate.",
            show_default="all that the model has",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16, float16, int8 or auto; may be given several times.",
            show_default="auto",
        ),
    ] = None,
    frontend: Annotated[
        list[str] | None,
        typer.Option(
            "--frontend",
            help="What runs tower, connector and beats; may be given several times.",
            show_default="eager and torch, on CUDA triton too",
        ),
    ] = None,
    frames: opt.Frames = None,
    video: Annotated[
        Path | None,
        typer.Option(
            "--video", help="File to read.", show_default="ten seconds that are made for it"
        ),
    ] = None,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Rounds; the medians of their times count.")
    ] = 5,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="CPU threads.", show_default="as torch chooses"),
    ] = None,
    device: opt.Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="New file for the rows as JSON Lines; stdout then has the table."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="New file, .png or .html, for a picture.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="A B",
            help="Measure nothing; show the rows of two earlier runs beside each other.",
        ),
    ] = None,
    revision: opt.Revision = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Measure every stage against what the machine can do, and against plain float32.

    In each round all variants take their turn, and with them a large matrix product and a copy,
    which are the limits. ratio_to_eager_fp32 is the time of the plain float32 front-end over the
    time of this one: 2 is twice as fast. For tower, connector and beats it is always measured.
    """
    console = Console(quiet=quiet, verbose=verbose)
    as_json = json or (output is None and not sys.stdout.isatty())
    if compare is not None:
        if any((model, spec, layers, stages, dtype, frontend, frames, video, output, plot)):
            raise UsageError("--compare reads two files and measures nothing; it stands alone")
        _compare(compare, as_json, console)
        return
    asked = _Asked(model, spec, layers, stages, dtype, frontend, frames, video, repeat, threads)
    asked.check()
    for flag, path in (("--output", output), ("--plot", plot)):
        _check_new(flag, path)
    if plot is not None:
        from vla2cli.bench.plot import check_plot

        check_plot(plot)
    made = asked.make(device, revision, hub_dir, offline, console)
    _note_peak(made, console)
    with cleaning_up(console.note, "what is not shown was not measured"):
        rows = _show(made.run(console.note), output, as_json, console)
    if plot is not None:
        from vla2cli.bench.plot import write_plot

        write_plot(rows, plot, _title(made))


@dataclass(frozen=True)
class _Asked:
    """The flags that decide what is measured, as typed."""

    model: str | None
    spec: str | None
    layers: int | None
    stages: str | None
    dtypes: list[str] | None
    frontends: list[str] | None
    frames: int | None
    video: Path | None
    repeat: int
    threads: int | None

    def check(self) -> None:
        """Refuse what can be seen to be wrong before torch is loaded.

        Raises:
            UsageError: naming the flag and the value.
        """
        from vla2cli.bench.frontends import DTYPES, FRONTENDS

        if (self.model is None) == (self.spec is None):
            raise UsageError(
                "expected a MODEL, or --spec with a public checkpoint's name; --compare reads "
                "two earlier runs"
            )
        _check_names("--dtype", self.dtypes or (), ("auto", *DTYPES))
        _check_names("--frontend", self.frontends or (), tuple(FRONTENDS))
        if self.video is not None and not self.video.is_file():
            raise UsageError(f"'--video {self.video}': there is no such file")

    def make(
        self,
        device_name: str,
        revision: str | None,
        hub_dir: Path | None,
        offline: bool,
        console: Console,
    ) -> Bench:
        """Find the model and settle what is measured of it.

        Raises:
            UsageError, CheckpointError: something of it cannot be had.
        """
        from vla2cli.bench.frontends import (
            FRONTENDS,
            default_frontends,
            pick_variants,
            weights_dtype,
        )
        from vla2cli.bench.run import Bench
        from vla2cli.engine import pick_device

        device = pick_device(device_name)
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        dtypes = self._dtypes(device)
        for name in self.frontends or ():
            if FRONTENDS[name].needs_cuda and device.type != "cuda":
                raise UsageError(f"'--frontend {name}' needs CUDA, and this run is on the {device}")
        if "float16" in dtypes and device.type == "cpu":
            # seen: half a GFLOP/s where float32 has 100
            console.note("float16 on a CPU may be a hundred times slower than float32")
        variants = pick_variants(self.frontends or default_frontends(dtypes, device), dtypes)
        networks, num_layers = self._networks(device, revision, hub_dir, offline, console)
        num_frames, stages = self._num_frames(networks), self._stages(networks)
        cut = networks.config.language.num_hidden_layers
        if cut < num_layers:
            console.note(
                f"the language model is cut to {cut} of {num_layers} layers: prefill and generate "
                "are of these alone (--layers)"
            )
        return Bench(
            model=self.spec or self.model or "",
            networks=networks,
            num_layers=num_layers,
            stages=stages,
            variants=tuple(variants),
            # behind a front-end in int8 the language model runs in float32
            dtypes=tuple(dict.fromkeys(map(weights_dtype, dtypes))),
            num_frames=num_frames,
            num_rounds=self.repeat,
            video=None if self.video is None else str(self.video),
        )

    def _dtypes(self, device: torch.device) -> list[str]:
        from vla2cli.engine import pick_dtype

        names = self.dtypes or ["auto"]
        auto = str(pick_dtype("auto", device)).removeprefix("torch.")
        return list(dict.fromkeys(auto if name == "auto" else name for name in names))

    def _networks(
        self,
        device: torch.device,
        revision: str | None,
        hub_dir: Path | None,
        offline: bool,
        console: Console,
    ) -> tuple[Networks, int]:
        """Return the networks, and how many layers the whole language model has."""
        from vla2cli.bench.networks import Networks, cut_layers, spec_config

        if self.spec is not None:
            config = spec_config(self.spec)
            layers = self.layers or DEFAULT_LAYERS
            return Networks(cut_layers(config, layers), device), config.language.num_hidden_layers
        assert self.model is not None, "checked before"
        from vla2_models.checkpoint import open_checkpoint
        from vla2_models.loading import load_model
        from vla2cli.engine import Engine
        from vla2cli.run import note_reading, open_source

        source = open_source(hub_dir, offline, console)
        checkpoint = open_checkpoint(self.model, source, revision=revision)
        Engine(checkpoint, device="cpu").check()
        config = cut_layers(checkpoint.config, self.layers)
        note_reading(checkpoint, console)
        stored = load_model(checkpoint, dtype=None).state_dict()
        return Networks(config, device, stored), checkpoint.config.language.num_hidden_layers

    def _num_frames(self, networks: Networks) -> int:
        from vla2cli.plan import Sampling

        config = networks.config
        num_frames = config.num_frames if self.frames is None else self.frames
        Sampling(num_frames)  # refuses what no model takes
        if num_frames < config.connector.min_frames:
            raise UsageError(
                f"'--frames {num_frames}': the model's {config.projector_type} needs at least "
                f"{config.connector.min_frames}"
            )
        return num_frames

    def _stages(self, networks: Networks) -> tuple[str, ...]:
        from vla2_models.public import WITH_EARS
        from vla2cli.bench.stages import STAGES

        has_ears = networks.config.audio is not None
        if self.stages is None:
            return tuple(stage for stage in STAGES if has_ears or stage != "beats")
        wanted = [name.strip() for name in self.stages.split(",")]
        _check_names("--stages", wanted, STAGES)
        if "beats" in wanted and not has_ears:
            raise UsageError(f"'--stages beats' needs a model with ears (try {WITH_EARS})")
        return tuple(stage for stage in STAGES if stage in wanted)


def _check_names(flag: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"'{flag} {name}': expected {', '.join(known)}")


def _check_new(flag: str, path: Path | None) -> None:
    # a bench takes minutes, and an old file may be the one to compare with
    if path is not None and path.exists():
        raise UsageError(f"'{flag} {path}' exists already; give a new name")
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"'{flag} {path}': there is no such folder")


def _note_peak(made: Bench, console: Console) -> None:
    from vla2cli.memory import can_tell_peak

    if not can_tell_peak(made.networks.device):
        console.note("peak_mb is null: this system does not let a process reset its peak memory")


def _show(rows: Iterable[Row], output: Path | None, as_json: bool, console: Console) -> list[Row]:
    """Put the rows out as they come; the table when all are there, or nothing more comes."""
    from vla2cli.bench.report import LEGEND, table_lines

    shown: list[Row] = []
    with ExitStack() as stack:
        file = stack.enter_context(_open_new(output)) if output is not None else None
        try:
            for row in rows:
                shown.append(row)
                if file is not None:
                    _write_line(file, row)
                if as_json:
                    print_data(row.to_dict())
        finally:
            if shown and not as_json:
                for line in table_lines(shown):
                    print_text(line)
                for line in LEGEND:
                    console.note(line)
    return shown


@contextmanager
def _open_new(path: Path) -> Iterator[IO[str]]:
    try:
        file = path.open("x", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"'--output {path}': {why(error)}") from error
    with file:
        try:
            yield file
        finally:
            if not file.tell():  # the same command is to run again
                path.unlink(missing_ok=True)


def _write_line(file: IO[str], row: Row) -> None:
    import json

    file.write(json.dumps(row.to_dict(), ensure_ascii=False) + "\n")
    file.flush()


def _title(made: Bench) -> str:
    facts: dict[str, Any] = made.facts()
    layers = f"{facts['layers']} of {facts['layers_whole']} layers"
    return (
        f"{made.model}, {made.num_frames} frames, {layers}; {facts['device']}, {facts['cpu']}, "
        f"{facts['threads']} threads"
    )


def _compare(paths: tuple[Path, Path], as_json: bool, console: Console) -> None:
    from vla2cli.bench.compare import compare, differences, table_lines
    from vla2cli.bench.rows import read_rows

    a, b = (read_rows(path) for path in paths)
    pairs = compare(a, b)
    if as_json:
        for pair in pairs:
            print_data(pair)
    else:
        for line in table_lines(pairs):
            print_text(line)
        console.note(f"A is '{paths[0]}', B is '{paths[1]}'; A / B 2 means that B is twice as fast")
    for line in differences(a, b, paths):
        console.note(f"vla2: {line}")
