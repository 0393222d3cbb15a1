"""What a language-model engine takes and gives: spliced prompts in, tokens out.

    submit   a request joins those that wait
    step     a little work; what has become ready comes back

`hf` is one such engine. Another one, that has a batch of its own, fits behind the same methods.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vla2cli.config import GenerationSettings

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Shared:
    """The beginning that a prompt has in common with others."""

    key: Hashable  # the same for all of them
    length: int  # positions


@dataclass(frozen=True)
class Request:
    """One prompt, and how to go on from it."""

    inputs_embeds: Tensor  # (L, D)
    settings: GenerationSettings
    seed: int = 0  # of this prompt's own generator; used only when sampling
    # score these instead: each with the id that ends it, so two ids at least
    options: tuple[Ids, ...] = ()
    shared: Shared | None = None  # read once for all that have it


@dataclass(frozen=True)
class Generation:
    """What the model said after one prompt."""

    ids: Ids  # with the end id, if it came
    logprobs: tuple[float, ...]  # of each id, before penalty and temperature
    finish_reason: str  # stop | length
    is_finite: bool  # False: NaN or infinity came up and the text ends there
    # (V,) float32 at the last position of the prompt; None from an engine that has none to give
    first_logits: Tensor | None
    prefill_s: float  # this prompt's share of the time
    generate_s: float  # the same

    @property
    def logprob_mean(self) -> float | None:
        """The mean of `logprobs`, None where nothing was said."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None


@dataclass(frozen=True)
class Scores:
    """What the model makes of the options behind one prompt."""

    logprobs: tuple[float, ...]  # of each option: the sum over its tokens, before any penalty
    # (V,) float32 at the last position of the prompt; None from an engine that has none to give
    first_logits: Tensor | None
    prefill_s: float  # this prompt's share of the time
    score_s: float  # the same


# an exception: this prompt failed also when it was alone
Result = Generation | Scores | Exception


class LanguageEngine(Protocol):
    """A language model that works on several prompts at a time, in no order."""

    name: str  # in a record's `engine`

    @property
    def num_open(self) -> int:
        """Requests whose result has not come back yet."""

    @property
    def num_wanted(self) -> int:
        """Requests that it could begin with now, beside those that wait."""

    def submit(self, request: Request) -> int:
        """Take a request; the number that comes back stands beside its result."""

    def step(self) -> list[tuple[int, Result]]:
        """Work for a moment; return what has become ready, which may be nothing."""

    def drop_waiting(self) -> None:
        """Forget the requests that were not begun; they have no result."""

    def release(self, key: Hashable) -> None:
        """Forget a shared beginning that no further prompt has."""


def run(engine: LanguageEngine, requests: Sequence[Request]) -> list[Generation | Scores]:
    """Work off some requests; return their results in order.

    Raises:
        Exception: what a prompt failed with.
    """
    tickets = [engine.submit(request) for request in requests]
    results: dict[int, Generation | Scores] = {}
    while engine.num_open:
        for ticket, result in engine.step():
            if isinstance(result, Exception):
                raise result
            results[ticket] = result
    return [results[ticket] for ticket in tickets]
