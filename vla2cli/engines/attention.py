"""Attention of one new position of each row, as two products over the keys and values it has.

PyTorch's own function takes no mask where it is fast on a GPU, and where it takes one, it goes
through all columns of a head one after the other. The heads that share keys and values are rows of
one product here, so that these are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import PreTrainedModel

NAME = "vla2_one_position"


def attend_to_slots(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' layers ask for; more than one new position is left to PyTorch.

    Args:
        module: the layer.
        query: (B, H, T, d).
        key: (B, G, S, d), G a divisor of H.
        value: (B, G, S, d).
        attention_mask: (B, 1, T, S) bool, what each position sees.
        scaling: of the scores.
        more: for PyTorch.

    Returns:
        (B, T, H, d); the second value stands for weights.
    """
    if query.shape[2] > 1 or attention_mask is None or attention_mask.dtype != torch.bool:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
    grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])  # (B, G, H / G, d)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (grouped * scale) @ key.transpose(-1, -2)  # (B, G, H / G, S)
    weights = scores.float().masked_fill(~attention_mask, -torch.inf).softmax(-1)
    attended = weights.to(value.dtype) @ value  # (B, G, H / G, d)
    return attended.reshape(len(query), 1, -1, query.shape[-1]), None


AttentionInterface.register(NAME, attend_to_slots)


@contextmanager
def attending_to_slots(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's layers attend so for a while; whoever calls it makes its masks beforehand."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
