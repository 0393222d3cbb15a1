"""Random weights that keep the size of what passes through them: neither overflow nor denormals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

GAINS = ("weight_g", "grep_a")  # of the audio tower; 1, as the weights of a norm

# numbers drawn once and laid into the weights over and over: drawing 800 million takes half a
# minute. Prime, so that the rows of no matrix are copies of each other
NUM_DRAWN = 4_194_301


def initial_weight(name: str, meta: Tensor, draw: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Make one tensor of a network: norms pass through, biases are 0, the rest is random.

    Args:
        name: in the network's state.
        meta: of the wanted shape.
        draw: returns normal numbers of a tensor's shape, times the factor.
    """
    if meta.ndim == 1 or name.endswith(GAINS):
        return torch.full(meta.shape, float(name.endswith(("weight", *GAINS))))
    return draw(meta, _scale(name, meta))


def _scale(name: str, weight: Tensor) -> float:
    if name.endswith(("embed_tokens.weight", "position_embedding.weight")):
        return 1.0
    # larger at the ends: for tokens that tell clips and sounds apart, and for likely words
    ends = ("lm_head.weight", "readout.2.weight", "mm_projector_a.2.weight")
    gain = 3.0 if name.endswith(ends) else 1.0
    # the first axis of experts counts them, the second is what they put out
    fan_in = weight.shape[2:] if ".experts." in name else weight.shape[1:]
    return gain / math.sqrt(math.prod(fan_in))


def random_state(
    state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Make weights of full size in seconds, for networks whose speed is all that matters.

    Args:
        state: by name, tensors of the wanted shapes, on the meta device.
        dtype: of the weights.
        device: where they go.
        seed: of the numbers drawn, which repeat after `NUM_DRAWN`.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(NUM_DRAWN, generator=generator).to(device)

    def lay(meta: Tensor, scale: float) -> Tensor:
        weight = torch.empty(meta.shape, dtype=dtype, device=device)
        scaled = (drawn * scale).to(dtype)
        for piece in torch.split(weight.view(-1), NUM_DRAWN):
            piece.copy_(scaled[: len(piece)])
        return weight

    return {name: initial_weight(name, meta, lay).to(device, dtype) for name, meta in state.items()}
