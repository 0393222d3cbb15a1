"""`vla2 plan` from its options to its exit code: look, try, predict, say."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from vla2cli.console import Console, count
from vla2cli.errors import NoInputError
from vla2cli.forecast.predict import Prediction, line_bytes, predict
from vla2cli.forecast.survey import Survey, look_into, rank, spread
from vla2cli.forecast.trial import Trial, run_trial
from vla2cli.inputs import Found, find_items
from vla2cli.jobs import Job
from vla2cli.ledger import check_output, read_index
from vla2cli.manifest import Manifest
from vla2cli.media.pool import DecodePool, default_num_workers
from vla2cli.options import RunOptions
from vla2cli.plan import Plan, Task, Work, usable_items
from vla2cli.run import load_weights, note_hashing, open_engine
from vla2cli.segments import cut_items
from vla2cli.stats import Stats
from vla2cli.stop import Stop

if TYPE_CHECKING:
    from vla2cli.engine import Engine

END_S = 0.2  # in which Python takes torch and transformers down, as seen on two cores


@dataclass(frozen=True)
class Forecast:
    """What is there, what of it is to do, and what that will take."""

    task: str
    found: Found
    survey: Survey
    plan: Plan
    trial: Trial | None  # None: nothing was tried
    prediction: Prediction | None  # None: nothing was tried, or nothing of it could be done
    memory_bytes: int  # of the process at its peak; what decodes has a limit of its own
    gpu_memory_bytes: int | None  # of the GPU that holds most; None without

    @property
    def unlisted(self) -> list[str]:
        """Folders that could not be listed, each with the reason."""
        return [folder for note in self.found.notes for folder in note.unreadable]

    @property
    def num_skipped(self) -> int:
        """Media files that the modality or the model leaves out."""
        found = sum(note.skipped for note in self.found.notes) + len(self.found.items)
        return found - len(self.survey.items)

    @property
    def exit_code(self) -> int:
        """4: no file can be used, or none that was tried."""
        is_dead = len(self.survey.unreadable) == len(self.survey.items)
        has_failed = self.trial is not None and self.prediction is None
        return NoInputError.exit_code if is_dead or has_failed else 0


def make_forecast(
    task: Task, paths: Sequence[str] | Manifest, options: RunOptions, limit_s: float
) -> Forecast:
    """Look into what the paths hold, and try the task on some of it; nothing is written.

    Args:
        task: what would be asked.
        paths: arguments of the command, or the manifest that `task` is of.
        options: its flags, checked. A cache is not looked into.
        limit_s: seconds that the model is tried for; 0 leaves it alone.

    Raises:
        NoInputError: there is nothing to work on.
    """
    # what this process has spent until now went into its start; a run starts, and ends, like it
    began = time.monotonic() - time.process_time() - END_S
    console = Console(quiet=options.quiet, verbose=options.verbose)
    with ExitStack() as stack:
        stack.enter_context(Stop(console))
        if isinstance(paths, Manifest):
            found = paths.found(options.modality)
        else:
            found = find_items(paths, modality=options.modality)
        if options.ledger_path is not None:
            check_output(options.ledger_path)
        engine = open_engine(options, console)
        start_s = time.monotonic() - began
        num_workers = options.workers or default_num_workers()
        make_pool = partial(
            DecodePool,
            num_workers,
            timeout_s=options.decode_timeout,
            memory_bytes=int(options.decode_memory * 2**30),
        )
        with make_pool() as pool:
            items = usable_items(found.items, pool, options.modality, has_ears=engine.has_ears)
            if options.part is not None:
                items = options.part.select(items)
            console.note(f"looking into {count(len(items), 'file')} …")
            survey = look_into(items, pool)
            sampling = options.sampling(engine.checkpoint.config.num_frames)
            items, unreadable = cut_items(items, sampling, pool)
        # as a run has it: its processes have to start
        pool = stack.enter_context(make_pool())
        job = Job(
            engine,
            task,
            sampling,
            engine.settings(options.generation),
            pool,
            batch=options.batch,
            overlap=options.overlap,
            stats=Stats(num_workers),
            say=console.note,
        )
        job.unreadable = unreadable
        note_hashing(engine, console)
        lookup = None
        if options.ledger_path and not options.force:
            lookup = read_index(options.ledger_path).get
        plan = job.plan(items, lookup=lookup, retry_errors=options.retry_errors)
        trial, prediction = None, None
        works = _to_try(plan, survey)
        if works and limit_s:
            loading = time.monotonic()
            load_weights(engine, console)
            start_s += time.monotonic() - loading
            if options.cache is not None:
                console.note("--cache is left alone: what it holds will take less time than said")
            console.note(f"trying the model on some of {count(len(works), 'file')} …")
            trial = run_trial(job, works, limit_s)
            prediction = _predict(trial, plan, survey, job, start_s)
        return Forecast(
            task=task.name,
            found=found,
            survey=survey,
            plan=plan,
            trial=trial,
            prediction=prediction,
            memory_bytes=job.stats.summary()["peak_memory_bytes"],
            gpu_memory_bytes=_gpu_peak(engine),
        )


def _to_try(plan: Plan, survey: Survey) -> list[Work]:
    """Order what is to do so that any beginning stands for all of it."""
    works = [work for work in plan.todo if work.item.id not in survey.unreadable]
    return spread(sorted(works, key=lambda work: rank(work.item, survey.sizes)))


def _predict(
    trial: Trial, plan: Plan, survey: Survey, job: Job, start_s: float
) -> Prediction | None:
    if all(record.get("error") is not None for record in trial.records):
        return None
    todo: dict[str, float] = defaultdict(float)
    unread = 0.0  # records that will be errors
    for work in plan.todo:
        share = survey.chance_unreadable(work.item)
        todo[work.item.kind] += (1 - share) * work.num_records
        unread += share * work.num_records
    prediction = predict(
        trial,
        todo,
        {work.item.id: work.item.kind for work in plan.todo},
        start_s=start_s,
        batch=job.batch,
        num_workers=job.pool.num_workers,
    )
    return replace(
        prediction,
        ledger_bytes=prediction.ledger_bytes + round(unread * _error_bytes(plan, survey, job)),
    )


def _error_bytes(plan: Plan, survey: Survey, job: Job) -> float:
    """Return how long the records of unreadable files are, on average."""
    sizes = [
        line_bytes(record)
        for work in plan.todo
        if (error := survey.unreadable.get(work.item.id)) is not None
        for record in job.failures(work, error, error.state)
    ]
    return sum(sizes) / max(1, len(sizes))


def _gpu_peak(engine: Engine) -> int | None:
    import torch

    if engine.device.type != "cuda":
        return None
    return max(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count())))
