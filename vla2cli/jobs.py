"""One task over many files: what is left to do, decoding ahead, batches, a record for each key.

    Job.plan      items and ledger -> the work that is left
    decode_ahead  work -> clips, in batches, decoded by other processes while the model runs
    Job.run       batches -> records

Nothing here prints: a job yields each record as soon as it is in the ledger.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from vla2cli.config import GenerationSettings
from vla2cli.errors import InputError, ModelError, Vla2Error
from vla2cli.inputs import Item
from vla2cli.ledger import Entry, Key, Ledger, is_current, key_of, settings_digest
from vla2cli.media.pool import DecodePool
from vla2cli.media.records import Clip, ClipRequest, FileState
from vla2cli.preprocess import FrameGeometry
from vla2cli.record import (
    error_field,
    file_fields,
    frame_fields,
    generation_fields,
    history_field,
    make_record,
    row_seed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vla2cli.engine import Answer, Engine

DEFAULT_PROMPT = "Please describe the {modality} in detail."
DEMO_FLAG = "builtin-model"
WAIT_S = 0.2  # how long a request to stop may go unnoticed while nothing is decoded

Conversation = tuple[str, ...]  # questions that follow each other, with the answers in between
Record = dict[str, Any]
Lookup = Callable[[Key], Entry | None]
Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """What is asked of every file."""

    name: str  # caption, ask or features
    conversations: tuple[Conversation, ...] = ()  # none: the default prompt of the modality
    options: Mapping[str, Any] = field(default_factory=dict)  # put into a record's `generation`

    def conversations_about(self, item: Item) -> tuple[Conversation, ...]:
        """Return what to ask about one file."""
        return self.conversations or ((DEFAULT_PROMPT.format(modality=modality_of(item)),),)


@dataclass(frozen=True)
class Sampling:
    """Which pictures of a file are looked at."""

    num_frames: int
    start_s: float | None = None
    end_s: float | None = None
    decoder: str = "pyav"

    def segment_of(self, item: Item) -> dict[str, float | None] | None:
        """Return the record's `segment`: null for a whole file, and for a picture."""
        if modality_of(item) == "image" or (self.start_s is None and self.end_s is None):
            return None
        return {"start_s": self.start_s, "end_s": self.end_s}

    def request(self, item: Item, geometry: FrameGeometry) -> ClipRequest:
        """Ask the decoder for one file."""
        return ClipRequest(
            path=item.path,
            kind=item.kind,
            geometry=geometry,
            num_frames=self.num_frames,
            start_s=self.start_s,
            end_s=self.end_s,
            decoder=self.decoder,
        )


@dataclass(frozen=True)
class Work:
    """One file and the conversations about it that are still to be had."""

    item: Item
    conversations: tuple[Conversation, ...]

    @property
    def num_records(self) -> int:
        """Records that this work will make."""
        return sum(map(len, self.conversations))


@dataclass(frozen=True)
class Plan:
    """What a run would do; the counts are of records."""

    todo: tuple[Work, ...]
    done: tuple[Work, ...]  # there before
    failed: tuple[Work, ...]  # error records that are not tried again

    @staticmethod
    def count(works: Iterable[Work]) -> int:
        """Count the records of some works."""
        return sum(work.num_records for work in works)


@dataclass
class Totals:
    """What a job has done so far."""

    done: int = 0  # records with a text
    errors: int = 0
    flagged: Counter[str] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one record."""
        if record.get("error") is not None:
            self.errors += 1
        else:
            self.done += 1
            self.flagged.update(set(record["flags"]) - {DEMO_FLAG})


def modality_of(item: Item) -> str:
    """Return the modality an item is asked about in."""
    return "image" if item.kind == "image" else "video"


def key_fields(
    task: Task, sampling: Sampling, item: Item, conversation: Conversation, turn: int
) -> dict[str, Any]:
    """Return the fields that make up the key of one turn's record."""
    return {
        "id": item.id,
        "task": task.name,
        "question": conversation[turn],
        "segment": sampling.segment_of(item),
        "history": [{"question": question} for question in conversation[:turn]],
    }


def settle_kinds(items: Sequence[Item], pool: DecodePool) -> list[Item]:
    """Look into the files whose names do not say whether they are pictures or videos."""
    probes = {
        i: pool.submit_probe(item.path, item.kind)
        for i, item in enumerate(items)
        if item.kind == "unknown" and item.problem is None
    }
    settled = list(items)
    for i, probe in probes.items():
        found = outcome(probe)
        is_image = not isinstance(found, InputError) and found.kind == "image"
        settled[i] = replace(items[i], kind="image" if is_image else "video")
    return settled


