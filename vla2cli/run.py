"""A batch command from its options to its exit code: `caption`, `ask` and `features` alike."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any

from vla2cli.cache import TokenCache, parse_size
from vla2cli.console import (
    Console,
    count,
    format_duration,
    format_rate,
    format_size,
    print_data,
)
from vla2cli.errors import InputError, NoInputError, UsageError
from vla2cli.inputs import Found, Item, Note, find_items
from vla2cli.jobs import Job, Totals
from vla2cli.ledger import Ledger, Record, check_output, read_index
from vla2cli.manifest import Manifest
from vla2cli.media.pool import DecodePool, Probe, default_num_workers
from vla2cli.options import RunOptions
from vla2cli.plan import NO_EARS, Plan, Sampling, Task, Work, count_records, outcome, usable_items
from vla2cli.progress import Watch
from vla2cli.segments import cut_items
from vla2cli.shards import Shard
from vla2cli.show import Failures, Plain
from vla2cli.stats import Stats, write_stats
from vla2cli.stop import Stop

if TYPE_CHECKING:
    from pathlib import Path

    from vla2_models.checkpoint import Checkpoint
    from vla2_models.hub import Source
    from vla2cli.engine import Engine

LONG_BYTES = 1e9  # reading more takes seconds: say so
NOUNS = {"caption": "caption", "ask": "answer", "features": "feature file"}
PUBLIC_MODEL = "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F"  # for who has none

RunRecords = Callable[[Job, Sequence[Work], Callable[[], bool]], Iterator[Record]]


def run_batch(
    task: Task,
    paths: Sequence[str] | Manifest,
    options: RunOptions,
    *,
    run: RunRecords = lambda job, works, should_stop: job.run(works, should_stop=should_stop),
    is_missing: Callable[[Work, Job], bool] = lambda work, job: False,
    check: Callable[[Engine, Sampling], None] = lambda engine, sampling: None,
    ledger_path: str | None = None,
) -> int:
    """Do a task over what the paths hold.

    Args:
        task: what is asked.
        paths: arguments of the command, or the manifest that `task` is of.
        options: its flags, checked.
        run: makes the records; by default `Job.run`.
        is_missing: whether a work that the ledger calls done has to be done again.
        check: refuses what the task cannot ask of the model.
        ledger_path: where records go; None for stdout.

    Returns:
        The exit code.
    """
    console = Console(quiet=options.quiet, verbose=options.verbose)
    with ExitStack() as stack:
        stop = stack.enter_context(Stop(console))
        # a model without ears is the first thing wrong with a search for sound
        engine = open_engine(options, console) if options.modality in ("audio", "av") else None
        if isinstance(paths, Manifest):
            found = paths.found(options.modality)
        else:
            found = find_items(paths, modality=options.modality)
        if ledger_path is not None:
            check_output(ledger_path)
            _refuse_input(ledger_path, paths, found)
        engine = engine or open_engine(options, console)
        sampling = options.sampling(engine.checkpoint.config.num_frames)
        check(engine, sampling)
        _note_found(found, options.modality, engine.has_ears, console)
        num_workers = options.workers or default_num_workers()
        stats = Stats(num_workers)
        if options.stats is not None and not options.dry_run:
            # last of all: only then the processes that decode have ended, and their time is known
            stack.callback(lambda path: write_stats(path, stats.summary()), options.stats)
        pool = stack.enter_context(
            DecodePool(
                num_workers,
                timeout_s=options.decode_timeout,
                memory_bytes=int(options.decode_memory * 2**30),
            )
        )
        items = usable_items(found.items, pool, options.modality, has_ears=engine.has_ears)
        if options.part is not None:
            items = _select(options.part, items, console)
        ledger = None
        if ledger_path is not None and not options.dry_run:
            ledger = stack.enter_context(Ledger.open(ledger_path, force=options.force))
            _note_repairs(ledger, ledger_path, console)
        if sampling.every_s is not None:
            console.note(f"measuring {count(len({item.id for item in items}), 'file')} …")
        items, unreadable = cut_items(items, sampling, pool)
        settings = engine.settings(options.generation)
        job = Job(
            engine,
            task,
            sampling,
            settings,
            pool,
            ledger,
            batch=options.batch,
            overlap=options.overlap,
            cache=_open_cache(options, console),
            stats=stats,
            say=console.note,
        )
        job.unreadable = unreadable
        note_hashing(engine, console)
        lookup = None
        if options.dry_run and ledger_path and not options.force:
            lookup = read_index(ledger_path).get
        plan = job.plan(items, lookup=lookup, retry_errors=options.retry_errors)
        plan = _without_missing(plan, lambda work: is_missing(work, job))
        if options.dry_run:
            return _preview(job, plan, console)
        _note_plan(plan, ledger_path, console)
        if plan.todo:
            load_weights(engine, console)
        show = _choose_show(options, ledger_path, plan, len(items))
        return _follow(job, plan, run, show, stop, console, ledger_path)


def _select(part: Shard, items: Sequence[Item], console: Console) -> list[Item]:
    """Keep the items of one part, which may be none, and say how many they are."""
    selected = part.select(items)
    console.note(f"shard {part}: {len(selected):,} of {count(len(items), 'item')}")
    return selected


def open_engine(options: RunOptions, console: Console) -> Engine:
    """Find the model and check all its files; its weights are not read yet.

    Raises:
        UsageError: none was named and none is built in, or it has no ears for the modality asked
            for.
    """
    model = options.model
    if model is None:
        model = _default_model(console)
    else:
        console.note(f"loading '{model}' …")
    from vla2_models.checkpoint import open_checkpoint
    from vla2cli.engine import Engine
    from vla2cli.frontend.choice import FrontendChoice
    from vla2cli.layout import Layout

    source = open_source(options.hub_dir, options.offline, console)
    checkpoint = open_checkpoint(model, source, revision=options.revision)
    layout = Layout(options.load_in, options.device_map)
    frontend = FrontendChoice(options.frontend, options.stc, options.precision, options.tensorrt)
    engine = Engine(
        checkpoint,
        device=options.device,
        dtype=options.dtype,
        layout=layout,
        frontend=frontend,
        say=console.note,
    )
    # in a moment, from headers: a wrong folder is refused before the output is touched
    engine.check()
    engine.check_sampling(options.sampling(checkpoint.config.num_frames))
    if options.dtype == "bfloat16" and engine.device.type == "cpu":
        _note_bfloat16(engine, console)
    if checkpoint.config.is_demo and options.model is not None:
        console.note(
            f"vla2: '{model}' is a demonstration model: what it says of real videos means nothing."
        )
        _note_public_model(console)
    return engine


def _refuse_input(ledger_path: str, paths: Sequence[str] | Manifest, found: Found) -> None:
    """Refuse to write, or with --force to rename, what is to be read."""
    names = [item.path for item in found.items]
    if isinstance(paths, Manifest):
        names.append(paths.name)
    real = os.path.realpath(ledger_path)
    # of a million files few are called like the output
    alike = (name for name in names if os.path.basename(name) == os.path.basename(ledger_path))  # noqa: PTH119
    if any(os.path.realpath(name) == real for name in alike):
        raise UsageError(f"'{ledger_path}' is an input; choose another -o")


def _open_cache(options: RunOptions, console: Console) -> TokenCache | None:
    if options.cache is None or options.dry_run:
        return None
    return TokenCache.open(options.cache, parse_size(options.cache_size), console.note)


def _default_model(console: Console) -> str:
    """Name the built-in model, and say that it was taken."""
    from vla2_models.hub import BUILTIN, has_builtin

    if not has_builtin():
        raise UsageError(f"no model: give --model FOLDER, or a hub id like --model {PUBLIC_MODEL}")
    console.note(
        "vla2: no --model given: using the built-in demonstration model; it knows only its own "
        "drawn world."
    )
    _note_public_model(console)
    return BUILTIN


def _note_public_model(console: Console) -> None:
    console.note(f"For real videos: vla2 caption … --model {PUBLIC_MODEL}")


def _note_bfloat16(engine: Engine, console: Console) -> None:
    from vla2_models.packed import can_pack

    if not can_pack(engine.device, engine.dtype):
        console.note("this processor has no bfloat16 products: float32 is likely to be faster")


def _note_found(found: Found, modality: str, has_ears: bool, console: Console) -> None:
    """Say what the paths hold, and what of it the model cannot take."""
    for note in found.notes:
        for folder in note.unreadable:
            console.note(f"vla2: {folder}; skipped")
        if note.looked_at != 1:
            console.note(f"{note.root}: {_describe_note(note, modality, has_ears)}")


def _describe_note(note: Note, modality: str, has_ears: bool) -> str:
    nouns = ((note.videos, "video"), (note.images, "image"), (note.audio, "audio file"))
    parts = [count(number, noun) for number, noun in nouns if number]
    if note.audio and not has_ears and modality == "auto":
        parts[-1] += f" skipped ({NO_EARS})"
    elif note.skipped:
        parts.append(f"{note.skipped:,} skipped (--modality {modality})")
    return ", ".join(parts) or f"no video, image or sound (looked at {note.looked_at:,} files)"


def note_hashing(engine: Engine, console: Console) -> None:
    """Say that weights are hashed when that takes a while."""
    from vla2_models.fingerprint import is_remembered

    size_bytes = engine.checkpoint.size_bytes
    if size_bytes > LONG_BYTES and not is_remembered(engine.checkpoint.weight_files()):
        console.note(f"hashing {format_size(size_bytes)} of weights, once …")


def open_source(hub_dir: Path | None, offline: bool, console: Console) -> Source:
    """Say where models are looked for, and what is fetched when that happens."""
    from vla2_models.hub import Source

    if console.quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    return Source(
        hub_dir,
        offline,
        on_fetch=lambda name: console.note(f"fetching '{name}' from the hub …"),
    )


def note_reading(checkpoint: Checkpoint, console: Console) -> None:
    """Say how much there is to read when that takes a while."""
    if checkpoint.size_bytes > LONG_BYTES:
        console.note(f"reading {format_size(checkpoint.size_bytes)} of weights …")


def load_weights(engine: Engine, console: Console) -> None:
    """Read the weights, saying how much there is to read when that takes a while."""
    size_bytes = engine.checkpoint.size_bytes
    note_reading(engine.checkpoint, console)
    started = time.perf_counter()
    engine.load_weights()
    console.detail(
        f"{format_size(size_bytes)} read in {format_duration(time.perf_counter() - started)}; "
        f"{engine.backends['dtype']} on {engine.device}"
    )


def _note_repairs(ledger: Ledger, path: str, console: Console) -> None:
    if ledger.torn_bytes:
        console.note(
            f"vla2: {path}: {ledger.torn_bytes} bytes of an unfinished record moved to {path}.torn"
        )
    if ledger.bad_lines:
        console.note(
            f"vla2: {path}: lines that are no record: {len(ledger.bad_lines):,}, left as found "
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
    todo, done, failed = map(count_records, (plan.todo, plan.done, plan.failed))
    if todo and done + failed:
        console.note(
            f"{path}: {done + failed:,} of {todo + done + failed:,} done before; {todo:,} to do"
        )
    if not todo:
        hint = f", {count(failed, 'error')} (retry with --retry-errors)" if failed else ""
        console.note(f"nothing to do: {done:,} done{hint}")


def _preview(job: Job, plan: Plan, console: Console) -> int:
    """Say what would be done: first the items to do, then those to skip; as JSON Lines.

    Returns:
        The exit code: as of `vla2 plan`, 4 where no file can be used.
    """
    files = dict.fromkeys((work.item.path, work.item.kind) for work in plan.todo)
    probes = {file: job.pool.submit_probe(*file) for file in files}
    num_unreadable = 0
    for work in plan.todo:
        looked = outcome(probes[work.item.path, work.item.kind])
        found = job.unreadable.get(work.item.path, looked)
        line = _preview_line(job, work.item, job.task.name)
        if isinstance(found, InputError):
            num_unreadable += work.num_records
            line |= {"action": "unreadable", "why": str(found)}
        else:
            line |= _preview_fields(job, work.item, found)
        print_data(line)
    for works, why in ((plan.done, "done"), (plan.failed, "error")):
        for work in works:
            print_data({**_preview_line(job, work.item, "skip"), "why": why})
    num_todo = count_records(plan.todo) - num_unreadable
    num_done, num_failed = count_records(plan.done), count_records(plan.failed)
    console.note(
        f"{num_todo:,} to do, {num_done + num_failed:,} done, {num_unreadable:,} unreadable; "
        "nothing was run"
    )
    is_dead = num_unreadable + num_failed > 0 and num_todo + num_done == 0
    return NoInputError.exit_code if is_dead else 0


def _preview_line(job: Job, item: Item, action: str) -> dict[str, Any]:
    segment = job.sampling.segment_of(item)
    return {"id": item.id, "action": action} | ({"segment": segment} if segment else {})


def _preview_fields(job: Job, item: Item, found: Probe) -> dict[str, Any]:
    """Say what would be looked at and listened to."""
    medium = job.sampling.medium_of(item)
    if medium == "image":
        return {"frames": 1}
    # some heads of sound files do not tell
    fields: dict[str, Any] = {"duration_s": round(found.duration_s, 3) or None}
    if medium == "video":
        fields = {"frames": job.sampling.num_frames, **fields}
    if job.sampling.is_heard(item, job.engine.sound_window):
        fields["sound"] = found.has_sound
    return fields


def _choose_show(
    options: RunOptions, ledger_path: str | None, plan: Plan, num_items: int
) -> Callable[[Record], None]:
    """Choose what goes to stdout: nothing beside a ledger, plain text or JSON Lines."""
    if ledger_path is not None:
        return lambda record: None
    is_plain = num_items == 1 and sys.stdout.isatty() and not options.json and not options.output
    return Plain(plan.todo) if is_plain else print_data


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
    totals = Totals()
    failures = Failures(plan.todo)
    num_todo = count_records(plan.todo)

    def note(message: str, number: int) -> None:
        if isinstance(show, Plain):  # this is the whole result: --quiet does not swallow it
            Console().note(f"vla2: {message}")
            return
        parts = ["recorded" if number == 1 else f"{number:,} records"] if num_todo > 1 else []
        parts += ["going on"] if num_todo > number else []
        console.note(message + (f" ({', '.join(parts)})" if parts else ""))

    started = time.monotonic()
    stop.is_running = True
    with Watch(console, job.stats, num_todo, is_shown=ledger_path is None) as watch:
        for record in run(job, plan.todo, stop):
            totals.add(record)
            show(record)
            for message, number in failures.take(record):
                note(message, number)
            watch.advance(totals.done + totals.errors)
        for message, number in failures.rest():
            note(message, number)
        if isinstance(show, Plain):
            show.rest()
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
    errors = totals.errors + count_records(plan.failed)
    if not errors:
        return 0
    return 3 if totals.done + count_records(plan.done) else 4
