import pytest
import torch
from einops import rearrange

from vla2_models import stc
from vla2_models.stc import STC_CONNECTOR, ConnectorDesign, STCConnector

# spec of the public models: (T, patches a frame) -> T' x h' x w' visual tokens
TOKENS = {
    (1, 24): 169,
    (4, 24): 507,
    (8, 24): 845,
    (16, 24): 1521,
    (32, 24): 2873,
    (1, 27): 196,
    (4, 27): 588,
    (8, 27): 980,
    (16, 27): 1764,
    (32, 27): 3332,
}

UNPADDED = ConnectorDesign((2, 2, 2), is_convolution=True)


def connector(mm_hidden_size=20, hidden_size=24, design=STC_CONNECTOR):
    torch.manual_seed(0)
    return STCConnector(mm_hidden_size, hidden_size, design).eval().requires_grad_(False)


def expected_keys():
    """The names of the 113 tensors, block by block, as the public checkpoints have them."""
    affine = ["weight", "bias"]
    block = ["conv1.conv.weight", "conv2.conv.weight", "conv3.conv.weight"]
    block += [f"conv{i}.bn.{name}" for i in (1, 2, 3) for name in affine]
    block += [f"se.fc{i}.{name}" for i in (1, 2) for name in affine]
    keys = {f"s{s}.b{b}.{name}" for s in (1, 2) for b in (1, 2, 3, 4) for name in block}
    keys |= {f"s1.b1.downsample.{name}" for name in ("conv.weight", "bn.weight", "bn.bias")}
    return keys | {
        f"{layer}.{n}" for layer in ("sampler.0", "readout.0", "readout.2") for n in affine
    }


def test_keys_are_those_of_the_public_checkpoints():
    keys = set(connector().state_dict())
    assert len(keys) == 113
    assert keys == expected_keys()


def test_reduction_of_the_first_block_follows_the_towers_width():
    state = connector(mm_hidden_size=40, hidden_size=64).state_dict()
    assert state["s1.b1.se.fc1.weight"].shape == (10, 64, 1, 1)
    assert state["s1.b2.se.fc1.weight"].shape == (16, 64, 1, 1)


def test_first_block_of_equal_widths_has_no_shortcut_weights():
    keys = set(connector(mm_hidden_size=24, hidden_size=24).state_dict())
    assert keys == {key for key in expected_keys() if "downsample" not in key}


@pytest.mark.parametrize(("num_frames", "side"), TOKENS, ids=str)
def test_count_tokens_matches_the_table(num_frames, side):
    assert STC_CONNECTOR.count_tokens(num_frames, side**2) == TOKENS[num_frames, side]


@pytest.mark.parametrize(("num_frames", "side"), [(1, 24), (4, 24), (4, 27), (16, 27)], ids=str)
def test_forward_gives_the_tokens_of_the_table(num_frames, side):
    got = connector(4, 8)(torch.zeros(1, num_frames, side * side, 4))
    assert got.shape == (1, TOKENS[num_frames, side], 8)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_count_tokens_equals_forward(num_frames, side):
    got = connector()(torch.zeros(2, num_frames, side * side, 20))
    assert got.shape == (2, STC_CONNECTOR.count_tokens(num_frames, side * side), 24)


def test_patches_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="15 patches"):
        connector()(torch.zeros(1, 2, 15, 20))


@pytest.mark.parametrize(
    ("kernel", "padding", "too_few"),
    [((2, 2, 2), 0, 1), ((8, 1, 1), 0, 7), ((5, 1, 1), 1, 2), ((1, 2, 2), 1, 0)],
    ids=str,
)
def test_too_few_frames_are_refused_with_the_number_needed(kernel, padding, too_few):
    design = ConnectorDesign(kernel, is_convolution=True, padding=padding, has_stages=False)
    assert design.min_frames == too_few + 1
    assert design.count_tokens(too_few + 1, 16) > 0
    line = f"num_frames is {too_few}, this connector needs at least {too_few + 1}"
    with pytest.raises(ValueError, match=line):
        design.count_tokens(too_few, 16)
    with pytest.raises(ValueError, match=line):
        connector(design=design)(torch.zeros(1, too_few, 16, 20))


def test_grid_smaller_than_one_block_is_refused():
    with pytest.raises(ValueError, match="grid of 1 x 1, less than one block of 2 x 2"):
        UNPADDED.count_tokens(8, 1)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"kernel": (2, 2, 2), "padding": 1}, "only a convolution"),
        ({"kernel": None, "has_stages": True}, "no stages"),
    ],
    ids=["padded pool", "stages around a mean"],
)
def test_parts_that_do_not_go_together_are_refused(fields, line):
    with pytest.raises(ValueError, match=line):
        ConnectorDesign(is_convolution=False, **fields)


def test_connector_without_blocks_is_refused():
    with pytest.raises(ValueError, match="kernel is None"):
        connector(design=ConnectorDesign(None, is_convolution=False, has_stages=False))


def test_padding_is_part_of_the_result():
    # without it the weights still fit, so that only the numbers tell
    x = torch.randn(1, 8, 25, 20, generator=torch.Generator().manual_seed(1))
    model, other = connector(), connector(design=UNPADDED)
    other.load_state_dict(model.state_dict())
    padded, unpadded = model(x), other(x)
    assert padded.shape == (1, 5 * 3 * 3, 24)
    assert unpadded.shape == (1, 4 * 2 * 2, 24)
    assert not torch.isclose(padded[:, :16], unpadded, atol=1e-2).all()


def test_first_and_last_slot_see_one_frame_each():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 8, 16, 20, generator=generator)
    other = torch.randn(1, 8, 16, 20, generator=generator)
    model = connector()

    def changed_slots(frame):
        y = x.clone()
        y[:, frame] = other[:, frame]
        difference = rearrange(model(y) - model(x), "1 (t p) d -> t (p d)", t=5).abs().amax(-1)
        return (difference > 0).nonzero().flatten().tolist()

    # stride 2 with one slot of zeros in front: [0 f0] [f1 f2] [f3 f4] [f5 f6] [f7 0]
    assert [changed_slots(frame) for frame in range(8)] == [[0], [1], [1], [2], [2], [3], [3], [4]]


def test_clips_of_a_batch_do_not_mix():
    x = torch.randn(3, 4, 9, 20, generator=torch.Generator().manual_seed(3))
    model = connector()
    alone = torch.cat([model(clip[None]) for clip in x])
    torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-5)


def test_blocks_match_a_plain_rewriting():
    """The first block of s1, written out from the paper's building plan with eps 1e-5."""
    block = stc.build_stage(20, 24).eval().requires_grad_(False).b1
    x = torch.randn(2, 20, 5, 7, generator=torch.Generator().manual_seed(4)) * 1e-2

    def norm(part, x):
        mean = x.mean(1, keepdim=True)
        variance = x.var(1, correction=0, keepdim=True)
        y = (x - mean) / (variance + 1e-5).sqrt()
        return y * part.bn.weight[:, None, None] + part.bn.bias[:, None, None]

    def conv(part, x, **kwargs):
        return torch.nn.functional.conv2d(x, part.conv.weight, **kwargs)

    silu = torch.nn.functional.silu
    y = silu(norm(block.conv1, conv(block.conv1, x)))
    y = silu(norm(block.conv2, conv(block.conv2, y, padding=1, groups=24)))
    gate = silu(block.se.fc1(y.mean((2, 3), keepdim=True)))
    y = y * block.se.fc2(gate).sigmoid()
    y = norm(block.conv3, conv(block.conv3, y))
    expected = silu(y + norm(block.downsample, conv(block.downsample, x)))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