class _ResumeCheck:
    """Decides whether the records of a conversation still hold; hashes run side by side."""

    def __init__(self, job: Job, lookup: Lookup | None, retry_errors: bool) -> None:
        self.job = job
        self.lookup = lookup
        self.retry_errors = retry_errors
        self.hashes: dict[str, Future[FileState]] = {}

    @cached_property
    def wanted(self) -> dict[str, Any]:
        """Model and settings that a record must come from."""
        job = self.job
        return {
            "model_sha256": job.engine.identity["sha256"],
            "settings": settings_digest(job.generation),
        }

    def start(self, item: Item, conversation: Conversation) -> Callable[[], str]:
        """Begin to decide; the call that comes back says `todo`, `done` or `failed`."""
        known = []
        for turn in range(len(conversation)):
            key = key_of(key_fields(self.job.task, self.job.sampling, item, conversation, turn))
            entry = self.lookup(key) if self.lookup else None
            if entry is None or (entry.is_error and self.retry_errors):
                return lambda: "todo"
            known.append(entry)
        return self._compare(item, known)

    def _compare(self, item: Item, known: Sequence[Entry]) -> Callable[[], str]:
        verdict = "failed" if any(entry.is_error for entry in known) else "done"
        size_bytes, mtime_ns = _stat(item.path)
        holds = {
            is_current(entry, size_bytes=size_bytes, mtime_ns=mtime_ns, **self.wanted)
            for entry in known
        }
        if "changed" in holds:
            return lambda: "todo"
        if "hash" not in holds:
            return lambda: verdict
        if item.path not in self.hashes:
            self.hashes[item.path] = self.job.pool.submit_hash(item.path)
        wanted = {entry.sha256 for entry in known}
        return lambda: verdict if wanted == {self._sha256(item)} else "todo"

    def _sha256(self, item: Item) -> str | None:
        state = outcome(self.hashes[item.path])
        return None if isinstance(state, InputError) else state.sha256


def _stat(path: str) -> tuple[int | None, int | None]:
    try:
        state = os.stat(path)  # noqa: PTH116  the path may hold any bytes
    except OSError:
        return None, None
    return state.st_size, state.st_mtime_ns


def outcome(future: Future[Result]) -> Result | InputError:
    """Return what a future gives, or the error of its file."""
    try:
        return future.result()
    except InputError as error:
        return error


def decode_ahead(
    works: Iterable[Work],
    pool: DecodePool,
    request: Callable[[Item], ClipRequest],
    *,
    batch: int,
    should_stop: Callable[[], bool],
) -> Iterator[list[tuple[Work, Clip | InputError]]]:
    """Decode ahead of the model and yield clips in batches, in the order they become ready.

    At most `batch` + 2 clips for each decoding process are held, whatever the number of works.
    """
    waiting = iter(works)
    in_flight: dict[Future[Clip], Work] = {}
    ready: list[tuple[Work, Clip | InputError]] = []
    lookahead = batch + 2 * pool.num_workers
    while not should_stop():
        while len(in_flight) + len(ready) < lookahead:
            work = next(waiting, None)
            if work is None:
                break
            in_flight[pool.submit(request(work.item))] = work
        if not in_flight:
            break
        done, _ = wait(in_flight, timeout=WAIT_S, return_when=FIRST_COMPLETED)
        for future in [future for future in in_flight if future in done]:
            clip = outcome(future)
            ready.append((in_flight.pop(future), clip))
        while len(ready) >= batch and not should_stop():
            yield ready[:batch]
            del ready[:batch]
    if ready and not should_stop():
        yield ready


def in_parts(
    function: Callable[[list[Row]], Sequence[Result]], rows: list[Row], stage: str
) -> list[Result | InputError]:
    """Run a function on a batch; where that fails, on each row alone.

    Returns:
        One result for each row; the error of a row that fails alone too stands in its place.
    """
    try:
        return list(function(rows))
    except Vla2Error:
        raise
    except Exception as error:  # one file must not end the batch
        failure = _describe_failure(error, stage)
    if len(rows) == 1:
        return [failure]
    return [result for row in rows for result in in_parts(function, [row], stage)]


