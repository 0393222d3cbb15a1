"""Rows of ids and the tokens of their media -> what the language model reads, as one batch.

A packed row holds several conversations behind one medium. Each sees the shared tokens and itself;
its positions go on from theirs, and so its first token is predicted by the last of them. It learns
what it would learn alone.

Source: upstream VideoLLaMA2@c0bb03a, model/videollama2_arch.py,
`prepare_inputs_labels_for_multimodal`; there the padding of the ids is spliced too, which is
masked and only makes rows longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.train.conversation import IGNORED

_PADDING = -1  # the segment, and the predictor, of what is no token


@dataclass(frozen=True)
class Spliced:
    """A batch for the language model; L counts the tokens of media."""

    inputs_embeds: Tensor  # (B, L, D), zeros for padding
    attention_mask: Tensor  # (B, L) bool
    labels: Tensor  # (B, L)
    position_ids: Tensor  # (B, L)
    predictors: Tensor  # (B, L): whose output predicts the token here; -1 for none
    segments: Tensor | None  # (B, L), -1 for padding; None where nothing is packed

    @property
    def learned(self) -> tuple[Tensor, Tensor]:
        """Row and position of each token that is learned."""
        row, position = ((self.labels != IGNORED) & (self.predictors >= 0)).nonzero(as_tuple=True)
        return row, position


def splice_rows(
    model: VideoLLaMA2,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    media_tokens: Sequence[Tensor | None],
    segments: Tensor | None,
) -> Spliced:
    """Put each row's media where its placeholder stands, and pad on the right.

    Args:
        model: whose embeddings are used.
        input_ids: (B, L0) with one negative id at most in each row.
        attention_mask: (B, L0) bool, False on the right.
        labels: (B, L0).
        media_tokens: (num_tokens, D) of each row; None for a row without a placeholder.
        segments: (B, L0) of packed rows, see `Collator`.

    Raises:
        ValueError: a row has a placeholder and no media, or the other way round.
    """
    embeds, row_labels, row_segments = [], [], []
    lengths = attention_mask.sum(1).tolist()
    for i, (ids, tokens) in enumerate(zip(input_ids.tolist(), media_tokens, strict=True)):
        ids = ids[: lengths[i]]
        embeds.append(model.splice(ids, [] if tokens is None else [tokens]))
        place = next((j for j, token in enumerate(ids) if token < 0), len(ids))
        num_tokens = 0 if tokens is None else len(tokens)
        row_labels.append(_widen(labels[i, : len(ids)], place, num_tokens, IGNORED))
        own = torch.zeros_like(labels[i]) if segments is None else segments[i]
        row_segments.append(_widen(own[: len(ids)], place, num_tokens, 0))
    orders = [_order(row) for row in row_segments]
    all_segments = pad_sequence(row_segments, batch_first=True, padding_value=_PADDING)
    return Spliced(
        pad_sequence(embeds, batch_first=True),
        all_segments != _PADDING,
        pad_sequence(row_labels, batch_first=True, padding_value=IGNORED),
        pad_sequence([positions for positions, _ in orders], batch_first=True),
        pad_sequence([who for _, who in orders], batch_first=True, padding_value=_PADDING),
        None if segments is None else all_segments,
    )


def attention_mask_of(spliced: Spliced, config: Any) -> Tensor:
    """Say what each token sees, as transformers' decoders take it.

    Args:
        spliced: the batch.
        config: the language model's.

    Returns:
        The padding's (B, L) mask, to which a decoder adds that nothing sees what follows; for
        packed rows (B, 1, L, L) in the embeddings' dtype, 0 for what is seen and minus infinity.

    Raises:
        ValueError: the language model's attention takes no mask for packed rows.
    """
    if spliced.segments is None:
        return spliced.attention_mask
    length = spliced.segments.shape[1]
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"packed rows need sdpa or eager attention, not '{config._attn_implementation}'"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length:
        raise ValueError(f"packed rows of {length} tokens pass the sliding window of {window}")
    query, key = spliced.segments[:, :, None], spliced.segments[:, None, :]
    # a token of the padding sees its like: with nothing to see, the softmax would be no number
    is_seen = torch.ones_like(key == query).tril() & ((key == 0) | (key == query))
    mask = torch.zeros_like(is_seen, dtype=spliced.inputs_embeds.dtype)
    return mask.masked_fill_(~is_seen, float("-inf"))[:, None]


def _widen(values: Tensor, place: int, num_tokens: int, fill: int) -> Tensor:
    """Let `num_tokens` times `fill` stand for the value at `place`, of a row with media."""
    if place == len(values):
        return values
    return torch.cat([values[:place], values.new_full((num_tokens,), fill), values[place + 1 :]])


def _order(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Number a row's tokens, and tell for each whose output predicts it: (L,) int64 both."""
    index = torch.arange(len(segments), device=segments.device)
    num_shared = (segments == 0).sum()
    is_first = segments != torch.cat([segments[:1], segments[:-1]])
    is_first[:1] = True
    first = torch.where(is_first, index, 0).cummax(0).values
    is_own = segments > 0
    position_ids = index - first + num_shared * is_own
    return position_ids, torch.where(is_first & is_own, num_shared - 1, index - 1)
