"""The command line: parse, call, print."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from vla2_models.errors import CheckpointError, one_line
from vla2cli import __version__
from vla2cli import options as opt
from vla2cli.bench.command import EXAMPLES as BENCH_EXAMPLES
from vla2cli.bench.command import bench
from vla2cli.cache import DEFAULT_CACHE_SIZE
from vla2cli.config import DEFAULT_BATCH, DEFAULT_MAX_NEW_TOKENS, is_debug
from vla2cli.console import Console, count, print_data, print_text, printable
from vla2cli.errors import UsageError, Vla2Error
from vla2cli.export import EXAMPLES as EXPORT_EXAMPLES
from vla2cli.export import export
from vla2cli.manifest import Manifest, read_manifest, read_questions
from vla2cli.models import models_app
from vla2cli.options import RunOptions
from vla2cli.plan import Conversation, Task, parse_choices
from vla2cli.run import run_batch
from vla2cli.train.command import EXAMPLES as TRAIN_EXAMPLES
from vla2cli.train.command import train
from vla2cli.world.command import world_app

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn folders of videos into true, traceable text with VideoLLaMA 2.",
)


@app.callback(invoke_without_command=True)
def vla2(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version; with --verbose, torch, CUDA and model cache too."
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="With --version.")] = False,
) -> None:
    """Turn folders of videos into true, traceable text with VideoLLaMA 2."""
    if version:
        print_text(f"vla2 {__version__}")
        if verbose:
            from vla2cli.facts import describe_machine

            for line in describe_machine():
                print_text(line)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print_text(ctx.get_help())
    elif verbose:
        raise UsageError(f"-v goes behind the command: vla2 {ctx.invoked_subcommand} -v …")


@app.command(
    epilog=opt.epilog(
        "vla2 caption examples/01.mp4",
        "vla2 caption examples/ -o .demo/captions.jsonl",
    )
)
def caption(
    paths: opt.PathsOrNone = None,
    manifest: opt.ManifestFile = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            envvar="VLA2_PROMPT",
            help="Asked of every file. Default: Please describe the video (or image, audio) in "
            "detail.",
        ),
    ] = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    load_in: opt.LoadIn = None,
    device_map: opt.DeviceMap = None,
    frontend: opt.FrontendName = "auto",
    stc: opt.Stc = "auto",
    precision: opt.RunPrecision = None,
    tensorrt: opt.TensorRT = False,
    batch: opt.Batch = DEFAULT_BATCH,
    overlap: opt.Overlap = True,
    cache: opt.Cache = None,
    cache_size: opt.CacheSize = DEFAULT_CACHE_SIZE,
    modality: opt.Modality = "auto",
    start: opt.Start = None,
    end: opt.End = None,
    every: opt.Every = None,
    audio_start: opt.AudioStart = None,
    audio_range: opt.AudioRange = "same",
    frames: opt.Frames = None,
    decoder: opt.Decoder = "pyav",
    decode_timeout: opt.DecodeTimeout = opt.DEFAULT_DECODE_TIMEOUT,
    decode_memory: opt.DecodeMemory = opt.DEFAULT_DECODE_MEMORY,
    workers: opt.Workers = None,
    max_new_tokens: opt.MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    seed: opt.Seed = 0,
    shard: opt.ShardName = None,
    output: opt.Output = None,
    force: opt.Force = False,
    retry_errors: opt.RetryErrors = False,
    dry_run: opt.DryRun = False,
    stats: opt.Stats = None,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Describe every video, image and sound that the paths hold."""
    options = RunOptions.of(locals())
    options.check()
    inputs, task = _captioned(paths or [], prompt, manifest)
    raise typer.Exit(run_batch(task, inputs, options, ledger_path=options.ledger_path))


