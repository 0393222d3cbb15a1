"""The tool from Python: what the commands do, as functions that yield records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from vla2cli.config import GenerationChoice
from vla2cli.engine import Engine
from vla2cli.inputs import find_items
from vla2cli.jobs import Conversation, Job, Record, Sampling, Task
from vla2cli.ledger import Ledger
from vla2cli.media.pool import DecodePool, default_num_workers

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def caption(
    paths: Paths,
    engine: Engine,
    *,
    prompt: str | None = None,
    sampling: Sampling | None = None,
    generation: GenerationChoice | None = None,
    batch: int = 1,
    output: str | os.PathLike[str] | None = None,
) -> Iterator[Record]:
    """Describe files and folders of videos and images.

    Args:
        paths: one path or several; folders are searched, globs expanded.
        engine: from `Engine.load`.
        prompt: asked of every file; by default "Please describe the video in detail."
        sampling: which pictures are looked at; by default as the checkpoint says.
        generation: how the model goes on; by default greedy, 512 tokens.
        batch: prompts that are answered together.
        output: a ledger to append to; what it already holds is skipped.

    Yields:
        One record for each file that is not done, with `text` or `error`.

    Raises:
        Vla2Error: nothing was found, or the ledger cannot be written.
    """
    task = Task("caption", ((prompt,),) if prompt else ())
    yield from _run(task, paths, engine, sampling, generation, batch, output)


def ask(
    paths: Paths,
    questions: str | Sequence[str],
    engine: Engine,
    *,
    sampling: Sampling | None = None,
    generation: GenerationChoice | None = None,
    batch: int = 1,
    output: str | os.PathLike[str] | None = None,
) -> Iterator[Record]:
    """Ask each question of each file, every one by itself; arguments as in `caption`."""
    each = [questions] if isinstance(questions, str) else questions
    asked: tuple[Conversation, ...] = tuple((question,) for question in dict.fromkeys(each))
    yield from _run(Task("ask", asked), paths, engine, sampling, generation, batch, output)


def _run(
    task: Task,
    paths: Paths,
    engine: Engine,
    sampling: Sampling | None,
    generation: GenerationChoice | None,
    batch: int,
    output: str | os.PathLike[str] | None,
) -> Iterator[Record]:
    roots = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found = find_items([os.fspath(root) for root in roots])
    sampling = sampling or Sampling(engine.checkpoint.config.num_frames)
    settings = engine.settings(generation or GenerationChoice())
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger.open(output)) if output is not None else None
        pool = stack.enter_context(DecodePool(default_num_workers()))
        job = Job(engine, task, sampling, settings, pool, ledger, batch=batch)
        items = [item for item in found.items if item.kind != "audio"]
        yield from job.run(job.plan(items).todo)
