from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from tests.goldens import assert_stages_match, golden
from vla2_models.connectors import PROJECTOR_TYPES, TABLE_1, build_connector
from vla2_models.stc import STCConnector

DOCS = Path(__file__).parents[2] / "docs/connectors.md"

# the reference, run: type -> (frames, patches on a side) -> tokens; upstream's linear and MLP
# take the mean over the frames first. `test_stc.py` has more of stc_connector
TOKENS = {
    "stc_connector": {(8, 24): 845, (16, 24): 1521, (8, 27): 980, (16, 27): 1764},
    "stc_connector_v35": {
        (4, 24): 288,
        (8, 24): 576,
        (16, 24): 1152,
        (32, 24): 2304,
        (4, 27): 338,
        (8, 27): 676,
        (16, 27): 1352,
        (32, 27): 2704,
    },
    "spatial_conv": {(8, 24): 1690, (16, 24): 3042, (8, 27): 1960},
    "spatial_pool": {(1, 24): 144, (8, 24): 1152, (16, 24): 2304, (8, 27): 1352},
    "linear": {(1, 24): 576, (8, 24): 576, (8, 27): 729},
}
TOKENS["stp_connector"] = TOKENS["stc_connector_v35"]
TOKENS["mlp2x_gelu"] = TOKENS["linear"]
COUNTED = [(name, *case, tokens) for name in TOKENS for case, tokens in TOKENS[name].items()]

# Table 1 as printed: RegStage, downsample, tokens
PRINTED = """
    | 2D Pool (1, 2, 2) | 1152
    | 2D Conv (1, 2, 2) | 1152
    | 3D Pool (8, 1, 1) | 576
    | 3D Pool (2, 2, 2) | 576
    | 3D Conv (2, 2, 2) | 576
  ✓ | 2D Pool (1, 2, 2) | 1152
  ✓ | 2D Conv (1, 2, 2) | 1152
  ✓ | 3D Pool (2, 2, 2) | 576
  ✓ | 3D Conv (2, 2, 2) | 576
"""

ROW_IDS = [f"{row.label}{' RegStage' if row.design.has_stages else ''}" for row in TABLE_1]


def build(design, mm_hidden_size=4, hidden_size=8):
    torch.manual_seed(0)
    return build_connector(design, mm_hidden_size, hidden_size).eval().requires_grad_(False)


def random_features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def blocks_of(design):
    if design.kernel is None:
        return "mean over frames"
    return f"{'Conv' if design.is_convolution else 'Pool'} {design.kernel}"


