"""The tool from Python: what the commands do, as functions that yield records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from vla2cli.cache import DEFAULT_CACHE_SIZE, TokenCache, parse_size
from vla2cli.config import DEFAULT_BATCH, GenerationChoice
from vla2cli.engine import Engine
from vla2cli.inputs import find_items
from vla2cli.jobs import Job
from vla2cli.ledger import Ledger, Record
from vla2cli.manifest import Manifest, read_manifest
from vla2cli.media.pool import DecodePool, default_num_workers
from vla2cli.plan import Sampling, Task, Work, is_choice, usable_items
from vla2cli.segments import cut_items
from vla2cli.tensors import check_tensors, is_missing, make_folder, parse_tensors, run_features

StrPath = str | os.PathLike[str]
Paths = StrPath | Iterable[StrPath]


def caption(
    paths: Paths | Manifest,
    engine: Engine,
    *,
    prompt: str | None = None,
    sampling: Sampling | None = None,
    generation: GenerationChoice | None = None,
    batch: int = DEFAULT_BATCH,
    cache: StrPath | None = None,
    output: StrPath | None = None,
    retry_errors: bool = False,
) -> Iterator[Record]:
    """Describe files and folders of videos, images and sounds.

    Args:
        paths: one path or several, or a manifest; folders are searched, globs expanded.
        engine: from `Engine.load`.
        prompt: asked of every file; by default "Please describe the video in detail."
        sampling: what is looked at and listened to; by default as the checkpoint says.
        generation: how the model goes on; by default greedy, 512 tokens.
        batch: clips that are encoded, and prompts that are answered, together.
        cache: a folder for encoded clips, up to 20 GB; another question needs no decoding.
        output: a ledger to append to; what it already holds is skipped.
        retry_errors: whether files with an error record are tried again.

    Yields:
        One record for each file that is not done, with `text` or `error`.

    Raises:
        Vla2Error: nothing was found, or the ledger cannot be written.
    """
    task = Task("caption", ((prompt,),) if prompt else ())
    with ExitStack() as stack:
        job = _open_job(stack, engine, task, sampling, generation, batch, output, cache)
        yield from job.run(_todo(job, paths, retry_errors))


def ask(
    paths: Paths,
    questions: str | Sequence[str | Sequence[str]],
    engine: Engine,
    *,
    choices: Sequence[str] = (),
    sampling: Sampling | None = None,
    generation: GenerationChoice | None = None,
    batch: int = DEFAULT_BATCH,
    cache: StrPath | None = None,
    output: StrPath | None = None,
    retry_errors: bool = False,
) -> Iterator[Record]:
    """Ask questions of each file, every one by itself.

    Args:
        paths: one path or several.
        questions: one or several; several in a tuple or list of their own follow each other, and
            the model remembers its answers.
        engine: from `Engine.load`.
        choices: what each answer has to be one of; none: the model's own words.
        sampling: what is looked at and listened to.
        generation: how the model goes on.
        batch: clips that are encoded, and prompts that are answered, together.
        cache: a folder for encoded clips, up to 20 GB; another question needs no decoding.
        output: a ledger to append to; what it already holds is skipped.
        retry_errors: whether files with an error record are tried again.

    Yields, Raises: as `caption`.
    """
    if choices and not is_choice(choices):
        raise ValueError(f"choices is {choices!r}, expected two options or more, each once")
    each = [questions] if isinstance(questions, str) else questions
    conversations = tuple((q,) if isinstance(q, str) else tuple(q) for q in each)
    with ExitStack() as stack:
        task = Task("ask", conversations, choices=tuple(choices))
        job = _open_job(stack, engine, task, sampling, generation, batch, output, cache)
        yield from job.run(_todo(job, paths, retry_errors))


def ask_manifest(
    manifest: StrPath,
    engine: Engine,
    *,
    questions: Sequence[str] = (),
    sampling: Sampling | None = None,
    generation: GenerationChoice | None = None,
    batch: int = DEFAULT_BATCH,
    cache: StrPath | None = None,
    output: StrPath | None = None,
    retry_errors: bool = False,
) -> Iterator[Record]:
    """Ask of each file what a manifest says.

    Args:
        manifest: JSON Lines or CSV, see `vla2cli.manifest`.
        engine: from `Engine.load`.
        questions: for the lines that have none.
        sampling: what is looked at and listened to.
        generation: how the model goes on.
        batch: clips that are encoded, and prompts that are answered, together.
        cache: a folder for encoded clips, up to 20 GB; another question needs no decoding.
        output: a ledger to append to; what it already holds is skipped.
        retry_errors: whether files with an error record are tried again.

    Yields, Raises: as `caption`.
    """
    listed = read_manifest(os.fspath(manifest), needs_question=not questions)
    with ExitStack() as stack:
        task = Task("ask", tuple((question,) for question in questions))
        job = _open_job(stack, engine, task, sampling, generation, batch, output, cache)
        yield from job.run(_todo(job, listed, retry_errors))


def features(
    paths: Paths,
    engine: Engine,
    folder: StrPath,
    *,
    tensors: str | None = None,
    question: str | None = None,
    sampling: Sampling | None = None,
    generation: GenerationChoice | None = None,
    retry_errors: bool = False,
) -> Iterator[Record]:
    """Write what the networks make of each file, as safetensors.

    Args:
        paths: one path or several.
        engine: from `Engine.load`.
        folder: for one safetensors file per input, and features.jsonl.
        tensors: names with commas between them, or `all`; see `vla2cli.tensors.TENSORS`.
        question: for the tensors from `input_ids` on.
        sampling: what is looked at and listened to.
        generation: how the model goes on, for `generated_ids`.
        retry_errors: whether files with an error record are tried again.

    Yields:
        One record for each file that is not done, with `file` and `tensors`, or `error`.

    Raises:
        Vla2Error: nothing was found, or the folder cannot be written.
    """
    names = parse_tensors(tensors)
    folder = Path(folder)
    if "generated_ids" not in names:  # nothing is generated, so nothing depends on how
        generation = None
    task = Task("features", ((question,),) if question else (), {"tensors": list(names)})
    check_tensors(names, engine, _sampling(engine, sampling))
    with ExitStack() as stack:
        output = make_folder(folder)
        job = _open_job(stack, engine, task, sampling, generation, 1, output)
        todo = _todo(job, paths, retry_errors, lambda work: is_missing(work, job, folder))
        yield from run_features(job, todo, folder, names)


def _open_job(
    stack: ExitStack,
    engine: Engine,
    task: Task,
    sampling: Sampling | None,
    generation: GenerationChoice | None,
    batch: int,
    output: StrPath | None,
    cache: StrPath | None = None,
) -> Job:
    sampling = _sampling(engine, sampling)
    engine.check_sampling(sampling)
    settings = engine.settings(generation or GenerationChoice())
    ledger = stack.enter_context(Ledger.open(output)) if output is not None else None
    pool = stack.enter_context(DecodePool(default_num_workers()))
    kept = None
    if cache is not None:
        kept = TokenCache.open(Path(cache), parse_size(DEFAULT_CACHE_SIZE))
    return Job(engine, task, sampling, settings, pool, ledger, batch=batch, cache=kept)


def _sampling(engine: Engine, sampling: Sampling | None) -> Sampling:
    return sampling or Sampling(engine.checkpoint.config.num_frames)


def _todo(
    job: Job,
    paths: Paths | Manifest,
    retry_errors: bool,
    is_missing: Callable[[Work], bool] = lambda work: False,
) -> list[Work]:
    modality = job.sampling.modality
    if isinstance(paths, Manifest):
        found = paths.found(modality)
    else:
        roots = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        found = find_items([os.fspath(root) for root in roots], modality=modality)
    items = usable_items(found.items, job.pool, modality, has_ears=job.engine.has_ears)
    items, job.unreadable = cut_items(items, job.sampling, job.pool)
    plan = job.plan(items, retry_errors=retry_errors)
    return [*plan.todo, *filter(is_missing, plan.done)]
