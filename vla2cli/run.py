"""A batch command from its flags to its exit code: `caption`, `ask` and `features` alike."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import compress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vla2cli.config import GenerationChoice
from vla2cli.console import (
    Console,
    count,
    describe_failure,
    format_duration,
    format_rate,
    format_size,
    print_data,
    print_text,
)
from vla2cli.errors import InputError, NoInputError, UsageError
from vla2cli.inputs import Found, Item, Note, find_items
from vla2cli.ledger import Ledger, read_index
from vla2cli.options import parse_time

if TYPE_CHECKING:
    from vla2cli.engine import Engine
    from vla2cli.jobs import Job, Plan, Record, Sampling, Task, Totals, Work

MAX_FRAMES = 32  # upstream cuts a longer list without a word
LONG_BYTES = 1e9  # reading more takes seconds: say so
NOUNS = {"caption": "caption", "ask": "answer", "features": "feature file"}
PUBLIC_MODELS = ("DAMO-NLP-SG/VideoLLaMA2-7B", "DAMO-NLP-SG/VideoLLaMA2-7B-16F")
AV_MODEL = "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV"


@dataclass(frozen=True)
class RunOptions:
    """The flags that all batch commands share, as typed; see `vla2cli.options`."""

    model: str | None
    revision: str | None
    hub_dir: Path | None
    offline: bool
    device: str
    dtype: str
    batch: int
    modality: str
    start: str | None
    end: str | None
    frames: int | None
    decoder: str
    decode_timeout: float
    decode_memory: float
    workers: int | None
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int
    output: str | None
    force: bool
    retry_errors: bool
    dry_run: bool
    json: bool
    quiet: bool
    verbose: bool
    debug: bool

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> RunOptions:
        """Take the shared flags out of a command's arguments."""
        return cls(**{field.name: flags[field.name] for field in fields(cls)})

    def check(self) -> None:
        """Refuse values that mean nothing, before anything is opened.

        Raises:
            UsageError: naming the flag and the value.
        """
        if self.frames is not None and self.frames < 1:
            raise UsageError(f"'--frames {self.frames}': at least 1 frame is needed")
        if self.frames is not None and self.frames > MAX_FRAMES:
            raise UsageError(f"'--frames {self.frames}': the model takes at most {MAX_FRAMES}")
        for flag, value in (("batch", self.batch), ("workers", self.workers)):
            if value is not None and value < 1:
                raise UsageError(f"'--{flag} {value}': at least 1 is needed")
        limits = {"decode-timeout": self.decode_timeout, "decode-memory": self.decode_memory}
        for flag, limit in limits.items():
            if not 0 < limit < float("inf"):
                raise UsageError(f"'--{flag} {limit}': expected a number above 0")
        start_s, end_s = parse_time(self.start), parse_time(self.end)
        if end_s is not None and end_s <= (start_s or 0.0):
            raise UsageError(f"'--end {self.end}': the range ends before it begins")
        if self.output in (None, "-") and (self.force or self.retry_errors):
            raise UsageError("--force and --retry-errors are about a ledger; they need -o FILE")
        _ = self.generation

    @property
    def generation(self) -> GenerationChoice:
        """How the model goes on."""
        return GenerationChoice(
            self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed
        )

    def sampling(self, engine: Engine) -> Sampling:
        """Which pictures are looked at."""
        from vla2cli.jobs import Sampling

        num_frames = self.frames or engine.checkpoint.config.num_frames
        return Sampling(num_frames, parse_time(self.start), parse_time(self.end), self.decoder)

    @property
    def ledger_path(self) -> str | None:
        """The ledger's path; None where records go to stdout."""
        return None if self.output in (None, "-") else self.output


RunRecords = Callable[["Job", Sequence["Work"], Callable[[], bool]], Iterator["Record"]]


