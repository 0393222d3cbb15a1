import pytest
import torch
from torch.nn import functional

from tests.kernels.operators import CONV3D, conv3d_arguments
from vla2_kernels import relay_conv3d_weight
from vla2_kernels.conv3d import count_products, plan_tiles

CASES = {  # shape (B, T, H, W, C), width D, padding
    "one frame": ((1, 1, 3, 3, 5), 7, 1),
    "two frames": ((2, 2, 4, 4, 16), 16, 1),
    "odd": ((2, 3, 5, 7, 5), 7, 1),
    "one position": ((1, 1, 1, 1, 5), 7, 1),
    "line": ((1, 4, 1, 6, 5), 7, 1),
    "odd, not padded": ((2, 3, 5, 7, 5), 7, 0),
    "two frames, not padded": ((1, 2, 2, 2, 16), 16, 0),
    "several blocks of K and N": ((1, 2, 3, 2, 150), 140, 1),
    "several tiles": ((1, 5, 13, 8, 5), 7, 1),
    "several tiles, not padded": ((2, 6, 10, 8, 5), 7, 0),
}
GRIDS = [(1, 1, 1), (1, 3, 3), (3, 5, 7), (8, 6, 4), (2, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_conv3d_matches_its_definition(place, case, dtype):
    CONV3D.assert_matches_definition(place, conv3d_arguments(*CASES[case], dtype))


@pytest.mark.parametrize(
    "place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
@pytest.mark.parametrize("case", CASES)
def test_conv3d_matches_its_definition_in_bfloat16(place, case):
    CONV3D.assert_matches_definition(place, conv3d_arguments(*CASES[case], torch.bfloat16))


@pytest.mark.parametrize("padding", [0, 1])
def test_conv3d_definition_is_pytorchs_own_layer(padding):
    x, weight, bias, _ = conv3d_arguments((2, 3, 5, 7, 5), 7, padding, torch.float64)
    conv = torch.nn.Conv3d(5, 7, 2, stride=2, padding=padding, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(weight.permute(4, 3, 0, 1, 2))
        conv.bias.copy_(bias)
        assert relay_conv3d_weight(conv.weight).equal(weight)
        expected = functional.silu(conv(x.permute(0, 4, 1, 2, 3))).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(CONV3D.reference(x, weight, bias, padding), expected)


def test_conv3d_reads_clips_of_channels_first_memory_and_every_second_frame(place):
    x, *rest = conv3d_arguments((2, 6, 5, 4, 5), 7, 1)
    x = x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)[:, ::2]
    assert not x.is_contiguous()
    CONV3D.assert_matches_definition(place, (x, *rest))


def test_conv3d_refuses_what_does_not_fit(place):
    x, weight, bias, _ = conv3d_arguments((2, 3, 5, 7, 5), 7, 1)
    with pytest.raises(ValueError, match=r"weight has shape .*, expected \(2, 2, 2, 5, 7\)"):
        CONV3D.run(place, (x, weight[:, :, :1], bias, 1))
    with pytest.raises(ValueError, match=r"bias has shape \(6,\), expected \(7,\)"):
        CONV3D.run(place, (x, weight, bias[1:], 1))
    with pytest.raises(ValueError, match=r"weight is torch\.float16, expected torch\.float32"):
        CONV3D.run(place, (x, weight.half(), bias, 1))
    with pytest.raises(ValueError, match="padding is 2, expected 0 or 1"):
        CONV3D.run(place, (x, weight, bias, 2))
    with pytest.raises(ValueError, match=r"\(2, 1, 5, 7, 5\) has no block of 2 x 2 x 2"):
        CONV3D.run(place, (x[:, :1], weight, bias, 0))


def used_inputs(grid, padding):
    """The input positions of a clip that a block has: all, or all but an odd end."""
    positions = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    if padding:
        return positions.flatten()
    T, H, W = (n - n % 2 for n in grid)
    return positions[:T, :H, :W].flatten()


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_input_is_multiplied_once_and_no_padding_zero_is(grid, padding):
    if min(grid) + 2 * padding < 2:
        pytest.skip("no block")
    num_clips, block_m = 2, 16
    tiles = plan_tiles((num_clips, *grid), padding, block_m)
    read = []
    for rows, (count, *taps) in zip(tiles.rows, tiles.taps.tolist()):
        origin = rows[rows[:, 0] >= 0, 1]
        for tap in taps[:count]:
            step = (tap // 4 * grid[1] + tap // 2 % 2) * grid[2] + tap % 2
            read += (origin + step).tolist()
    used, size = used_inputs(grid, padding), grid[0] * grid[1] * grid[2]
    expected = torch.cat([used + clip * size for clip in range(num_clips)])
    assert sorted(read) == expected.tolist()


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_output_is_in_one_tile(grid, padding):
    if min(grid) + 2 * padding < 2:
        pytest.skip("no block")
    outputs = plan_tiles((2, *grid), padding, 16).rows[..., 0]
    T, H, W = ((n + 2 * padding) // 2 for n in grid)
    assert outputs[outputs >= 0].sort().values.tolist() == list(range(2 * T * H * W))


@pytest.mark.parametrize(
    ("shape", "padding"), [((1, 8, 24, 24), 1), ((4, 16, 24, 24), 1), ((1, 16, 27, 27), 0)]
)
def test_real_sizes_multiply_beyond_their_inputs_only_what_fills_a_tile(shape, padding):
    block_m = 64
    tiles = plan_tiles(shape, padding, block_m)
    real = ((tiles.rows[..., 0] >= 0).sum(1) * tiles.taps[:, 0]).sum()
    assert real == shape[0] * len(used_inputs(shape[1:], padding))
    # of the tiles of a group all but the last are full
    groups = tiles.taps.unique(dim=0, return_inverse=True)[1]
    is_full = (tiles.rows[..., 0] >= 0).all(1)
    assert all((~is_full[groups == group]).sum() <= 1 for group in groups.unique())
    fill = (~(tiles.rows[..., 0] >= 0)).sum(1) * tiles.taps[:, 0]
    assert count_products(tiles) == real + fill.sum()
