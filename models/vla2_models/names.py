"""The public checkpoints' tensor names, and where each of those tensors belongs in `VideoLLaMA2`.

Most tensors are a parameter of their own. transformers 5 keeps the experts of a Mixtral layer fused
in two parameters; the checkpoints hold three matrices for each expert:

    mlp.experts.gate_up_proj[e] = block_sparse_moe.experts.{e}.w1 above …experts.{e}.w3
    mlp.experts.down_proj[e]    = block_sparse_moe.experts.{e}.w2
    mlp.gate                    = block_sparse_moe.gate

The layers of the audio tower share one table of position biases. A checkpoint may hold it once, for
layer 0, or once for each layer:

    encoder.layers.0.self_attn.relative_attention_bias
        = encoder.layers.{i}.self_attn.relative_attention_bias
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .beats_design import BIAS_NAME

TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
CONNECTOR_PREFIX = "model.mm_projector."
AUDIO_TOWER_PREFIX = "model.audio_tower."
AUDIO_PROJECTOR_PREFIX = "model.mm_projector_a."
PEFT_PREFIX = "base_model.model."  # what peft writes before the name of a module it has wrapped

# attribute of `VideoLLaMA2` -> how the public checkpoints begin its tensors' names
PUBLIC_PREFIXES = {
    "vision_tower.": TOWER_PREFIX,
    "mm_projector.": CONNECTOR_PREFIX,
    "audio_tower.": AUDIO_TOWER_PREFIX,
    "mm_projector_a.": AUDIO_PROJECTOR_PREFIX,
    "language_model.": "",
}
GATE_UP, DOWN, ROUTER = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj", ".mlp.gate.weight"
PUBLIC_MOE = ".block_sparse_moe"


@dataclass(frozen=True)
class Place:
    """Where a public tensor belongs: a parameter of `VideoLLaMA2`, or a part of one."""

    parameter: str
    part: tuple[int, slice] | None = None  # of fused experts: which expert, which rows
    is_copy: bool = False  # of what another name has already; a checkpoint may lack it

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter or its part, as a view."""
        whole = state[self.parameter]
        return whole if self.part is None else whole[self.part]


def find_places(state: Mapping[str, Tensor]) -> dict[str, Place]:
    """Name every tensor of a `VideoLLaMA2.state_dict()` as the public checkpoints do."""
    places = dict(pair for name, tensor in state.items() for pair in _places_of(name, tensor))
    return places | dict(_copies(places))


def _places_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Place]]:
    public = public_name(name)
    if public.endswith(GATE_UP):
        experts = public.removesuffix(GATE_UP) + f"{PUBLIC_MOE}.experts"
        width = tensor.shape[1] // 2
        for e in range(len(tensor)):
            yield f"{experts}.{e}.w1.weight", Place(name, (e, slice(0, width)))
            yield f"{experts}.{e}.w3.weight", Place(name, (e, slice(width, 2 * width)))
    elif public.endswith(DOWN):
        experts = public.removesuffix(DOWN) + f"{PUBLIC_MOE}.experts"
        for e in range(len(tensor)):
            yield f"{experts}.{e}.w2.weight", Place(name, (e, slice(None)))
    elif public.endswith(ROUTER):
        yield public.removesuffix(ROUTER) + f"{PUBLIC_MOE}.gate.weight", Place(name)
    else:
        yield public, Place(name)


def _copies(places: Mapping[str, Place]) -> Iterator[tuple[str, Place]]:
    """Name the copies of the position biases that the layers of the audio tower share."""
    bias = AUDIO_TOWER_PREFIX + BIAS_NAME
    if bias.format(0) not in places:
        return
    layer = bias.partition("{}")[0]
    numbers = {int(n.removeprefix(layer).split(".")[0]) for n in places if n.startswith(layer)}
    for i in sorted(numbers - {0}):
        yield bias.format(i), replace(places[bias.format(0)], is_copy=True)


def public_name(name: str) -> str:
    """Put the public checkpoints' prefix in the place of the attribute's in `VideoLLaMA2`."""
    for prefix, public_prefix in PUBLIC_PREFIXES.items():
        if name.startswith(prefix):
            return public_prefix + name.removeprefix(prefix)
    raise ValueError(f"'{name}' belongs to no part of VideoLLaMA2")