@app.command(
    epilog=opt.epilog(
        'vla2 ask examples/01.mp4 "What moves?"',
        'vla2 ask examples/01.mp4 "What moves?" --then "Which way?"',
    )
)
def ask(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH... QUESTION",
            help="Files, folders, globs or -, and last the question, unless --question, "
            "--questions or --manifest is given.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", help="Asked of every file; may be given several times."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            "--questions",
            metavar="FILE",
            help="Text with a question in each line, asked besides; - for stdin.",
        ),
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option("--then", help="Asked after the answer, which the model remembers."),
    ] = None,
    manifest: opt.ManifestFile = None,
    choices: Annotated[
        str | None,
        typer.Option(
            "--choices",
            metavar="A|B|…",
            help="What the answer has to be one of, with | between them; the likeliest is taken.",
        ),
    ] = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    load_in: opt.LoadIn = None,
    device_map: opt.DeviceMap = None,
    frontend: opt.FrontendName = "auto",
    stc: opt.Stc = "auto",
    precision: opt.RunPrecision = None,
    tensorrt: opt.TensorRT = False,
    batch: opt.Batch = DEFAULT_BATCH,
    overlap: opt.Overlap = True,
    cache: opt.Cache = None,
    cache_size: opt.CacheSize = DEFAULT_CACHE_SIZE,
    modality: opt.Modality = "auto",
    start: opt.Start = None,
    end: opt.End = None,
    every: opt.Every = None,
    audio_start: opt.AudioStart = None,
    audio_range: opt.AudioRange = "same",
    frames: opt.Frames = None,
    decoder: opt.Decoder = "pyav",
    decode_timeout: opt.DecodeTimeout = opt.DEFAULT_DECODE_TIMEOUT,
    decode_memory: opt.DecodeMemory = opt.DEFAULT_DECODE_MEMORY,
    workers: opt.Workers = None,
    max_new_tokens: opt.MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    seed: opt.Seed = 0,
    shard: opt.ShardName = None,
    output: opt.Output = None,
    force: opt.Force = False,
    retry_errors: opt.RetryErrors = False,
    dry_run: opt.DryRun = False,
    stats: opt.Stats = None,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Ask questions about every video, image and sound that the paths hold."""
    options = RunOptions.of(locals())
    options.check()
    asked = [*(question or []), *_listed(questions, paths or [], manifest)]
    inputs, task = _asked(paths or [], asked, then or [], manifest, choices)
    raise typer.Exit(run_batch(task, inputs, options, ledger_path=options.ledger_path))


@app.command(
    epilog=opt.epilog(
        "vla2 features examples/01.mp4 -o .demo/features",
        "vla2 features examples/ --tensors projector_tokens -o .demo/tokens",
    )
)
def features(
    paths: opt.Paths,
    tensors: Annotated[
        str | None,
        typer.Option(
            "--tensors",
            envvar="VLA2_TENSORS",
            help="Names with commas between them, or all. Default: frame_indices, timestamps_s, "
            "vision_features, projector_tokens, beats_features, audio_tokens, as far as the file "
            "and the model have them. Others: pixel_values, fbank, input_ids, "
            "attention_mask_spliced, inputs_embeds, first_logits, generated_ids.",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", help="For the tensors from input_ids on."),
    ] = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    load_in: opt.LoadIn = None,
    device_map: opt.DeviceMap = None,
    frontend: opt.FrontendName = "auto",
    stc: opt.Stc = "auto",
    precision: opt.RunPrecision = None,
    tensorrt: opt.TensorRT = False,
    batch: Annotated[
        int, typer.Option("--batch", envvar="VLA2_BATCH", help="Clips that are read together.")
    ] = 1,
    modality: opt.Modality = "auto",
    start: opt.Start = None,
    end: opt.End = None,
    every: opt.Every = None,
    audio_start: opt.AudioStart = None,
    audio_range: opt.AudioRange = "same",
    frames: opt.Frames = None,
    decoder: opt.Decoder = "pyav",
    decode_timeout: opt.DecodeTimeout = opt.DEFAULT_DECODE_TIMEOUT,
    decode_memory: opt.DecodeMemory = opt.DEFAULT_DECODE_MEMORY,
    workers: opt.Workers = None,
    max_new_tokens: opt.MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    seed: opt.Seed = 0,
    shard: opt.ShardName = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            envvar="VLA2_OUTPUT",
            help="Folder for one safetensors file per input, and features.jsonl.",
        ),
    ] = None,
    force: opt.Force = False,
    retry_errors: opt.RetryErrors = False,
    dry_run: opt.DryRun = False,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write what the networks make of every file, as safetensors."""
    options = RunOptions.of(locals())
    options.check()
    from vla2cli.tensors import (
        LEDGER_NAME,
        check_tensors,
        is_missing,
        make_folder,
        parse_tensors,
        run_features,
    )

    names = parse_tensors(tensors)
    if options.ledger_path is None:
        raise UsageError("features are files; they need a folder: -o FOLDER")
    folder = Path(options.ledger_path)
    if "generated_ids" not in names:  # nothing is generated, so nothing depends on how
        options = options.without_generation()
    conversations = ((_spoken(question, "--question"),),) if question is not None else ()
    if not options.dry_run:
        make_folder(folder)
    code = run_batch(
        Task("features", conversations, {"tensors": list(names)}),
        paths,
        options,
        run=lambda job, works, stop: run_features(job, works, folder, names, should_stop=stop),
        is_missing=lambda work, job: is_missing(work, job, folder),
        check=lambda engine, sampling: check_tensors(names, engine, sampling),
        ledger_path=str(folder / LEDGER_NAME) if folder.is_dir() else None,
    )
    raise typer.Exit(code)


