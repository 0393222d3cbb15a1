"""The language model in a plain loop: left-padded, masked batches on transformers' own layers.

Each row ends by itself, is sampled from a generator of its own and keeps the log-probability of
what it said, so that a row's text depends on nothing but its own prompt and seed.

Source of the order (repetition penalty, temperature, top-k, top-p): transformers 4.40.0,
generation/utils.py, as upstream VideoLLaMA2@c0bb03a calls it. The penalty sees generated tokens
only, because the prompt is given as embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_utils import PreTrainedModel

from vla2cli.config import GenerationSettings

NAME = "torch"  # in a record's `engine`


@dataclass(frozen=True)
class Generation:
    """What the model said after one prompt."""

    ids: tuple[int, ...]  # with the end id, if it came
    finish_reason: str  # stop | length
    logprob_mean: float | None  # mean log-probability of `ids` before penalty and temperature
    is_finite: bool  # False: NaN or infinity came up and the text ends there
    first_logits: Tensor  # (V,) float32 at the last position of the prompt
    prefill_s: float  # this row's share of the batch's time
    generate_s: float  # the same


@dataclass(frozen=True)
class Prefilled:
    """A batch of prompts that the model has read."""

    cache: DynamicCache
    mask: Tensor  # (B, L) int64, 0 where there is padding
    next_position: Tensor  # (B, 1) int64
    logits: Tensor  # (B, V) float32 at the last position of each prompt
    row_s: float  # one row's share of the time it took


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    inputs_embeds: Sequence[Tensor],
    settings: GenerationSettings,
    seeds: Sequence[int],
) -> list[Generation]:
    """Go on from a batch of prompts.

    Args:
        model: a causal language model of transformers.
        inputs_embeds: (L, D) each, of any lengths.
        settings: the same for all rows.
        seeds: one for each row; used only when sampling.

    Returns:
        One generation for each row, in order.
    """
    prompts = prefill(model, inputs_embeds)
    started = time.perf_counter()
    rows = _Rows(len(inputs_embeds), settings, seeds, prompts.logits.device)
    logits, mask, next_position = prompts.logits, prompts.mask, prompts.next_position
    while rows.take(logits):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        ids = rows.ids[:, -1:]
        logits = forward(model, prompts.cache, mask, next_position, input_ids=ids)[:, -1]
        next_position = next_position + 1
    return rows.results(
        prompts.logits,
        prefill_s=prompts.row_s,
        generate_s=(time.perf_counter() - started) / len(inputs_embeds),
    )


def prefill(model: PreTrainedModel, inputs_embeds: Sequence[Tensor]) -> Prefilled:
    """Let the model read a batch of prompts, (L, D) each, of any lengths."""
    started = time.perf_counter()
    embeds, mask = left_pad(inputs_embeds)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = forward(model, cache, mask, positions, inputs_embeds=embeds)[:, -1]
    if logits.is_cuda:  # it has only been told what to do; the first token waits for it anyway
        torch.cuda.synchronize(logits.device)
    row_s = (time.perf_counter() - started) / len(inputs_embeds)
    return Prefilled(cache, mask, positions[:, -1:] + 1, logits, row_s)


def left_pad(inputs_embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack prompts with zeros on the left.

    Returns:
        (B, L, D) embeddings and a (B, L) int64 mask, 0 where there is padding.
    """
    longest = max(len(row) for row in inputs_embeds)
    first = inputs_embeds[0]
    embeds = first.new_zeros(len(inputs_embeds), longest, first.shape[-1])
    mask = torch.zeros(len(inputs_embeds), longest, dtype=torch.long, device=first.device)
    for i, row in enumerate(inputs_embeds):
        embeds[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return embeds, mask


def forward(
    model: PreTrainedModel,
    cache: DynamicCache,
    mask: Tensor,
    positions: Tensor,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    num_logits: int = 1,
) -> Tensor:
    """Run the model on new positions; return (B, num_logits, V) float32 logits of the last ones."""
    output = model(
        input_ids,
        mask,
        positions,
        cache,  # transformers 5.24 has another name for it
        inputs_embeds,
        use_cache=True,
        logits_to_keep=num_logits,
    )
    logits: Tensor = output.logits.float()
    return logits


class _Rows:
    """The rows of a batch while they grow."""

    def __init__(
        self,
        num_rows: int,
        settings: GenerationSettings,
        seeds: Sequence[int],
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.ids = torch.empty(num_rows, 0, dtype=torch.long, device=device)
        self.lengths = [0] * num_rows
        self.logprobs = [0.0] * num_rows
        self.reasons: list[str | None] = [None] * num_rows
        self.finite = [True] * num_rows
        self.processors = _processors(settings)
        # on the CPU, so that the same seed draws the same numbers on every device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def take(self, logits: Tensor) -> bool:
        """Add a token to each row that goes on; return whether any goes on after it."""
        finite = logits.isfinite().all(-1)
        chosen = self._choose(torch.where(finite[:, None], logits, 0.0))
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        self.ids = torch.cat([self.ids, chosen[:, None]], dim=-1)
        columns = zip(chosen.tolist(), logprobs.tolist(), finite.tolist(), strict=True)
        for row, (token, logprob, is_finite) in enumerate(columns):
            if self.reasons[row] is None:
                self._extend(row, token, logprob, is_finite)
        return None in self.reasons

    def _extend(self, row: int, token: int, logprob: float, is_finite: bool) -> None:
        if not is_finite:
            self.finite[row] = False
            self.reasons[row] = "stop"
            return
        self.lengths[row] += 1
        self.logprobs[row] += logprob
        if token in self.settings.eos_token_ids:
            self.reasons[row] = "stop"
        elif self.lengths[row] == self.settings.max_new_tokens:
            self.reasons[row] = "length"

    def _choose(self, logits: Tensor) -> Tensor:
        scores = self.processors(cast("LongTensor", self.ids), cast("FloatTensor", logits))
        if not self.settings.is_sampled:
            return scores.argmax(-1)
        # inverse of the cumulative distribution, in the vocabulary's order: a difference in the
        # last bits between batch sizes hardly ever moves the draw
        cumulative = scores.double().softmax(-1).cumsum(-1)
        draws = [torch.rand((), generator=g, dtype=torch.float64) for g in self.generators]
        targets = torch.stack(draws).to(scores.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, targets, right=True)[:, 0]

    def results(
        self, first_logits: Tensor, *, prefill_s: float, generate_s: float
    ) -> list[Generation]:
        """Close all rows."""
        generations = []
        for row, reason in enumerate(self.reasons):
            length = self.lengths[row]
            assert reason is not None, f"row {row} is still open after {length} tokens"
            generations.append(
                Generation(
                    ids=tuple(self.ids[row, :length].tolist()),
                    finish_reason=reason,
                    logprob_mean=self.logprobs[row] / length if length else None,
                    is_finite=self.finite[row],
                    first_logits=first_logits[row],
                    prefill_s=prefill_s,
                    generate_s=generate_s,
                )
            )
        return generations


def _processors(settings: GenerationSettings) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.is_sampled:
        processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
    return processors
