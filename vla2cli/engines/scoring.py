"""Choose one of several answers by how likely the language model finds each; nothing is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vla2cli.engines.base import Generation, Scores


@dataclass(frozen=True)
class Choice:
    """Which of the options it is; no number of them is known where the model's are not finite."""

    text: str | None
    probability: float | None  # among the options alone
    all: dict[str, float | None]  # option -> probability


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
    # what is known is their sum
    mean = logprobs[choice.text] / len(chosen) if choice.text is not None else 0.0
    return Generation(
        ids=chosen,
        logprobs=(mean,) * len(chosen),
        finish_reason="stop",
        is_finite=choice.text is not None,
        first_logits=scores.first_logits,
        prefill_s=scores.prefill_s,
        generate_s=scores.score_s,
    )