@app.command(
    epilog=opt.epilog(
        "vla2 plan examples/",
        'vla2 plan examples/ --question "What moves?" --calibrate 5',
    )
)
def plan(
    ctx: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...",
            help="Files, folders, globs or -, as for caption; none with --manifest.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", envvar="VLA2_PROMPT", help="As of caption.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", help="Plan ask instead of caption.")
    ] = None,
    then: Annotated[list[str] | None, typer.Option("--then", help="As of ask.")] = None,
    questions: Annotated[
        str | None, typer.Option("--questions", metavar="FILE", help="As of ask.")
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option("--manifest", metavar="FILE", help="As of ask; with --prompt, of caption."),
    ] = None,
    choices: Annotated[
        str | None, typer.Option("--choices", metavar="A|B|…", help="As of ask.")
    ] = None,
    calibrate: Annotated[
        float,
        typer.Option(
            "--calibrate",
            min=0,
            help="Seconds that the model is tried for, from its first text on; 0 only looks at "
            "the files.",
        ),
    ] = 20.0,
    model: opt.Model = None,
    revision: opt.Revision = None,
    hub_dir: opt.HubDir = None,
    offline: opt.Offline = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    load_in: opt.LoadIn = None,
    device_map: opt.DeviceMap = None,
    frontend: opt.FrontendName = "auto",
    stc: opt.Stc = "auto",
    precision: opt.RunPrecision = None,
    tensorrt: opt.TensorRT = False,
    batch: opt.Batch = DEFAULT_BATCH,
    overlap: opt.Overlap = True,
    cache: opt.Cache = None,
    cache_size: opt.CacheSize = DEFAULT_CACHE_SIZE,
    modality: opt.Modality = "auto",
    start: opt.Start = None,
    end: opt.End = None,
    every: opt.Every = None,
    audio_start: opt.AudioStart = None,
    audio_range: opt.AudioRange = "same",
    frames: opt.Frames = None,
    decoder: opt.Decoder = "pyav",
    decode_timeout: opt.DecodeTimeout = opt.DEFAULT_DECODE_TIMEOUT,
    decode_memory: opt.DecodeMemory = opt.DEFAULT_DECODE_MEMORY,
    workers: opt.Workers = None,
    max_new_tokens: opt.MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    seed: opt.Seed = 0,
    shard: opt.ShardName = None,
    output: opt.Output = None,
    force: opt.Force = False,
    retry_errors: opt.RetryErrors = False,
    stats: opt.Stats = None,
    config: opt.Config = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object, at a terminal too.")
    ] = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Say what caption or ask would find, take and cost, and the command for it; write nothing."""
    options = RunOptions.of(locals() | {"dry_run": True})
    options.check()
    from vla2cli.forecast.command import command_line, is_typed
    from vla2cli.forecast.report import as_lines, as_record
    from vla2cli.forecast.run import make_forecast

    asked = [*(question or []), *_listed(questions, paths or [], manifest)]
    if asked or (manifest is not None and not is_typed(ctx, "prompt")):
        if is_typed(ctx, "prompt"):
            raise UsageError("--prompt is of caption and --question of ask; give one")
        inputs, task = _asked(paths or [], asked, then or [], manifest, choices)
    else:
        if then or choices is not None:
            raise UsageError("--then and --choices are of ask; they need --question or --manifest")
        inputs, task = _captioned(paths or [], prompt, manifest)
    forecast = make_forecast(task, inputs, options, calibrate)
    command = command_line(ctx, task.name)
    if json or not sys.stdout.isatty():
        print_data(as_record(forecast, command))
    else:
        for line in as_lines(forecast, command):
            print_text(printable(line))
    raise typer.Exit(forecast.exit_code)


app.add_typer(models_app, name="models")
app.add_typer(world_app, name="world")
app.command(epilog=EXPORT_EXAMPLES)(export)
app.command(epilog=BENCH_EXAMPLES)(bench)
app.command(epilog=TRAIN_EXAMPLES)(train)


@app.command(
    epilog=opt.epilog("vla2 verify .demo/captions.jsonl", "vla2 verify .demo/captions.jsonl --hash")
)
def verify(
    ledger: Annotated[Path, typer.Argument(help="JSON Lines file that vla2 wrote.")],
    files: Annotated[
        bool, typer.Option("--files/--no-files", help="Whether the files are still the same.")
    ] = True,
    rehash: Annotated[
        bool, typer.Option("--hash", help="Hash every file, not only those that look changed.")
    ] = False,
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder that relative paths start from.")
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Find errors, doubtful texts and changed files in a ledger."""
    from vla2cli.verify import verify as look

    verification = look(ledger, check_files=files, rehash=rehash, root=root)
    found: Counter[str] = Counter()
    for finding in verification:
        found[finding.kind] += 1
        if json or not sys.stdout.isatty():
            print_data(dataclasses.asdict(finding))
        else:
            where = finding.id or f"line {finding.line}"
            print_text(printable(f"{finding.kind}: {where}: {finding.message}"))
    summary = verification.summary
    console = Console(quiet=quiet, verbose=verbose)
    console.note(
        f"{ledger}: {count(summary.records, 'record')}, {summary.done:,} done, "
        f"{count(summary.errors, 'error')}; {count(found.total(), 'finding')}"
    )
    for kind, number in found.most_common():
        console.detail(f"{kind}: {number:,}")
    raise typer.Exit(3 if found else 0)


