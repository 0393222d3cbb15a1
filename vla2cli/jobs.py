"""One task over many files: stages that work at the same time, a record for each key.

    decode_ahead  works -> clips, by other processes
    Job._encode   clips -> tokens, in batches
    Asking.run    tokens -> conversations, as many at a time as the engine takes
    Job.run       conversations -> records, each in the ledger before it is yielded

Each stage but the last runs in a thread of its own and holds a bounded number of clips; without
overlap they take turns. Nothing here prints.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from vla2cli.asking import Asking, Dialogue, Failed, Ready
from vla2cli.cache import Encoded, TokenCache, encoder_of, entry_key
from vla2cli.config import GenerationSettings
from vla2cli.console import Say, say_once
from vla2cli.errors import InputError, is_out_of_memory
from vla2cli.failures import in_parts
from vla2cli.flow import Ahead, Cores, Feed, InTurn
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
)
from vla2cli.stats import Stats

if TYPE_CHECKING:
    from vla2cli.engine import Engine, MediaTokens

# positions of a tower's input that fill the processor or the GPU
ENOUGH_POSITIONS = {"cpu": 4096, "cuda": 16384}
DEMO_FLAG = "builtin-model"
WAIT_S = 0.2  # how long a request to stop may go unnoticed while nothing is decoded

T = TypeVar("T")


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
    start: Callable[[Item], Future[T]],
    *,
    batch: int,
    lookahead: int,
    should_stop: Callable[[], bool],
) -> Iterator[list[tuple[Work, T | InputError]]]:
    """Decode ahead of the model and yield clips in batches, in the order they become ready.

    Args:
        works: what to decode.
        start: begins to decode a file.
        batch: clips that are waited for, unless there are no more.
        lookahead: clips at most that are being decoded or wait to be taken, at least `batch`.
        should_stop: asked now and then; then nothing more comes.
    """
    waiting = iter(works)
    in_flight: dict[Future[T], Work] = {}
    ready: list[tuple[Work, T | InputError]] = []
    while not should_stop():
        for work in itertools.islice(waiting, lookahead - len(in_flight) - len(ready)):
            in_flight[start(work.item)] = work
        if len(ready) >= batch or (ready and not in_flight):
            yield ready[:batch]
            del ready[:batch]
            continue
        if not in_flight:
            break
        done, _ = wait(in_flight, timeout=WAIT_S, return_when=FIRST_COMPLETED)
        for future in [future for future in in_flight if future in done]:
            clip = outcome(future)
            ready.append((in_flight.pop(future), clip))


class Job:
    """One task, one model and one way to sample, over any number of files.

    Args:
        engine: its weights are not needed before `run`.
        task: what is asked.
        sampling: what of the files is looked at and listened to.
        settings: how the model goes on.
        pool: decodes.
        ledger: what was done before; takes each record before it is yielded.
        batch: prompts that are answered, and clips at most that are encoded, together.
        overlap: whether the stages work at the same time.
        cache: of clips that were encoded before.
        stats: told what the stages do.
        say: told when there is too little memory for so many.
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
        overlap: bool = True,
        cache: TokenCache | None = None,
        stats: Stats | None = None,
        say: Say = lambda message: None,
    ) -> None:
        self.engine = engine
        self.task = task
        self.sampling = sampling
        self.settings = settings
        self.pool = pool
        self.ledger = ledger
        self.batch = batch
        self.overlap = overlap
        self.cache = cache
        self.stats = stats or Stats(pool.num_workers)
        # path -> why a file is not decoded, see `segments.cut_items`
        self.unreadable: Mapping[str, InputError] = {}
        self._cores = Cores(self._num_decoding, is_shared=overlap and engine.device.type == "cpu")
        self._say_fewer = say_once(say)
        # a batch of more positions than that is no faster
        positions = sampling.num_frames * engine.checkpoint.config.num_patches
        enough = ENOUGH_POSITIONS[engine.device.type]
        self._encode_size = max(1, min(batch, -(-enough // positions)))
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
        """Do the work; ends early when asked to stop, after the records in hand."""
        works = iter(works)
        first = next(works, None)
        if first is None:  # no weights are needed for nothing
            return
        works = itertools.chain([first], works)
        asking = self.asking()
        is_closed = threading.Event()

        def should_end() -> bool:
            return should_stop() or is_closed.is_set()

        self.engine.load_weights()  # before two stages would do so at once
        self.stats.start(self.pool.worker_pids())
        with closing(self._stage("encode", self._encode(works, should_end))) as clips:
            talks = self._stage("ask", asking.run(clips, should_stop, is_closed.is_set))
            with closing(talks):
                try:
                    for talk in talks:
                        for record in self._records(talk):
                            self.write(record)
                            yield record
                finally:
                    is_closed.set()
                    self.stats.stop()

    def asking(self) -> Asking:
        """Return the stage in which the language model works."""
        return Asking(
            self.engine,
            self.settings,
            self.task,
            self.sampling,
            num_rows=self.batch,
            cores=self._cores,
            stats=self.stats,
        )

    def _stage(self, name: str, items: Iterator[T]) -> Feed[T]:
        return Ahead(items, self.batch, name) if self.overlap else InTurn(items)

    def write(self, record: Record) -> None:
        """Append a record to the ledger, where there is one."""
        if self.ledger is not None:
            self.ledger.append(record)

    def clips(
        self, works: Iterable[Work], *, should_stop: Callable[[], bool]
    ) -> Iterator[list[tuple[Work, Clip | Encoded | InputError]]]:
        """Yield the works in batches, each with its clip or with what is wrong with its file.

        A clip that is in the cache comes as it was encoded.
        """
        lookahead = self.batch
        if self.overlap:  # a batch that waits, one in the making, and no worker is idle meanwhile
            lookahead = 2 * self._encode_size + 2 * self.pool.num_workers
        batches = decode_ahead(
            works,
            self._start,
            batch=self._encode_size,
            lookahead=lookahead,
            should_stop=should_stop,
        )
        before_s = self.pool.busy_s
        for outcomes in batches:
            self.stats.busy_s["decode"] = self.pool.busy_s - before_s
            self.stats.counts["decoded"] += sum(isinstance(found, Clip) for _, found in outcomes)
            yield outcomes

    def _num_decoding(self) -> int:
        """Tell how many workers decode on average: those of a moment may be done in the next."""
        return round(self.stats.busy_s["decode"] / self.stats.elapsed_s)

    def _start(self, item: Item) -> Future[Clip | Encoded]:
        request = self._request(item)
        if (error := self.unreadable.get(item.path)) is not None:

            def refuse(state: FileState) -> Encoded | None:
                error.state = state
                raise error

            return self.pool.submit(request, refuse)
        cache = self.cache
        if cache is None:
            return self.pool.submit(request)
        encoder = self._encoder

        def recall(state: FileState) -> Encoded | None:
            return cache.get(entry_key(state.sha256, request, encoder), state)

        return self.pool.submit(request, recall)

    def _request(self, item: Item) -> ClipRequest:
        return self.sampling.request(item, self.engine.geometry, self.engine.sound_window)

    @cached_property
    def _encoder(self) -> dict[str, Any]:
        return encoder_of(self.engine)

    def _encode(
        self, works: Iterable[Work], should_stop: Callable[[], bool]
    ) -> Iterator[Ready | Failed]:
        """Turn files into tokens, one batch of clips after the other."""
        for outcomes in self.clips(works, should_stop=should_stop):
            clips: list[tuple[Work, Clip]] = []
            for work, found in outcomes:
                if isinstance(found, InputError):
                    yield Failed(work, found, found.state)
                elif isinstance(found, Encoded):
                    self.stats.counts["recalled"] += 1
                    yield Ready(work, found, 0.0)
                else:
                    clips.append((work, found))
            while clips:
                some = clips[: self._encode_size]  # fewer since memory did not suffice
                del clips[: len(some)]
                yield from self.encode_clips(some)

    def encode_clips(self, clips: Sequence[tuple[Work, Clip]]) -> Iterator[Ready | Failed]:
        """Turn one batch of clips into tokens, and keep them where there is a cache."""
        started = time.perf_counter()
        with self._cores.use(), self.stats.working("tower"):
            encoded = in_parts(self._encode_some, [clip for _, clip in clips], "encode")
        encode_s = (time.perf_counter() - started) / len(clips)
        self.stats.counts["encoded"] += len(clips)
        for (work, clip), media in zip(clips, encoded, strict=True):
            if isinstance(media, InputError):
                yield Failed(work, media, clip.state)
                continue
            ready = Encoded(clip.stripped(), media)
            if self.cache is not None and clip.is_steady:
                key = entry_key(clip.state.sha256, self._request(work.item), self._encoder)
                self.cache.put(key, ready)
            yield Ready(work, ready, encode_s)

    def _encode_some(self, clips: list[Clip]) -> list[MediaTokens]:
        try:
            return self.engine.encode(clips)
        except Exception as error:
            if is_out_of_memory(error) and 1 < len(clips) <= self._encode_size:
                self._encode_size = len(clips) // 2
                self._say_fewer(
                    f"out of memory: encoding {self._encode_size} clips at a time, or fewer"
                )
            raise

    def _records(self, talk: Dialogue | Failed) -> Iterator[Record]:
        """Make the records of a conversation that is over: nobody finds half of one."""
        if isinstance(talk, Failed):
            yield from self.failures(talk.work, talk.error, talk.state)
            return
        for turn in range(len(talk.questions)):
            if turn < len(talk.answers):
                yield self._record(talk, turn)
            else:
                assert talk.failure is not None, f"turn {turn} was not asked"
                item, state = talk.about.work.item, talk.about.encoded.clip.state
                fields = self.fields(item, talk.questions, turn, state)
                yield make_record(**fields, error=error_field(talk.failure))

    def failures(self, work: Work, error: InputError, state: FileState | None) -> Iterator[Record]:
        """Make an error record for each turn of a work; `state` is of the file that failed."""
        for conversation in work.conversations:
            for turn in range(len(conversation)):
                common = self.fields(work.item, conversation, turn, state)
                yield make_record(**common, error=error_field(error))

    def _record(self, talk: Dialogue, turn: int) -> Record:
        clip, answer = talk.about.encoded.clip, talk.answers[turn]
        common = self.fields(talk.about.work.item, talk.questions, turn, clip.state)
        common |= clip_fields(clip)
        if turn:
            common["history"] = history_field(talk.history(turn))
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
                "encode": round(talk.about.encode_s, 6),
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