class Stop:
    """SIGINT and SIGTERM during a run: the first ends it after the batch in hand."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.signum: int | None = None
        self.is_running = False  # until then there is nothing in hand

    def __enter__(self) -> Stop:
        """Take over the signals."""
        self.before = {s: signal.signal(s, self._take) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __call__(self) -> bool:
        """Tell whether to stop."""
        return self.signum is not None

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        if self.is_running and self.signum is None:
            self.signum = signum
            if not self.console.quiet:
                _say("stopping after the record in hand …")
            return
        if not self.is_running:
            _say(f"vla2: ended by {signal.Signals(signum).name}; nothing was run")
        # the ledger is whole at any moment and the decoding processes die with this one; an
        # exception would be lost where a library that is just being imported catches them all
        os._exit(128 + signum)


def _say(message: str) -> None:
    # the interrupted code may be in the middle of printing
    os.write(2, f"{message}\n".encode())


def run_batch(
    task: Task,
    paths: Sequence[str],
    options: RunOptions,
    *,
    run: RunRecords | None = None,
    is_missing: Callable[[Work], bool] = lambda _: False,
    ledger_path: str | None = None,
) -> int:
    """Do a task over what the paths hold.

    Args:
        task: what is asked.
        paths: arguments of the command.
        options: its flags, checked.
        run: makes the records; by default `Job.run`.
        is_missing: whether a work that the ledger calls done has to be done again.
        ledger_path: overrides the one of `--output`.

    Returns:
        The exit code.
    """
    from vla2cli.jobs import Job
    from vla2cli.media.pool import DecodePool, default_num_workers

    console = Console(quiet=options.quiet, verbose=options.verbose)
    ledger_path = ledger_path or options.ledger_path
    with ExitStack() as stack:
        stop = stack.enter_context(Stop(console))
        found = find_items(paths, modality=options.modality)
        engine = open_engine(options, console)
        items = usable_items(found, options, console)
        check_questions(task, items)
        ledger = None
        if ledger_path is not None and not options.dry_run:
            ledger = stack.enter_context(Ledger.open(ledger_path, force=options.force))
            _note_repairs(ledger, ledger_path, console)
        pool = stack.enter_context(
            DecodePool(
                options.workers or default_num_workers(),
                timeout_s=options.decode_timeout,
                memory_bytes=int(options.decode_memory * 2**30),
            )
        )
        settings = engine.settings(options.generation)
        job = Job(
            engine, task, options.sampling(engine), settings, pool, ledger, batch=options.batch
        )
        _note_hashing(engine, console)
        lookup = read_index(ledger_path).get if ledger_path and options.dry_run else None
        plan = job.plan(items, lookup=lookup, retry_errors=options.retry_errors)
        plan = _without_missing(plan, is_missing)
        if options.dry_run:
            return _preview(job, plan, console)
        _note_plan(plan, ledger_path, console)
        load_weights(engine, console)
        show = _shower(options, ledger_path, items, plan)
        return _follow(job, plan, run or _run_job, show, stop, console, ledger_path)


def open_engine(options: RunOptions, console: Console) -> Engine:
    """Find the model; its weights are not read yet.

    Raises:
        UsageError: none was named, or it has no ears for the modality asked for.
    """
    if options.model is None:
        raise UsageError(
            f"no model: give --model FOLDER, or a hub id like --model {PUBLIC_MODELS[0]}"
        )
    console.note(f"loading '{options.model}' …")
    from vla2_models.checkpoint import check_weights, open_checkpoint
    from vla2_models.hub import Source
    from vla2cli.engine import Engine

    if console.quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    source = Source(options.hub_dir, options.offline)
    checkpoint = open_checkpoint(options.model, source, revision=options.revision)
    if options.modality in ("audio", "av"):
        raise UsageError(
            f"--modality {options.modality} needs a model with an audio branch; "
            f"{options.model} has none (try {AV_MODEL})"
        )
    # by the headers, in a moment: a wrong folder is refused before the output is touched
    check_weights(checkpoint)
    if checkpoint.config.is_demo:
        console.note(
            f"vla2: '{options.model}' is a demonstration model with random weights: its words "
            "mean nothing."
        )
        console.note(f"For real videos: --model {PUBLIC_MODELS[1]}")
    return Engine(checkpoint, device=options.device, dtype=options.dtype)


def usable_items(found: Found, options: RunOptions, console: Console) -> list[Item]:
    """Leave out what the model cannot take, and say so.

    Raises:
        NoInputError: nothing is left.
    """
    for note in found.notes:
        for folder in note.unreadable:
            console.note(f"vla2: {folder}; skipped")
        if note.looked_at != 1:
            console.note(f"{note.root}: {_describe_note(note, options.modality)}")
    items = [item for item in found.items if item.kind != "audio"]
    if not items:
        raise NoInputError(
            "only audio files were found, and this model has no audio branch; "
            f"--modality audio needs {AV_MODEL}"
        )
    return items


def _describe_note(note: Note, modality: str) -> str:
    parts = [
        count(number, noun)
        for number, noun in ((note.videos, "video"), (note.images, "image"))
        if number
    ]
    if modality == "auto" and note.audio:
        parts.append(
            f"{count(note.audio, 'audio file')} skipped (this model has no audio branch; "
            f"--modality audio needs {AV_MODEL})"
        )
    elif note.skipped:
        parts.append(f"{note.skipped:,} skipped (--modality {modality})")
    return ", ".join(parts) or f"no video or image (looked at {count(note.looked_at, 'file')})"


def check_questions(task: Task, items: Sequence[Item]) -> None:
    """Refuse questions that hold a placeholder, before the first clip is decoded.

    Raises:
        UsageError: naming the question.
    """
    from vla2cli.jobs import modality_of
    from vla2cli.prompt import check_question

    for modality in {modality_of(item) for item in items}:
        for question in (question for turns in task.conversations for question in turns):
            check_question(question, modality)


def _note_hashing(engine: Engine, console: Console) -> None:
    from vla2_models.fingerprint import is_remembered

    size_bytes = engine.checkpoint.size_bytes
    if size_bytes > LONG_BYTES and not is_remembered(engine.checkpoint.weight_files()):
        console.note(f"hashing {format_size(size_bytes)} of weights, once …")


def load_weights(engine: Engine, console: Console) -> None:
    """Read the weights, saying how much there is to read when that takes a while."""
    size_bytes = engine.checkpoint.size_bytes
    if size_bytes > LONG_BYTES:
        console.note(f"reading {format_size(size_bytes)} of weights …")
    started = time.perf_counter()
    engine.load_weights()
    console.detail(
        f"{format_size(size_bytes)} read in {format_duration(time.perf_counter() - started)}; "
        f"{engine.dtype_name} on {engine.device}"
    )


def _note_repairs(ledger: Ledger, path: str, console: Console) -> None:
    if ledger.torn_bytes:
        console.note(
            f"vla2: {path}: {ledger.torn_bytes} bytes of an unfinished record moved to {path}.torn"
        )
    if ledger.bad_lines:
        console.note(
            f"vla2: {path}: {count(len(ledger.bad_lines), 'line')} no record, left as found "
            f"(first: {ledger.bad_lines[0]}); see: vla2 verify {path}"
        )


def _without_missing(plan: Plan, is_missing: Callable[[Work], bool]) -> Plan:
    missing = [is_missing(work) for work in plan.done]
    return replace(
        plan,
        todo=(*plan.todo, *compress(plan.done, missing)),
        done=tuple(work for work, is_gone in zip(plan.done, missing) if not is_gone),
    )


def _note_plan(plan: Plan, path: str | None, console: Console) -> None:
    todo, done, failed = (plan.count(part) for part in (plan.todo, plan.done, plan.failed))
    if todo and done + failed:
        console.note(
            f"{path}: {done + failed:,} of {todo + done + failed:,} done before; {todo:,} to do"
        )
    if not todo:
        hint = f", {count(failed, 'error')} (retry with --retry-errors)" if failed else ""
        console.note(f"nothing to do: {done:,} done{hint}")


def _preview(job: Job, plan: Plan, console: Console) -> int:
    """Say what would be done with each file, in the order of their ids' sections."""
    from vla2cli.jobs import outcome

    num_unreadable = 0
    probes = [(work, job.pool.submit_probe(work.item.path, work.item.kind)) for work in plan.todo]
    for work, probe in probes:
        found = outcome(probe)
        line: dict[str, Any] = {"id": work.item.id, "action": job.task.name}
        if isinstance(found, InputError):
            num_unreadable += 1
            line |= {"action": "unreadable", "why": str(found)}
        else:
            is_video = found.kind == "video"
            line |= {"frames": job.sampling.num_frames if is_video else 1}
            line |= {"duration_s": round(found.duration_s, 3)} if is_video else {}
        print_data(line)
    for works, why in ((plan.done, "done"), (plan.failed, "error")):
        for work in works:
            print_data({"id": work.item.id, "action": "skip", "why": why})
    done = plan.count(plan.done) + plan.count(plan.failed)
    console.note(
        f"{plan.count(plan.todo) - num_unreadable:,} to do, {done:,} done, "
        f"{num_unreadable:,} unreadable; nothing was run"
    )
    return 0