@app.command(
    epilog=opt.epilog(
        "vla2 merge .demo/captions.jsonl -o .demo/last.jsonl --force",
        "vla2 merge .demo/captions.jsonl .demo/captions.jsonl -o .demo/both.jsonl --force",
    )
)
def merge(
    ledgers: Annotated[
        list[str], typer.Argument(metavar="LEDGER", help="JSON Lines files that vla2 wrote.")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", envvar="VLA2_OUTPUT", help="The new ledger."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", "-f", help="Replace an output that exists; it becomes FILE.bak-N."),
    ] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Join the ledgers of shards, or of any runs, into one.

    The same record is taken once, and an error gives way to a text, or to a later ledger's error.
    Where two texts under one key differ, nothing is written. The ledgers themselves are not
    changed.
    """
    from vla2cli.merge import merge_ledgers

    if output in (None, "", "-"):
        raise UsageError("merge writes a new ledger: give -o FILE")
    merged = merge_ledgers(ledgers, output, force=force)
    if json:
        print_data(dataclasses.asdict(merged))
    console = Console(quiet=quiet, verbose=verbose)
    for source in merged.inputs:
        console.detail(
            f"{source.path}: {count(source.records, 'record')}, {count(source.keys, 'key')}, "
            f"{source.taken:,} taken"
        )
        if source.torn_bytes:
            console.note(
                f"vla2: {source.path}: {source.torn_bytes} bytes of an unfinished record left out"
            )
        if source.bad_lines:
            console.note(
                f"vla2: {source.path}: lines that are no record: {len(source.bad_lines):,}, left "
                f"out (first: {source.bad_lines[0]}); see: vla2 verify {source.path}"
            )
    console.note(
        f"{output}: {count(merged.records, 'record')} of {count(len(ledgers), 'ledger')}, "
        f"{merged.done:,} done, {count(merged.errors, 'error')}"
    )
    raise typer.Exit(3 if merged.is_short else 0)


def _spoken(text: str, what: str) -> str:
    if not text.strip():
        raise UsageError(f"{what} is empty")
    return text


def _captioned(
    paths: list[str], prompt: str | None, manifest: str | None
) -> tuple[list[str] | Manifest, Task]:
    """Return what is captioned, and with which prompt."""
    conversations = ((_spoken(prompt, "--prompt"),),) if prompt is not None else ()
    if bool(paths) == (manifest is not None):
        raise UsageError("expected PATH..., or --manifest FILE, which has its own paths")
    inputs = paths if manifest is None else read_manifest(manifest, needs_question=False)
    return inputs, Task("caption", conversations)


def _listed(questions: str | None, paths: list[str], manifest: str | None) -> list[str]:
    """Return the questions of the file `--questions`."""
    if questions is None:
        return []
    if questions == "-" and "-" in (*paths, manifest):
        raise UsageError("'-' was given twice; there is one standard input")
    return list(read_questions(questions))


def _asked(
    arguments: list[str],
    questions: list[str],
    then: list[str],
    manifest: str | None,
    choices: str | None,
) -> tuple[list[str] | Manifest, Task]:
    """Return what is asked about, and what is asked."""
    weighed = parse_choices(choices)
    if then and weighed:
        raise UsageError("--choices are of one answer; --then goes on from the model's own words")
    inputs: list[str] | Manifest
    questions = list(dict.fromkeys(questions))
    if manifest is None:
        inputs, questions = _split_question(arguments, questions)
    elif arguments or then:
        raise UsageError("--manifest has its own paths and no --then; --question goes with it")
    else:
        inputs = read_manifest(manifest, choices=weighed, needs_question=not questions)
    return inputs, Task("ask", _conversations(questions, then), choices=weighed)


def _conversations(questions: list[str], then: list[str]) -> tuple[Conversation, ...]:
    if then and len(questions) > 1:
        raise UsageError("--then goes on from one question; several were given")
    for text in [*questions, *then]:
        _spoken(text, "the question")
    return tuple((first, *then) for first in questions)


def _split_question(arguments: list[str], questions: list[str]) -> tuple[list[str], list[str]]:
    """Tell the paths from the question that stands last, where no `--question` is given."""
    if not arguments:
        raise UsageError("nothing was given; expected PATH... QUESTION, or --manifest FILE")
    if questions:
        return arguments, questions
    *paths, question = arguments
    _spoken(question, "the question")
    if not paths:
        raise UsageError(f"only '{question}' was given; expected PATH... QUESTION")
    if os.path.exists(question):  # noqa: PTH110  a question may be longer than a name
        raise UsageError(
            f"'{question}' is the question and also a file; write the question last, or use "
            "--question"
        )
    return paths, [question]


def main(argv: list[str] | None = None) -> None:
    """Run the app; print what went wrong as one line and exit with its code."""
    # a stream that the caller closed: what is opened next must not take its place
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115  for the whole run
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    arguments = sys.argv[1:] if argv is None else argv
    shows_traceback = "--debug" in arguments or is_debug()
    # what is wrong with a checkpoint is said once, by us
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if shows_traceback else "error")
    try:
        code = app(arguments, standalone_mode=False, prog_name="vla2")
    except KeyboardInterrupt:  # while typer reads the commands; within one it makes 130 of it
        code = 130
    except typer.TyperException as error:
        code = _fail(_describe_usage(error), error.exit_code)
    except (Vla2Error, CheckpointError) as error:
        if shows_traceback:
            raise
        code = _fail(one_line(str(error)), getattr(error, "exit_code", 1))
    except BrokenPipeError:  # whoever read stdout has gone
        code = 1
    except Exception as error:  # the last resort: one line, whatever it is
        if shows_traceback:
            raise
        message = one_line(f"{type(error).__name__}: {error}")
        code = _fail(f"unexpected {message}; --debug shows where", 1)
    try:
        sys.stdout.flush()
    except OSError:
        # keep Python from trying, and complaining, once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    if message:
        print(f"vla2: {printable(message)}", file=sys.stderr)  # noqa: T201
    return code


def _describe_usage(error: typer.TyperException) -> str:
    message = one_line(error.format_message())
    # where a number is wanted, typer does not say what it got instead
    wrong: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    value = repr(wrong[0]["input"]) if wrong else ""
    return message if value in message else f"{message}, got {value}"