def tables_of_docs():
    """The rows of each table, as lists of cells, without the heading."""
    tables, rows = [], []
    for line in [*DOCS.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            tables.append(rows[2:])
            rows = []
    return tables


def test_types_are_the_seven_that_the_reference_runs():
    assert set(PROJECTOR_TYPES) == set(TOKENS)
    assert len(PROJECTOR_TYPES) == 7
    for name in ("mlp1x_gelu", "mlp3x_gelu", "identity", "stc_connector_v35_half", "stp", "stc"):
        assert name not in PROJECTOR_TYPES


@pytest.mark.parametrize("name", PROJECTOR_TYPES)
def test_connector_matches_reference(name):
    tensors = load_file(golden("data/projectors.safetensors"))
    prefix = f"{name}/weights/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    features, expected = tensors[f"{name}/input"], tensors[f"{name}/output"]
    model = build(PROJECTOR_TYPES[name], features.shape[-1], expected.shape[-1])
    model.load_state_dict(weights)
    found = {"projector_tokens": model(features)}
    assert_stages_match(f"{name} alone", found, {"projector_tokens": expected})


@pytest.mark.parametrize(("name", "num_frames", "side", "tokens"), COUNTED)
def test_count_tokens_matches_the_table(name, num_frames, side, tokens):
    assert PROJECTOR_TYPES[name].count_tokens(num_frames, side**2) == tokens


@pytest.mark.parametrize(("name", "num_frames", "side", "tokens"), COUNTED)
def test_forward_gives_the_tokens_of_the_table(name, num_frames, side, tokens):
    got = build(PROJECTOR_TYPES[name])(torch.zeros(1, num_frames, side**2, 4))
    assert got.shape == (1, tokens, 8)


def test_rows_are_those_the_paper_prints():
    printed = [
        [cell.strip() for cell in line.split("|")] for line in PRINTED.strip("\n").split("\n")
    ]
    ours = [["✓" * row.design.has_stages, row.label, str(row.tokens)] for row in TABLE_1]
    assert ours == printed


@pytest.mark.parametrize("row", TABLE_1, ids=ROW_IDS)
def test_row_has_the_design_that_its_label_names(row):
    assert row.label[3:] == blocks_of(row.design)
    assert (row.label[:2] == "2D") == (row.design.kernel[0] == 1)
    assert row.design.padding == 0


@pytest.mark.parametrize("row", TABLE_1, ids=ROW_IDS)
@pytest.mark.parametrize("mm_hidden_size", [4, 8], ids=["other width", "equal width"])
def test_row_makes_as_many_tokens_as_the_paper_states(row, mm_hidden_size):
    assert row.design.count_tokens(8, 24**2) == row.tokens
    got = build(row.design, mm_hidden_size)(torch.zeros(1, 8, 24**2, mm_hidden_size))
    assert got.shape == (1, row.tokens, 8)


def test_chosen_row_is_the_unpadded_release():
    assert TABLE_1[-1].design == PROJECTOR_TYPES["stc_connector_v35"]


def test_releases_with_and_without_padding_cannot_be_told_by_their_tensors():
    def shapes(name):
        state = build(PROJECTOR_TYPES[name]).state_dict()
        return {key: tensor.shape for key, tensor in state.items()}

    assert shapes("stc_connector") == shapes("stc_connector_v35")
    assert shapes("stc_connector") != shapes("stp_connector")


@pytest.mark.parametrize("name", ["stc_connector_v35", "stp_connector"])
def test_last_frame_of_an_odd_number_is_dropped_without_padding(name):
    model, x = build(PROJECTOR_TYPES[name]), random_features(2, 7, 25, 4)
    torch.testing.assert_close(model(x), model(x[:, :6]), atol=1e-5, rtol=1e-5)


def test_first_and_last_slot_of_spatial_conv_hold_the_bias_alone():
    model, num_frames = build(PROJECTOR_TYPES["spatial_conv"]), 3
    bias_only = model.readout(torch.nn.functional.silu(model.sampler[0].bias))
    got = model(random_features(2, num_frames, 25, 4))
    slots = rearrange(got, "b (t p) d -> t b p d", t=num_frames + 2)
    for empty in (slots[0], slots[-1]):
        torch.testing.assert_close(empty, bias_only.expand_as(empty), atol=1e-6, rtol=1e-6)
    for slot in slots[1:-1]:
        assert not torch.isclose(slot, bias_only, atol=1e-3).all()


@pytest.mark.parametrize("is_convolution", [True, False], ids=["conv", "pool"])
def test_first_part_with_weights_changes_the_width(is_convolution):
    row = TABLE_1[4 if is_convolution else 3]
    shapes = {key: tuple(t.shape) for key, t in build(row.design).state_dict().items()}
    readout = {"readout.0.bias": (8,), "readout.2.weight": (8, 8), "readout.2.bias": (8,)}
    if is_convolution:
        sampler = {"sampler.0.weight": (8, 4, 2, 2, 2), "sampler.0.bias": (8,)}
        assert shapes == sampler | {"readout.0.weight": (8, 8)} | readout
    else:
        assert shapes == {"readout.0.weight": (8, 4)} | readout


def test_pool_over_all_frames_is_their_mean():
    model = build(TABLE_1[2].design)
    x = random_features(2, 8, 25, 4)
    expected = model.readout(torch.nn.functional.silu(x.mean(1)))
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu"])
def test_all_frames_are_averaged_before_the_layers(name):
    model, x = build(PROJECTOR_TYPES[name]), random_features(2, 7, 25, 4)
    torch.testing.assert_close(model(x), model(x.mean(1, keepdim=True)), atol=1e-6, rtol=1e-6)
    assert not torch.isclose(model(x), model(x[:, :1]), atol=1e-3).all()


def test_patches_need_no_square_where_only_frames_are_averaged():
    design = PROJECTOR_TYPES["mlp2x_gelu"]
    assert design.count_tokens(3, 15) == 15
    assert build(design)(random_features(2, 3, 15, 4)).shape == (2, 15, 8)


def test_only_designs_with_blocks_are_stc_connectors():
    for design in PROJECTOR_TYPES.values():
        assert isinstance(build(design), STCConnector) == (design.kernel is not None)


def test_docs_describe_the_public_types():
    types, _ = tables_of_docs()
    expected = [
        [
            f"`{name}`",
            blocks_of(design),
            str(design.padding),
            "yes" if design.has_stages else "no",
            str(design.readout_depth),
            str(design.count_tokens(8, 24**2)),
            str(design.count_tokens(16, 27**2)),
        ]
        for name, design in PROJECTOR_TYPES.items()
    ]
    assert types == expected


def test_docs_agree_with_table_1():
    _, rows = tables_of_docs()
    expected = [
        [
            "✓" * row.design.has_stages,
            row.label,
            f"`TABLE_1[{i}]`",
            str(row.design.count_tokens(8, 24**2)),
            str(row.tokens),
        ]
        for i, row in enumerate(TABLE_1)
    ]
    assert rows == expected