def _describe_failure(error: Exception, stage: str) -> InputError:
    import torch

    if isinstance(error, torch.AcceleratorError):
        # after such an error every further call fails as well
        raise ModelError(f"the device failed: {_one_line(error)}") from error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return InputError(
            "out of memory; try fewer --frames or a smaller --dtype",
            kind="out-of-memory",
            stage=stage,
        )
    return InputError(
        f"unexpected {type(error).__name__}: {_one_line(error)}", kind="failed", stage=stage
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@dataclass
class _Dialogue:
    """One conversation about one clip, while it is had."""

    work: Work
    clip: Clip
    tokens: Tensor
    questions: Conversation
    encode_s: float
    answers: list[Answer] = field(default_factory=list)
    failure: InputError | None = None

    @property
    def is_open(self) -> bool:
        return self.failure is None and len(self.answers) < len(self.questions)


class Job:
    """One task, one model and one way to sample, over any number of files.

    Args:
        engine: its weights are not needed before `run`.
        task: what is asked.
        sampling: which pictures are looked at.
        settings: how the model goes on.
        pool: decodes.
        ledger: what was done before; takes each record before it is yielded.
        batch: prompts that are answered together.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        sampling: Sampling,
        settings: GenerationSettings,
        pool: DecodePool,
        ledger: Ledger | None = None,
        *,
        batch: int = 1,
    ) -> None:
        self.engine = engine
        self.task = task
        self.sampling = sampling
        self.settings = settings
        self.pool = pool
        self.ledger = ledger
        self.batch = batch
        # seconds of work: decode (over all processes), tower, language
        self.busy_s: defaultdict[str, float] = defaultdict(float)

    @property
    def demo_flags(self) -> tuple[str, ...]:
        """What every record of a demonstration model is flagged with."""
        return (DEMO_FLAG,) if self.engine.checkpoint.config.is_demo else ()

    @property
    def generation(self) -> dict[str, Any]:
        """The record's `generation` and `seed`."""
        fields = generation_fields(self.settings, self.sampling.num_frames, self.sampling.decoder)
        fields["generation"] |= self.task.options
        return fields

    def plan(
        self, items: Sequence[Item], *, lookup: Lookup | None = None, retry_errors: bool = False
    ) -> Plan:
        """Split the items into what is to do, what is done and what failed before.

        A record holds while file, model and settings are the same. Only where size or time differ
        is a file hashed again.

        Args:
            items: what to work on.
            lookup: finds what was done before; by default in the ledger.
            retry_errors: whether what failed before is to do.
        """
        if lookup is None and self.ledger is not None:
            lookup = self.ledger.lookup
        check = _ResumeCheck(self, lookup, retry_errors)
        asked = [
            (item, conversation)
            for item in settle_kinds(items, self.pool)
            for conversation in self.task.conversations_about(item)
        ]
        decisions = [check.start(item, conversation) for item, conversation in asked]
        split: dict[str, list[Work]] = {"todo": [], "done": [], "failed": []}
        for (item, conversation), decide in zip(asked, decisions, strict=True):
            works = split[decide()]
            if works and works[-1].item is item:
                works[-1] = Work(item, (*works[-1].conversations, conversation))
            else:
                works.append(Work(item, (conversation,)))
        return Plan(*map(tuple, (split["todo"], split["done"], split["failed"])))

    def run(
        self, works: Iterable[Work], *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Record]:
        """Do the work; ends early when asked to stop, after the batch in hand."""
        for outcomes in self.clips(works, should_stop=should_stop):
            for record in self._answer_batch(outcomes):
                self.write(record)
                yield record

    def write(self, record: Record) -> None:
        """Append a record to the ledger, where there is one."""
        if self.ledger is not None:
            self.ledger.append(record)

    def clips(
        self, works: Iterable[Work], *, should_stop: Callable[[], bool]
    ) -> Iterator[list[tuple[Work, Clip | InputError]]]:
        """Yield the works in batches, each with its clip or with what is wrong with its file."""
        readable: list[Work] = []
        for work in works:
            if work.item.problem is None:
                readable.append(work)
            else:
                yield [(work, InputError(work.item.problem, kind="missing", stage="open"))]
        batches = decode_ahead(
            readable,
            self.pool,
            lambda item: self.sampling.request(item, self.engine.geometry),
            batch=self.batch,
            should_stop=should_stop,
        )
        for outcomes in batches:
            for _, found in outcomes:
                if not isinstance(found, InputError):
                    self.busy_s["decode"] += sum(found.timings_s.values())
            yield outcomes

    def _answer_batch(self, outcomes: Sequence[tuple[Work, Clip | InputError]]) -> Iterator[Record]:
        clips: list[tuple[Work, Clip]] = []
        for work, found in outcomes:
            if isinstance(found, InputError):
                yield from self.failures(work, found)
            else:
                clips.append((work, found))
        if not clips:
            return
        dialogues: list[_Dialogue] = []
        for (work, clip), tokens, encode_s in self._encode(clips):
            if isinstance(tokens, InputError):
                yield from self.failures(work, tokens, clip)
                continue
            dialogues += [
                _Dialogue(work, clip, tokens, questions, encode_s)
                for questions in work.conversations
            ]
        while open_now := [dialogue for dialogue in dialogues if dialogue.is_open]:
            for start in range(0, len(open_now), self.batch):
                yield from self._ask(open_now[start : start + self.batch])

    def _encode(
        self, clips: list[tuple[Work, Clip]]
    ) -> Iterator[tuple[tuple[Work, Clip], Tensor | InputError, float]]:
        started = time.perf_counter()
        encoded = in_parts(self.engine.encode, [clip for _, clip in clips], "encode")
        encode_s = time.perf_counter() - started
        self.busy_s["tower"] += encode_s
        for row, tokens in zip(clips, encoded, strict=True):
            yield row, tokens, encode_s / len(clips)

    def _ask(self, dialogues: list[_Dialogue]) -> Iterator[Record]:
        """Ask the next question of each dialogue; yield the records of those that end."""
        started = time.perf_counter()
        answers = in_parts(
            lambda rows: self.engine.answer([self._next(row) for row in rows], self.settings),
            dialogues,
            "generate",
        )
        self.busy_s["language"] += time.perf_counter() - started
        for dialogue, answer in zip(dialogues, answers, strict=True):
            if isinstance(answer, InputError):
                dialogue.failure = answer
            else:
                dialogue.answers.append(answer)
            if not dialogue.is_open:
                # a conversation is recorded when it is over: nobody finds half of one
                for turn in range(len(dialogue.questions)):
                    yield self._record(dialogue, turn)

    def _next(self, dialogue: _Dialogue) -> Any:
        from vla2cli.engine import Ask

        turn = len(dialogue.answers)
        key = key_fields(self.task, self.sampling, dialogue.work.item, dialogue.questions, turn)
        return Ask(
            question=dialogue.questions[turn],
            modality=modality_of(dialogue.work.item),
            visual_tokens=dialogue.tokens,
            history=self._history(dialogue, turn),
            seed=row_seed(self.settings.seed, key),
        )

    def _history(self, dialogue: _Dialogue, turn: int) -> tuple[Any, ...]:
        from vla2cli.prompt import Turn

        pairs = zip(dialogue.questions[:turn], dialogue.answers)
        return tuple(Turn(question, answer.text) for question, answer in pairs)

    def failures(self, work: Work, error: InputError, clip: Clip | None = None) -> Iterator[Record]:
        """Make an error record for each turn of a work."""
        state = clip.state if clip else _partial_state(work.item)
        for conversation in work.conversations:
            for turn in range(len(conversation)):
                common = self.fields(work.item, conversation, turn, state)
                yield make_record(**common, error=error_field(error))

    def _record(self, dialogue: _Dialogue, turn: int) -> Record:
        clip = dialogue.clip
        common = self.fields(dialogue.work.item, dialogue.questions, turn, clip.state)
        common |= {"frames": frame_fields(clip), "decoder": clip.decoder}
        if turn:
            common["history"] = history_field(self._history(dialogue, turn))
        if turn >= len(dialogue.answers):
            assert dialogue.failure is not None
            return make_record(**common, error=error_field(dialogue.failure))
        answer = dialogue.answers[turn]
        common |= {"flags": [*self.demo_flags, *clip.flags, *answer.flags]}
        return make_record(
            **common,
            text=answer.text,
            finish_reason=answer.generation.finish_reason,
            tokens={
                "prompt": answer.num_prompt,
                "visual": answer.num_visual,
                "audio": 0,
                "new": len(answer.generation.ids),
            },
            logprob_mean=answer.generation.logprob_mean,
            timings_s={
                **{name: round(seconds, 6) for name, seconds in clip.timings_s.items()},
                "encode": round(dialogue.encode_s, 6),
                "prefill": round(answer.generation.prefill_s, 6),
                "generate": round(answer.generation.generate_s, 6),
            },
        )

    def fields(
        self, item: Item, conversation: Conversation, turn: int, state: FileState | None
    ) -> dict[str, Any]:
        """Return the fields of a record that do not depend on an answer."""
        from vla2cli.engine import ENGINE_NAME
        from vla2cli.frontend.eager import NAME as FRONTEND_NAME

        key = key_fields(self.task, self.sampling, item, conversation, turn)
        if not turn:
            del key["history"]
        return {
            **file_fields(item, state),
            **key,
            "modality": modality_of(item),
            "flags": [],
            "model": self.engine.identity,
            "decoder": self.sampling.decoder,
            "frontend": FRONTEND_NAME,
            "engine": ENGINE_NAME,
            "dtype": self.engine.dtype_name,
            **self.generation,
        }


def _partial_state(item: Item) -> FileState | None:
    """Return what is known of a file that was not read: its size and time, no hash."""
    size_bytes, mtime_ns = _stat(item.path)
    if size_bytes is None or mtime_ns is None:
        return None
    return FileState(size_bytes=size_bytes, mtime_ns=mtime_ns, sha256="")