def _run_job(job: Job, works: Sequence[Work], should_stop: Callable[[], bool]) -> Iterator[Record]:
    return job.run(works, should_stop=should_stop)


def _shower(
    options: RunOptions, ledger_path: str | None, items: Sequence[Item], plan: Plan
) -> Callable[[Record], None]:
    """Choose what goes to stdout: nothing beside a ledger, plain text or JSON Lines."""
    if ledger_path is not None:
        return lambda record: None
    is_plain = len(items) == 1 and sys.stdout.isatty() and not options.json and not options.output
    if not is_plain:
        return print_data
    return lambda record: print_text(record["text"]) if record.get("text") is not None else None


def _follow(
    job: Job,
    plan: Plan,
    run: RunRecords,
    show: Callable[[Record], None],
    stop: Stop,
    console: Console,
    ledger_path: str | None,
) -> int:
    """Run the plan, show what comes, sum up."""
    from vla2cli.jobs import Totals

    totals = Totals()
    num_todo = plan.count(plan.todo)
    started = time.monotonic()
    stop.is_running = True
    with console.watch(job, num_todo, is_shown=ledger_path is None) as watch:
        for record in run(job, plan.todo, stop):
            totals.add(record)
            show(record)
            if record.get("error") is not None:
                console.note(
                    f"{describe_failure(record)}{' (recorded, going on)' * (num_todo > 1)}"
                )
            watch.advance(totals.done + totals.errors)
    num_seen = totals.done + totals.errors
    if stop() and num_seen < num_todo:
        whole = f", {ledger_path} is whole; run the same command to go on" if ledger_path else ""
        console.note(f"{num_seen:,} of {num_todo:,} done{whole}.")
        assert stop.signum is not None
        return 128 + stop.signum
    if num_todo and (num_todo > 1 or ledger_path):
        console.note(_summary(job, totals, time.monotonic() - started, ledger_path))
    return _exit_code(plan, totals)


def _summary(job: Job, totals: Totals, elapsed_s: float, ledger_path: str | None) -> str:
    num_seen = totals.done + totals.errors
    parts = [count(totals.done, NOUNS[job.task.name]), count(totals.errors, "error")]
    if totals.flagged:
        flags = ", ".join(f"{number:,} {flag}" for flag, number in totals.flagged.most_common())
        parts.append(f"flagged: {flags}")
    parts += [format_duration(elapsed_s), format_rate(num_seen / max(elapsed_s, 1e-9))]
    hint = f"  See them: vla2 verify {ledger_path}" if totals.errors and ledger_path else ""
    return f"{count(num_seen, 'item')}: {', '.join(parts)}.{hint}"


def _exit_code(plan: Plan, totals: Totals) -> int:
    """0: every item done; 3: some have errors, from now or before; 4: all have."""
    errors = totals.errors + plan.count(plan.failed)
    if not errors:
        return 0
    return 3 if totals.done + plan.count(plan.done) else 4
