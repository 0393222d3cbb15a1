from functools import partial

import pytest
import torch
from torch import nn

from vla2_models.connectors import PROJECTOR_TYPES, TABLE_1
from vla2_models.stc import ConnectorDesign, STCConnector
from vla2_models.stc_fused import FusedSTC, KernelConv3d, TapConv3d, _reach, plain_linear

DESIGNS = {
    f"{design}": design
    for design in (*PROJECTOR_TYPES.values(), *(row.design for row in TABLE_1))
    if design.kernel is not None
}
TAPS = partial(TapConv3d, make_linear=plain_linear)


def connector(design, mm_hidden_size=20, hidden_size=24):
    torch.manual_seed(0)
    return STCConnector(mm_hidden_size, hidden_size, design).double().eval().requires_grad_(False)


@pytest.mark.parametrize("side", [5, 6])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 8])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_fused_connector_equals_the_plain_one(design, num_frames, side):
    if num_frames < design.min_frames:
        pytest.skip("this connector needs more frames")
    plain = connector(design)
    features = torch.randn(2, num_frames, side * side, 20, dtype=torch.float64)
    fused = FusedSTC(plain, plain_linear, TAPS)
    torch.testing.assert_close(fused(features), plain(features), atol=1e-12, rtol=0)


@pytest.mark.parametrize("padding", [0, 1])
def test_operator_for_the_3d_convolution_equals_the_plain_one(padding):
    plain = connector(ConnectorDesign((2, 2, 2), is_convolution=True, padding=padding))
    features = torch.randn(2, 5, 25, 20, dtype=torch.float64)
    fused = FusedSTC(plain, plain_linear, KernelConv3d)
    torch.testing.assert_close(fused(features), plain(features), atol=1e-5, rtol=0)


def test_fused_connector_shares_the_large_weights():
    plain = connector(PROJECTOR_TYPES["stc_connector"])
    fused = FusedSTC(plain, plain_linear, TAPS)
    assert fused.s1[1].conv1.weight.data_ptr() == plain.s1.b2.conv1.conv.weight.data_ptr()
    assert fused.readout[0].weight.data_ptr() == plain.readout[0].weight.data_ptr()


def test_fused_connector_refuses_a_clip_that_leaves_no_token():
    plain = connector(PROJECTOR_TYPES["stc_connector_v35"])
    with pytest.raises(ValueError, match="num_frames is 1, this connector needs at least 2"):
        FusedSTC(plain, plain_linear, TAPS)(torch.zeros(1, 1, 25, 20, dtype=torch.float64))


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize(("size", "padding"), [(1, 0), (1, 1), (2, 0), (2, 1), (8, 0)])
def test_tap_reaches_what_the_definition_of_a_convolution_says(n, size, padding):
    if n + 2 * padding < size:
        pytest.skip("no block")
    num_blocks = len(
        nn.functional.conv1d(
            torch.zeros(1, 1, n), torch.zeros(1, 1, size), stride=size, padding=padding
        )[0, 0]
    )
    for offset in range(size):
        blocks, positions = torch.arange(num_blocks), torch.arange(n)
        of_x, of_y = _reach(n, size, padding, offset)
        pairs = list(zip(positions[of_x].tolist(), blocks[of_y].tolist(), strict=True))
        wanted = [(i * size - padding + offset, i) for i in range(num_blocks)]
        assert pairs == [(at, i) for at, i in wanted if 0 <= at < n]


@pytest.mark.parametrize(("num_frames", "side"), [(1, 3), (5, 6), (8, 6)])
def test_no_zero_of_the_padding_is_multiplied(num_frames, side):
    rows = []

    class Counting(nn.Module):
        def __init__(self, weight, bias):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            rows.append(x[..., 0].numel())
            return x @ self.weight.T

    conv = nn.Conv3d(4, 4, 2, stride=2, padding=1)
    TapConv3d(conv, Counting)(torch.ones(1, num_frames, side, side, 4))
    # a position is left out only at the end of an axis that its blocks do not fill
    used = [min(n, 2 * ((n + 2) // 2) - 1) for n in (num_frames, side, side)]
    assert sum(rows) == used[0] * used[1] * used[2]
