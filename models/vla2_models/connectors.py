"""The connectors of VideoLLaMA 2: the public projector types and the designs of Table 1.

Each is one line of data, a `ConnectorDesign`; `build_connector` makes the network of it.

Source: VideoLLaMA 2, arXiv:2406.07476, Table 1; upstream VideoLLaMA2@c0bb03a, model/projector.py,
`build_vision_projector`, and model/videollama2_arch.py, `temporal_aggregator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from .stc import STC_CONNECTOR, ConnectorDesign, STCConnector, build_readout

_conv = partial(ConnectorDesign, is_convolution=True)
_pool = partial(ConnectorDesign, is_convolution=False)

# `mm_projector_type` in config.json; upstream builds mlp3x_gelu and more as well, but runs none
PROJECTOR_TYPES: Mapping[str, ConnectorDesign] = {
    "stc_connector": STC_CONNECTOR,
    # the same names and shapes of tensors as stc_connector: only this word tells them apart
    "stc_connector_v35": _conv((2, 2, 2)),
    "stp_connector": _pool((2, 2, 2)),
    # padded in time too, where a block is one frame: the first and last slot see no frame at all
    "spatial_conv": _conv((1, 2, 2), padding=1, has_stages=False),
    "spatial_pool": _pool((1, 2, 2), has_stages=False),
    "linear": _pool(None, has_stages=False, readout_depth=1),
    "mlp2x_gelu": _pool(None, has_stages=False),
}


@dataclass(frozen=True)
class Table1Row:
    """One design that the paper compares."""

    label: str  # the paper's column "Downsample"; its column "RegStage" is `design.has_stages`
    design: ConnectorDesign
    tokens: int  # as the paper states them, for 8 frames of 24 x 24 patches


# in the paper's order; the last is the one it chooses
TABLE_1 = (
    Table1Row("2D Pool (1, 2, 2)", _pool((1, 2, 2), has_stages=False), 1152),
    Table1Row("2D Conv (1, 2, 2)", _conv((1, 2, 2), has_stages=False), 1152),
    Table1Row("3D Pool (8, 1, 1)", _pool((8, 1, 1), has_stages=False), 576),
    Table1Row("3D Pool (2, 2, 2)", _pool((2, 2, 2), has_stages=False), 576),
    Table1Row("3D Conv (2, 2, 2)", _conv((2, 2, 2), has_stages=False), 576),
    Table1Row("2D Pool (1, 2, 2)", _pool((1, 2, 2)), 1152),
    Table1Row("2D Conv (1, 2, 2)", _conv((1, 2, 2)), 1152),
    Table1Row("3D Pool (2, 2, 2)", _pool((2, 2, 2)), 576),
    Table1Row("3D Conv (2, 2, 2)", _conv((2, 2, 2)), 576),
)


# the mean is inside a linear layer and inside a sequence, not before them, because the public
# checkpoints have `weight` for the one and `0.weight` for the other
class MeanLinear(nn.Linear):
    """Average over the frames, then one linear layer."""

    def forward(self, features: Tensor) -> Tensor:
        """Turn (B, T, N, C) patch features into (B, N, D) tokens."""
        return super().forward(features.mean(1))


class MeanMLP(nn.Sequential):
    """Average over the frames, then the given layers."""

    def forward(self, features: Tensor) -> Tensor:
        """Turn (B, T, N, C) patch features into (B, N, D) tokens."""
        x = features.mean(1)
        tokens: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # torch has no types here
        return tokens


def build_connector(design: ConnectorDesign, mm_hidden_size: int, hidden_size: int) -> nn.Module:
    """Build the network of a design, with random weights.

    Args:
        design: one of `PROJECTOR_TYPES`, of `TABLE_1`, or your own.
        mm_hidden_size: width C of the vision tower.
        hidden_size: width D of the language model.

    Returns:
        A module from (B, T, N, C) patch features to (B, `design.count_tokens(T, N)`, D) tokens.
    """
    if design.kernel is not None:
        return STCConnector(mm_hidden_size, hidden_size, design)
    if design.readout_depth == 1:
        return MeanLinear(mm_hidden_size, hidden_size)
    return MeanMLP(*build_readout(mm_hidden_size, hidden_size, design.readout_depth))
