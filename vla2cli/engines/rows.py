"""One text while it grows, and how its next token is chosen.

A row draws from a generator of its own and ends by itself, so that its text depends on nothing but
its prompt and its seed.

Source of the order (repetition penalty, temperature, top-k, top-p): transformers 4.40.0,
generation/utils.py, as upstream VideoLLaMA2@c0bb03a calls it. The penalty sees generated tokens
only, because the prompt is given as embeddings.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vla2cli.config import GenerationSettings
from vla2cli.engines.base import Generation, Request


@dataclass(eq=False)
class Row:
    """One request that is being worked on."""

    ticket: int
    request: Request
    num_failed: int = 0  # times that it was begun in vain
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str | None = None  # stop or length, when it is over
    is_finite: bool = True
    first_logits: Tensor | None = None
    prefill_s: float = 0.0
    generate_s: float = 0.0

    def __post_init__(self) -> None:
        """Begin the row's own draws."""
        # on the CPU, so that the same seed draws the same numbers on every device
        self.generator = torch.Generator().manual_seed(self.request.seed)

    @property
    def num_prompt(self) -> int:
        """Positions of the prompt."""
        return len(self.request.inputs_embeds)

    @property
    def num_read(self) -> int:
        """Positions that the model has read: all but the last token."""
        return self.num_prompt + len(self.ids) - 1

    @property
    def is_weighed(self) -> bool:
        """Whether options are scored, instead of a text said."""
        return bool(self.request.options)

    @property
    def shared_key(self) -> Hashable:
        """What the prompts with the same beginning have in common; None for one without."""
        return self.request.shared.key if self.request.shared else None

    @property
    def logits(self) -> Tensor:
        """The (V,) float32 logits at the last position of the prompt."""
        assert self.first_logits is not None, "the prompt was not read"
        return self.first_logits

    @property
    def settings(self) -> GenerationSettings:
        """How the text goes on."""
        return self.request.settings

    def result(self) -> Generation:
        """Close the row."""
        assert self.reason is not None, f"a row is still open after {len(self.ids)} tokens"
        return Generation(
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.reason,
            is_finite=self.is_finite,
            first_logits=self.logits,
            prefill_s=self.prefill_s,
            generate_s=self.generate_s,
        )

    def extend(self, token: int, logprob: float, is_finite: bool) -> None:
        """Take a token, or end where the numbers do."""
        if not is_finite:
            self.is_finite = False
            self.reason = "stop"
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.settings.eos_token_ids:
            self.reason = "stop"
        elif len(self.ids) == self.settings.max_new_tokens:
            self.reason = "length"


def take_tokens(rows: Sequence[Row], logits: Tensor) -> None:
    """Give each row its next token.

    Args:
        rows: open ones.
        logits: (B, V) float32, at the last position of each.
    """
    finite = logits.isfinite().all(-1)
    chosen = _choose(rows, torch.where(finite[:, None], logits, 0.0))
    logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    columns = zip(rows, chosen.tolist(), logprobs.tolist(), finite.tolist(), strict=True)
    for row, token, logprob, is_finite in columns:
        row.extend(token, logprob, is_finite)


def _choose(rows: Sequence[Row], logits: Tensor) -> Tensor:
    # how long a text may become has no part in its next token
    kinds = [replace(row.settings, max_new_tokens=1, eos_token_ids=(), seed=0) for row in rows]
    if len(set(kinds)) == 1:
        return _choose_alike(rows, logits)
    chosen = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    for kind in set(kinds):
        places = [i for i, of_row in enumerate(kinds) if of_row == kind]
        chosen[places] = _choose_alike([rows[i] for i in places], logits[places])
    return chosen


def _choose_alike(rows: Sequence[Row], logits: Tensor) -> Tensor:
    settings = rows[0].settings
    processors = _processors(
        settings.repetition_penalty, settings.temperature, settings.top_k, settings.top_p
    )
    scores = processors(_said(rows, logits.device), cast("FloatTensor", logits))
    if not settings.is_sampled:
        return scores.argmax(-1)
    # inverse of the cumulative distribution, in the vocabulary's order: a difference in the
    # last bits between batch sizes hardly ever moves the draw
    cumulative = scores.double().softmax(-1).cumsum(-1)
    draws = [torch.rand((), generator=row.generator, dtype=torch.float64) for row in rows]
    targets = torch.stack(draws).to(scores.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _said(rows: Sequence[Row], device: torch.device) -> LongTensor:
    """Return what each row has said, (B, T); one that is shorter says its first token again."""
    if rows[0].settings.repetition_penalty == 1.0:  # nobody asks
        return cast("LongTensor", torch.empty(len(rows), 0, dtype=torch.long, device=device))
    longest = max(len(row.ids) for row in rows)
    padded = [row.ids + row.ids[:1] * (longest - len(row.ids)) for row in rows]
    return cast("LongTensor", torch.tensor(padded, dtype=torch.long, device=device))


@lru_cache
def _processors(
    repetition_penalty: float, temperature: float, top_k: int, top_p: float
) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(temperature))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
    return processors
