"""One task over many files: decoding ahead, batches, a record for each key.

    decode_ahead  work -> clips, in batches, decoded by other processes while the model runs
    Job.run       batches -> records

Nothing here prints: a job yields each record as soon as it is in the ledger.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from vla2_models.errors import one_line
from vla2cli.config import GenerationSettings
from vla2cli.errors import InputError, ModelError, Vla2Error
from vla2cli.inputs import Item
from vla2cli.ledger import Ledger, Record, settings_digest
from vla2cli.media.pool import DecodePool
from vla2cli.media.records import Clip, ClipRequest, FileState
from vla2cli.plan import (
    Conversation,
    Lookup,
    Plan,
    Sampling,
    Task,
    Work,
    key_fields,
    make_plan,
    outcome,
)
from vla2cli.record import (
    clip_fields,
    error_field,
    file_fields,
    generation_fields,
    history_field,
    make_record,
    row_seed,
)

if TYPE_CHECKING:
    from vla2cli.engine import Answer, Ask, Engine, MediaTokens

DEMO_FLAG = "builtin-model"
WAIT_S = 0.2  # how long a request to stop may go unnoticed while nothing is decoded

Row = TypeVar("Row")
Result = TypeVar("Result")


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
    except InputError as error:
        failure = error
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
        raise ModelError(f"the device failed: {one_line(error)[:300]}") from error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return InputError(
            "out of memory; try fewer --frames or a smaller --dtype",
            kind="out-of-memory",
            stage=stage,
        )
    return InputError(
        f"unexpected {type(error).__name__}: {one_line(error)[:300]}", kind="failed", stage=stage
    )


@dataclass
class _Dialogue:
    """One conversation about one clip, while it is had."""

    work: Work
    clip: Clip
    media: MediaTokens
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
        sampling: what of the files is looked at and listened to.
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
        # what `_wanted` has said, by all of an item that `generation` looks at
        self._wanted_of: dict[tuple[object, ...], dict[str, Any]] = {}

    @property
    def demo_flags(self) -> tuple[str, ...]:
        """What every record of a demonstration model is flagged with."""
        return (DEMO_FLAG,) if self.engine.checkpoint.config.is_demo else ()

    def generation(self, item: Item, question: str) -> dict[str, Any]:
        """Return the `generation` and `seed` of the record of a question about an item."""
        num_frames: int | None
        match self.sampling.medium_of(item):
            case "image":  # stands for as many frames as the checkpoint says
                num_frames, decoder = self.engine.checkpoint.config.num_frames, None
            case "audio":
                num_frames, decoder = None, None
            case _:
                num_frames, decoder = self.sampling.num_frames, self.sampling.decoder
        fields = generation_fields(self.settings, num_frames, decoder)
        fields["generation"] |= self.sampling.sound_fields(item, self.engine.sound_window)
        fields["generation"] |= self.task.options
        if choices := self.task.choices_of(item, question):
            fields["generation"]["choices"] = list(choices)
        return fields

    def plan(
        self, items: Sequence[Item], *, lookup: Lookup | None = None, retry_errors: bool = False
    ) -> Plan:
        """Split the items into what is to do, what is done and what failed before.

        Args:
            items: what to work on, from `usable_items`.
            lookup: finds what was done before; by default in the ledger.
            retry_errors: whether what failed before is to do.

        Raises:
            UsageError: a question holds the placeholder of its own clip, or a record would be
                replaced by that of another file.
        """
        if lookup is None and self.ledger is not None:
            lookup = self.ledger.lookup
        self._check_questions(items)
        return make_plan(
            items,
            self.task,
            self.sampling,
            self.pool,
            lookup=lookup,
            wanted=self._wanted,
            retry_errors=retry_errors,
        )

    def _wanted(self, item: Item, conversation: Conversation) -> dict[str, Any]:
        choices = self.task.choices_of(item, conversation[0])
        about = item.kind, item.start_s, item.end_s, choices
        if about not in self._wanted_of:
            self._wanted_of[about] = {
                "model_sha256": self.engine.identity["sha256"],
                "settings": settings_digest(self.generation(item, conversation[0])),
            }
        return self._wanted_of[about]

    def _check_questions(self, items: Sequence[Item]) -> None:
        from vla2cli.prompt import check_question

        asked: dict[tuple[str, str], None] = {}  # each question and medium once
        for item in items:
            medium = self.sampling.medium_of(item)
            for conversation in self.task.conversations_about(item, medium):
                asked |= dict.fromkeys((question, medium) for question in conversation)
        for question, medium in asked:
            check_question(question, medium)

    def run(
        self, works: Iterable[Work], *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Record]:
        """Do the work; ends early when asked to stop, after the batch in hand."""
        for outcomes in self.clips(works, should_stop=should_stop):
            for record in self._answer_batch(outcomes, should_stop):
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
        batches = decode_ahead(
            works,
            self.pool,
            lambda item: self.sampling.request(
                item, self.engine.geometry, self.engine.sound_window
            ),
            batch=self.batch,
            should_stop=should_stop,
        )
        for outcomes in batches:
            for _, found in outcomes:
                if not isinstance(found, InputError):
                    self.busy_s["decode"] += sum(found.timings_s.values())
            yield outcomes

    def _answer_batch(
        self,
        outcomes: Sequence[tuple[Work, Clip | InputError]],
        should_stop: Callable[[], bool],
    ) -> Iterator[Record]:
        clips: list[tuple[Work, Clip]] = []
        for work, found in outcomes:
            if isinstance(found, InputError):
                yield from self.failures(work, found, found.state)
            else:
                clips.append((work, found))
        if not clips:
            return
        dialogues: list[_Dialogue] = []
        for (work, clip), media, encode_s in self._encode(clips):
            if isinstance(media, InputError):
                yield from self.failures(work, media, clip.state)
                continue
            dialogues += [
                _Dialogue(work, clip, media, questions, encode_s)
                for questions in work.conversations
            ]
        while open_now := [dialogue for dialogue in dialogues if dialogue.is_open]:
            for start in range(0, len(open_now), self.batch):
                if should_stop():  # a conversation that is not over is had again
                    return
                yield from self._ask(open_now[start : start + self.batch])

    def _encode(
        self, clips: list[tuple[Work, Clip]]
    ) -> Iterator[tuple[tuple[Work, Clip], MediaTokens | InputError, float]]:
        started = time.perf_counter()
        encoded = in_parts(self.engine.encode, [clip for _, clip in clips], "encode")
        encode_s = time.perf_counter() - started
        self.busy_s["tower"] += encode_s
        for row, media in zip(clips, encoded, strict=True):
            yield row, media, encode_s / len(clips)

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
                yield from self._records(dialogue)

    def _records(self, dialogue: _Dialogue) -> Iterator[Record]:
        """Make the records of a conversation that is over: nobody finds half of one."""
        for turn in range(len(dialogue.questions)):
            if turn < len(dialogue.answers):
                yield self._record(dialogue, turn)
            else:
                assert dialogue.failure is not None, f"turn {turn} was not asked"
                item, state = dialogue.work.item, dialogue.clip.state
                fields = self.fields(item, dialogue.questions, turn, state)
                yield make_record(**fields, error=error_field(dialogue.failure))

    def _next(self, dialogue: _Dialogue) -> Ask:
        from vla2cli.engine import Ask

        turn = len(dialogue.answers)
        key = key_fields(self.task, self.sampling, dialogue.work.item, dialogue.questions, turn)
        return Ask(
            question=dialogue.questions[turn],
            medium=self.sampling.medium_of(dialogue.work.item),
            media=dialogue.media,
            history=self._history(dialogue, turn),
            seed=row_seed(self.settings.seed, key),
            choices=self.task.choices_of(dialogue.work.item, dialogue.questions[turn]),
        )

    def _history(self, dialogue: _Dialogue, turn: int) -> tuple[Any, ...]:
        from vla2cli.prompt import Turn

        pairs = zip(dialogue.questions[:turn], dialogue.answers)
        return tuple(Turn(question, answer.text) for question, answer in pairs)

    def failures(self, work: Work, error: InputError, state: FileState | None) -> Iterator[Record]:
        """Make an error record for each turn of a work; `state` is of the file that failed."""
        for conversation in work.conversations:
            for turn in range(len(conversation)):
                common = self.fields(work.item, conversation, turn, state)
                yield make_record(**common, error=error_field(error))

    def _record(self, dialogue: _Dialogue, turn: int) -> Record:
        clip = dialogue.clip
        common = self.fields(dialogue.work.item, dialogue.questions, turn, clip.state)
        common |= clip_fields(clip)
        if turn:
            common["history"] = history_field(self._history(dialogue, turn))
        answer = dialogue.answers[turn]
        common |= {"flags": [*self.demo_flags, *clip.flags, *answer.flags]}
        return make_record(
            **common,
            text=answer.text,
            choice=None if answer.choice is None else asdict(answer.choice),
            finish_reason=answer.generation.finish_reason,
            tokens={
                "prompt": answer.num_prompt,
                "visual": answer.num_visual,
                "audio": answer.num_audio,
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
        key = key_fields(self.task, self.sampling, item, conversation, turn)
        if not turn:
            del key["history"]
        return {
            **file_fields(item, state),
            **key,
            "modality": self._asked_modality(item),
            "flags": [],
            "model": self.engine.identity,
            "decoder": self.sampling.decoder,
            **self.engine.backends,
            **self.generation(item, conversation[turn]),
        }

    def _asked_modality(self, item: Item) -> str:
        """Return the `modality` of a record whose file was not read: what was asked for."""
        medium = self.sampling.medium_of(item)
        return "av" if (medium, self.sampling.modality) == ("video", "av") else medium
