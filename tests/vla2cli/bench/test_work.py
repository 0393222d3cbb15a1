"""The counts against formulas by hand, and the language model's against torch's own counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_language_model
from vla2_models.loading import build_empty
from vla2_models.public import find_public
from vla2_models.sizes import full_size_config
from vla2_models.stc import ConnectorDesign
from vla2cli.bench.work import (
    Work,
    connector_flops,
    count_flops,
    count_positions,
    prefill_flops,
    sound_flops,
    token_bytes,
    tower_flops,
)


def spec(name):
    return full_size_config(find_public(f"DAMO-NLP-SG/{name}"))


def on_meta(config):
    return build_empty(config).to("meta")


def stage_flops(num_images, num_positions, width_in, width):
    """A RegStage of four blocks: 1x1, depthwise 3x3, squeeze and excite, 1x1; the first widens."""
    total = 2 * num_positions * width_in * width  # the shortcut of the first block
    for before in (width_in, width, width, width):
        squeezed = before // 4
        total += 2 * num_positions * (before * width + 9 * width + width * width)
        total += 2 * num_images * 2 * width * squeezed
    return total


def stc_flops(num_frames, side, slots, width_in, width, *, conv_positions):
    """`conv_positions`: of (time, height, width) that meet a matrix of the Conv3d."""
    out_side = 13
    tokens = slots * out_side**2
    s1 = stage_flops(num_frames, num_frames * side**2, width_in, width)
    conv = 2 * conv_positions * width * width
    # without a wider input there is no shortcut to multiply
    s2 = stage_flops(slots, tokens, width, width) - 2 * tokens * width * width
    return s1 + conv + s2 + 2 * tokens * 2 * width * width


def test_stc_connector_of_7b_is_counted_without_padding_zeros():
    config = spec("VideoLLaMA2-7B")
    model = on_meta(config)
    padded = stc_flops(8, 24, 5, 1024, 4096, conv_positions=10 * 26 * 26)
    needed = stc_flops(8, 24, 5, 1024, 4096, conv_positions=8 * 24 * 24)
    features = torch.empty(1, 8, 576, 1024, device="meta")
    assert count_flops(lambda: model.project(features)) == padded
    assert connector_flops(model, 8) == needed
    assert padded / 1e9 == pytest.approx(1672, abs=1)
    assert (padded - needed) / 1e9 == pytest.approx(227 - 154.6, abs=0.5)


def test_unpadded_connector_drops_the_odd_row_and_column():
    config = spec("VideoLLaMA2.1-7B-16F")
    # 27 x 27 patches, of which 26 x 26 fill blocks
    needed = stc_flops(16, 27, 8, 1152, 3584, conv_positions=16 * 26 * 26)
    assert connector_flops(on_meta(config), 16) == needed


@pytest.mark.parametrize(
    ("design", "num_frames", "side", "covered", "real"),
    [
        (ConnectorDesign((2, 2, 2), True, padding=1), 8, 24, 10 * 26 * 26, 8 * 24 * 24),
        (ConnectorDesign((2, 2, 2), True, padding=1), 1, 3, 2 * 4 * 4, 1 * 3 * 3),
        (ConnectorDesign((2, 2, 2), True, padding=1), 2, 4, 4 * 6 * 6, 2 * 4 * 4),
        (ConnectorDesign((2, 2, 2), True), 7, 5, 6 * 4 * 4, 6 * 4 * 4),
        (ConnectorDesign((1, 2, 2), True, padding=1), 3, 3, 5 * 4 * 4, 3 * 3 * 3),
    ],
    ids=["7B", "one frame", "even", "unpadded and odd", "spatial"],
)
def test_positions_are_those_that_a_convolution_of_ones_touches(
    design, num_frames, side, covered, real
):
    assert count_positions(design, num_frames, side**2) == (covered, real)
    # the sum over all windows of the features' mask is how many of them are met
    ones = torch.ones(1, 1, num_frames, side, side)
    kernel = torch.ones(1, 1, *design.kernel)
    met = torch.nn.functional.conv3d(ones, kernel, stride=design.kernel, padding=design.padding)
    assert met.sum() == real
    assert met.numel() * kernel.numel() == covered


def test_connector_without_a_convolution_has_nothing_to_leave_out():
    design = ConnectorDesign((2, 2, 2), is_convolution=False, has_stages=False)
    config = dataclasses.replace(spec("VideoLLaMA2-7B"), connector=design)
    tokens = 4 * 12 * 12
    readout = 2 * tokens * (1024 * 4096 + 4096 * 4096)
    assert connector_flops(on_meta(config), 8) == readout


@pytest.mark.parametrize(
    ("name", "tokens", "patches", "width", "ffn", "blocks", "gflop"),
    [
        ("VideoLLaMA2-7B", 577, 576, 1024, 4096, 23, 366),
        ("VideoLLaMA2.1-7B-16F", 729, 729, 1152, 4304, 26, None),
    ],
    ids=["CLIP", "SigLIP"],
)
def test_tower_is_counted_to_the_selected_block(name, tokens, patches, width, ffn, blocks, gflop):
    block = 2 * tokens * (4 * width**2 + 2 * width * ffn) + 4 * tokens**2 * width
    frame = 2 * patches * 3 * 14 * 14 * width + blocks * block
    assert tower_flops(on_meta(spec(name)), 5) == 5 * frame
    assert gflop is None or frame / 1e9 == pytest.approx(gflop, abs=1)


def test_ears_are_counted_with_their_projector():
    tokens, width, heads = 1496, 768, 12
    patches = 2 * tokens * 16 * 16 * 512 + 2 * tokens * 512 * width
    positions = 2 * (tokens + 1) * 128 * (width // 16) * width  # an even kernel: one too many
    layer = 2 * tokens * (4 * width**2 + 2 * width * 3072) + 4 * tokens**2 * width
    gates = 2 * tokens * heads * (width // heads) * 8
    projector = 2 * tokens * (width * 3584 + 3584 * 3584)
    wanted = patches + positions + 12 * (layer + gates) + projector
    assert sound_flops(on_meta(spec("VideoLLaMA2.1-7B-AV"))) == wanted


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral"])
def test_prefill_is_what_torch_counts_less_what_no_token_sees(family):
    # eager: torch counts no other attention on the CPU, and no grouped product of experts
    changes = {"experts_implementation": "eager"} if family == "mixtral" else {}
    model = tiny_language_model(family, attn_implementation="eager", **changes)
    num_tokens = 21
    config = model.config
    embeds = torch.randn(1, num_tokens, config.hidden_size)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(inputs_embeds=embeds, logits_to_keep=1)
    unseen = num_tokens**2 - num_tokens * (num_tokens + 1) // 2
    unseen *= 4 * config.hidden_size * config.num_hidden_layers
    assert prefill_flops(config, num_tokens) == counter.get_total_flops() - unseen


@pytest.mark.parametrize("itemsize", [2, 4])
def test_token_reads_every_weight_of_a_product_once_and_the_cache(itemsize):
    model = tiny_language_model("qwen2")
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    cache = 2 * 3 * 100 * (2 * 16)  # keys and values, layers, tokens, heads of 16
    assert token_bytes(model.config, 100, itemsize) == itemsize * (weights + cache)


def test_token_reads_only_the_experts_that_it_is_sent_to():
    config = tiny_language_model("mixtral").config
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    expert = 4 * 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    more = tiny_language_model("mixtral", num_experts_per_tok=3).config
    assert token_bytes(more, 10, 4) - token_bytes(config, 10, 4) == expert


def test_work_names_its_limit():
    assert [Work(gflop=1.0).limit, Work(gb=1.0).limit, Work().limit] == ["product", "copy", None]
