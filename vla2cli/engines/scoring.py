"""Choose one of several answers by how likely the language model finds each; nothing is drawn.

Every prompt is read once. Its options are then put behind it one after the other, each on a copy of
what the model remembers of the prompt, all rows of the batch together.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from vla2cli.engines.eager import Generation, Prefilled, forward, prefill

Ids = Sequence[int]


@dataclass(frozen=True)
class Scores:
    """What the model makes of the options behind one prompt."""

    logprobs: tuple[float, ...]  # of each option: the sum over its tokens
    first_logits: Tensor  # (V,) float32 at the last position of the prompt
    prefill_s: float  # this row's share of the batch's time
    score_s: float  # the same


@dataclass(frozen=True)
class Choice:
    """Which of the options it is; no number of them is known where the model's are not finite."""

    text: str | None
    probability: float | None  # among the options alone
    all: dict[str, float | None]  # option -> probability


@torch.inference_mode()
def score(
    model: PreTrainedModel, inputs_embeds: Sequence[Tensor], options: Sequence[Sequence[Ids]]
) -> list[Scores]:
    """Take the log-probability of every option of a batch of prompts.

    Args:
        model: a causal language model of transformers.
        inputs_embeds: (L, D) each, of any lengths.
        options: for each prompt its options, any number of them; of each the ids with the one that
            ends it, at least two.

    Returns:
        One set of scores for each prompt, in order, before any penalty and temperature.
    """
    prompts = prefill(model, inputs_embeds)
    started = time.perf_counter()
    columns = []
    for i in range(max(map(len, options))):
        # a prompt with fewer options is given its first one again, which nobody looks at
        ids = [of_row[i] if i < len(of_row) else of_row[0] for of_row in options]
        columns.append(_continue(model, prompts, ids).tolist())
    score_s = (time.perf_counter() - started) / len(options)
    return [
        Scores(
            tuple(column[row] for column in columns[: len(of_row)]),
            prompts.logits[row],
            prompts.row_s,
            score_s,
        )
        for row, of_row in enumerate(options)
    ]


def _continue(model: PreTrainedModel, prompts: Prefilled, options: Sequence[Ids]) -> Tensor:
    """Return the (B,) float32 log-probabilities of one continuation of each prompt."""
    device = prompts.mask.device
    length = max(map(len, options))
    targets = torch.zeros(len(options), length, dtype=torch.long, device=device)
    for row, ids in enumerate(options):
        targets[row, : len(ids)] = torch.tensor(ids, device=device)
    is_said = torch.tensor([[i < len(ids) for i in range(length)] for ids in options])
    # what is filled up on the right is seen by nothing that counts
    given = targets[:, :-1]
    logits = forward(
        model,
        copy.deepcopy(prompts.cache),
        torch.cat([prompts.mask, torch.ones_like(given)], dim=-1),
        prompts.next_position + torch.arange(length - 1, device=device),
        input_ids=given,
        num_logits=length - 1,
    )
    logits = torch.cat([prompts.logits[:, None], logits], dim=1)  # (B, length, V)
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None].to(logits.device))[..., 0]
    return logprobs.where(is_said.to(logits.device), 0.0).sum(-1)


def choose(options: Sequence[str], logprobs: Sequence[float]) -> Choice:
    """Turn the log-probabilities of whole answers into probabilities among them.

    Nothing is made of their lengths: with the end counted, each is the probability that the model
    says just this, so that a long option that the model would hardly say stays unlikely.
    """
    scores = torch.tensor(logprobs, dtype=torch.float64)
    if not bool(scores.isfinite().all()):
        return Choice(None, None, dict.fromkeys(options))
    probabilities = [round(p, 6) for p in scores.softmax(0).tolist()]
    best = int(scores.argmax())
    return Choice(options[best], probabilities[best], dict(zip(options, probabilities)))


def as_generation(choice: Choice, ids: Mapping[str, Sequence[int]], scores: Scores) -> Generation:
    """Describe a choice as if the model had said it."""
    chosen = tuple(ids[choice.text]) if choice.text is not None else ()
    logprobs = dict(zip(ids, scores.logprobs))
    return Generation(
        ids=chosen,
        finish_reason="stop",
        logprob_mean=logprobs[choice.text] / len(chosen) if choice.text is not None else None,
        is_finite=choice.text is not None,
        first_logits=scores.first_logits,
        prefill_s=scores.prefill_s,
        generate_s=scores.score_s,
    )
