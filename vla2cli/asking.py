"""Conversations about clips: the stage in which the language model works.

Clips come in as they are encoded, conversations go out as they end. The engine is given as many
prompts as it wants; a question that follows an answer goes first, so that few are half had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vla2cli.config import GenerationSettings
from vla2cli.errors import InputError
from vla2cli.failures import as_input_error
from vla2cli.flow import Cores, Feed
from vla2cli.media.records import FileState
from vla2cli.plan import Conversation, Sampling, Task, Work, key_fields
from vla2cli.record import row_seed
from vla2cli.stats import Stats

if TYPE_CHECKING:
    from vla2cli.cache import Encoded
    from vla2cli.engine import Answer, Asked, Engine
    from vla2cli.engines.base import LanguageEngine, Result
    from vla2cli.prompt import Turn


@dataclass(frozen=True)
class Failed:
    """A file of which nothing can be asked."""

    work: Work
    error: InputError
    state: FileState | None


@dataclass(eq=False)
class Ready:
    """A clip of which everything can be asked."""

    work: Work
    encoded: Encoded
    encode_s: float
    num_open: int = 0  # conversations that are not over

    def dialogues(self) -> list[Dialogue]:
        """Begin all conversations about it."""
        self.num_open = len(self.work.conversations)
        return [Dialogue(self, questions) for questions in self.work.conversations]


@dataclass(eq=False)
class Dialogue:
    """One conversation about one clip, while it is had."""

    about: Ready
    questions: Conversation
    answers: list[Answer] = field(default_factory=list)
    failure: InputError | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is something left to ask."""
        return self.failure is None and len(self.answers) < len(self.questions)

    def history(self, turn: int) -> tuple[Turn, ...]:
        """Return what was said before a turn."""
        from vla2cli.prompt import Turn

        pairs = zip(self.questions[:turn], self.answers)
        return tuple(Turn(question, answer.text) for question, answer in pairs)


class Asking:
    """Has the conversations of a task.

    Args:
        engine: the model.
        settings: how it goes on.
        task: what is asked.
        sampling: what of the files was looked at and listened to.
        num_rows: prompts that are answered together.
        cores: of the processor.
        stats: told how long it works.
    """

    def __init__(
        self,
        engine: Engine,
        settings: GenerationSettings,
        task: Task,
        sampling: Sampling,
        *,
        num_rows: int,
        cores: Cores,
        stats: Stats,
    ) -> None:
        self.engine, self.settings, self.task, self.sampling = engine, settings, task, sampling
        self.num_rows, self.cores, self.stats = num_rows, cores, stats
        self._waiting: deque[Dialogue] = deque()
        self._asked: dict[int, tuple[Dialogue, Asked]] = {}

    def run(
        self,
        clips: Feed[Ready | Failed],
        should_stop: Callable[[], bool],
        is_closed: Callable[[], bool] = lambda: False,
    ) -> Iterator[Dialogue | Failed]:
        """Ask about clips until there are no more.

        Args:
            clips: the stage before.
            should_stop: then what is being answered is finished, and nothing is begun.
            is_closed: then nobody is interested any more.

        Yields:
            Conversations that are over, in no order, and files of which nothing could be asked.
        """
        language = self.engine.language_engine(self.num_rows)
        while not is_closed():
            if should_stop():  # a conversation that is not over is had again
                self._waiting.clear()
                language.drop_waiting()
            else:
                yield from self._take_in(clips, language)
                while self._waiting and language.num_wanted:
                    yield from self._submit(self._waiting.popleft(), language)
            if language.num_open:
                yield from self._step(language)
            elif not self._waiting and (clips.is_over or should_stop()):
                return

    def _take_in(self, clips: Feed[Ready | Failed], language: LanguageEngine) -> Iterator[Failed]:
        while not clips.is_over and language.num_wanted > len(self._waiting):
            found = clips.take(wait=not language.num_open and not self._waiting)
            if found is None:
                return
            if isinstance(found, Failed):
                yield found
            else:
                self._waiting.extend(found.dialogues())

    def _submit(self, dialogue: Dialogue, language: LanguageEngine) -> Iterator[Dialogue]:
        try:
            with self.stats.working("language"):
                asked = self._ask(dialogue)
        except Exception as error:  # one question must not end the run
            dialogue.failure = as_input_error(error, "generate")
            yield from self._settle(dialogue, language)
            return
        self.stats.counts["prompts"] += 1
        self._asked[language.submit(asked.request)] = dialogue, asked

    def _ask(self, dialogue: Dialogue) -> Asked:
        from vla2cli.engine import Ask

        about, turn = dialogue.about, len(dialogue.answers)
        item, question = about.work.item, dialogue.questions[turn]
        key = key_fields(self.task, self.sampling, item, dialogue.questions, turn)
        ask = Ask(
            question=question,
            medium=self.sampling.medium_of(item),
            media=about.encoded.media,
            history=dialogue.history(turn),
            seed=row_seed(self.settings.seed, key),
            choices=self.task.choices_of(item, question),
        )
        is_shared = about.work.num_records > 1
        return self.engine.ask(ask, self.settings, clip=about if is_shared else None)

    def _step(self, language: LanguageEngine) -> Iterator[Dialogue]:
        try:
            with self.cores.use(), self.stats.working("language"):
                results = language.step()
        except Exception as error:
            as_input_error(error, "generate")  # names what every further call would fail with
            raise
        for ticket, result in results:
            dialogue, asked = self._asked.pop(ticket)
            self._hear(dialogue, asked, result)
            if dialogue.is_open:
                self._waiting.appendleft(dialogue)
            else:
                yield from self._settle(dialogue, language)

    def _hear(self, dialogue: Dialogue, asked: Asked, result: Result) -> None:
        if isinstance(result, Exception):
            dialogue.failure = as_input_error(result, "generate")
            return
        try:
            answer = self.engine.read(asked, result)
        except Exception as error:  # one text must not end the run
            dialogue.failure = as_input_error(error, "generate")
            return
        self.stats.counts["tokens"] += len(answer.generation.ids)
        dialogue.answers.append(answer)

    def _settle(self, dialogue: Dialogue, language: LanguageEngine) -> Iterator[Dialogue]:
        dialogue.about.num_open -= 1
        if not dialogue.about.num_open:
            language.release(dialogue.about)
        yield dialogue
