"""BEATs and the audio projector: the reference's numbers, and the mathematics written out."""

import functools
import json
import math
import runpy
from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file

from tests.goldens import golden_audio, spec
from vla2_models.beats import (
    BEATs,
    build_audio_projector,
    find_buckets,
    is_audio_projector_type,
    position_bias,
)
from vla2_models.beats_design import BIAS_NAME, BEATsDesign, read_design
from vla2_models.beats_file import load_beats
from vla2_models.errors import CheckpointError

# of the reference in float32: a tanh GELU moves the real size by 8e-4, the deviation taken once
# moves the small one by 1.9e-4
ATOL = 2e-5
# the reference in float16 is 0.021 off and in bfloat16 0.07 to 0.17, on its own small network
HALF = {torch.float16: 0.06, torch.bfloat16: 0.35}

PUBLIC = BEATsDesign(
    patch_size=16,
    embed_dim=512,
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_heads=12,
    num_buckets=320,
    conv_pos=128,
    conv_pos_groups=16,
    num_classes=527,
)
SMALL = replace(
    PUBLIC, embed_dim=32, hidden_size=48, intermediate_size=96, num_layers=3, num_heads=4
)
TINY = BEATsDesign(
    patch_size=16,
    embed_dim=10,
    hidden_size=12,
    intermediate_size=20,
    num_layers=2,
    num_heads=3,
    num_buckets=32,
    conv_pos=6,
    conv_pos_groups=2,
    num_classes=7,
)


def tiny(seed=0, **changes):
    """A random network none of whose parameters is at its first, special value."""
    model = BEATs(replace(TINY, **changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def random_fbank(batch=1, num_frames=48, seed=1):
    noise = torch.rand(batch, num_frames, 128, generator=torch.Generator().manual_seed(seed))
    return -15.94 + 36 * noise


def shapes_of(design):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in BEATs(design).state_dict().items()}


def assert_close(found, expected, atol=ATOL):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@functools.cache
def small():
    """The reference's stand-alone file, and its numbers."""
    return load_beats(golden_audio("BEATs_small.pt")), load_file(
        golden_audio("beats/small_golden.safetensors")
    )


@functools.cache
def full():
    """BEATs at its real size on the stored sound: its stages, and the reference's numbers."""
    geometry = json.loads(golden_audio("beats/full_geometry.json").read_text())
    recipe = runpy.run_path(str(golden_audio("beats/beats_recipe.py")))["value"]
    stored = json.loads(golden_audio("beats/full_geometry_shapes.json").read_text())
    shapes = {name: tuple(shape) for name, shape in stored.items()}
    for name, expected in geometry["spot"].items():
        first = recipe(name, shapes[name], geometry["salt"]).ravel()[: len(expected)]
        assert first.tolist() == expected, f"the recipe gives other weights for {name}"
    with torch.device("meta"):
        model = BEATs(read_design(shapes))
    state = {
        name: torch.from_numpy(recipe(name, shapes[name], geometry["salt"]))
        for name in model.state_dict()
    }
    model.load_state_dict(state, assign=True)
    expected = load_file(golden_audio("beats/full_geometry_golden.safetensors"))
    return stages_of(model.eval().requires_grad_(False), expected["fbank_in"]), expected


def stages_of(model, fbank):
    """Run a model; return what its parts give, of the first item."""
    stages = {}

    def keep(name):
        return lambda module, args, output: stages.update({name: output[0]})

    parts = {"patch": model.patch_embedding, "encoder_input": model.encoder.layer_norm}
    parts |= {f"layer{i}": layer for i, layer in enumerate(model.encoder.layers)}
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    stages["features"] = model(fbank)[0]
    for hook in hooks:
        hook.remove()
    return stages


@pytest.mark.parametrize("num_frames", [2998, 400, 97, 16])
def test_features_match_reference(num_frames):
    model, expected = small()
    fbank = expected["fbank_in"]
    if num_frames < 2998:
        fbank = fbank[:, 100 : 100 + num_frames]
    assert_close(model(fbank), expected[f"features_{num_frames}"])


def test_probabilities_match_reference():
    model, expected = small()
    assert_close(model.classify(expected["fbank_in"]), expected["predictor_probs"])


def test_position_bias_matches_reference():
    model, expected = small()
    table = model.state_dict()[BIAS_NAME.format(0)]
    assert_close(position_bias(table, 64), expected["rel_bias_full"], atol=0)


def test_buckets_match_reference():
    _, expected = small()
    found = find_buckets(torch.arange(-1600, 1601), 320)
    assert torch.equal(found, expected["rel_bucket_0_to_1600"])


STAGES = ["patch", "encoder_input", *[f"layer{i}" for i in range(12)], "features"]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_of_the_real_size_matches_reference(stage):
    stages, expected = full()
    x = stages[stage]
    if stage == "patch":
        return assert_close(x[:, :8], expected["patch_first8T"])
    found = {
        f"{stage}_first16": x[:16],
        f"{stage}_last16": x[-16:],
        f"{stage}_token700_716": x[700:716],
        f"{stage}_every8": x[::8],
    }
    if stage == "features":
        found |= {"mean_per_dim": x.mean(0), "std_per_dim": x.std(0)}
    known = found.keys() & expected.keys()
    assert known
    for name in known:
        assert_close(found[name], expected[name])
    return None


def test_every_number_of_the_real_size_is_compared():
    _, expected = full()
    names = {"fbank_in", "patch_first8T", "encoder_input_first16", "mean_per_dim", "std_per_dim"}
    names |= {f"features_{part}" for part in ("every8", "first16", "last16")}
    names |= {f"layer{i}_{part}" for i in range(12) for part in ("first16", "token700_716")}
    assert set(expected) == names


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_near_the_reference(dtype):
    _, expected = small()
    model = load_beats(golden_audio("BEATs_small.pt")).to(dtype)
    features = model(expected["fbank_in"][:, 100:500])
    assert features.dtype == dtype
    assert_close(features.float(), expected["features_400"], atol=HALF[dtype])


def test_names_and_shapes_are_those_of_the_public_checkpoint():
    prefix, public = "model.audio_tower.", {}
    for line in spec("state_dict_keys_av.tsv").read_text().splitlines():
        name, _, shape = line.partition("\t")
        if name.startswith(prefix):
            public[name.removeprefix(prefix)] = tuple(json.loads(shape))
    copies = {BIAS_NAME.format(i): (320, 12) for i in range(1, 12)}
    assert shapes_of(PUBLIC) | copies == public
    assert read_design(public) == PUBLIC


def test_real_size_has_the_parameters_of_the_public_file():
    assert sum(math.prod(shape) for shape in shapes_of(PUBLIC).values()) == 90_717_055


@pytest.mark.parametrize("num_buckets", [320, 32, 6, 4])
def test_buckets_of_the_two_directions_mirror_each_other(num_buckets):
    distance, half = torch.arange(1, 2000), num_buckets // 2
    before, after = find_buckets(-distance, num_buckets), find_buckets(distance, num_buckets)
    assert torch.equal(after, before + half)
    assert (before.diff() >= 0).all()
    assert find_buckets(torch.tensor([0]), num_buckets).tolist() == [0]
    assert (before[distance >= 800] == half - 1).all()
    exact = distance < half // 2
    assert torch.equal(before[exact], distance[exact])


def test_far_buckets_are_logarithmic():
    for n in range(80, 800):
        exact = 80 + 80 * math.log(n / 80) / math.log(10)
        if abs(exact - round(exact)) > 1e-4:  # where float32 could not decide otherwise
            assert find_buckets(torch.tensor(-n), 320) == int(exact)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 100])
def test_position_bias_is_looked_up_by_key_minus_query(num_tokens):
    table = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    bias = position_bias(table, num_tokens)
    assert bias.shape == (3, num_tokens, num_tokens)
    for i in range(num_tokens):
        for j in range(0, num_tokens, 3):
            bucket = find_buckets(torch.tensor(j - i), 32)
            assert torch.equal(bias[:, i, j], table[bucket])


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def norm(part, x):
    variance = x.var(-1, correction=0, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * part.weight + part.bias


def attend(attention, x, bias):
    """Attention of one item as the papers write it, one pair of tokens at a time."""
    num_heads, num_tokens = len(bias), len(x)
    size = x.shape[1] // num_heads
    out = torch.zeros_like(x)
    q, k, v = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    for h in range(num_heads):
        head = slice(h * size, (h + 1) * size)
        for i in range(num_tokens):
            s = attention.grep_linear(q[i, head])
            g_a, g_b = 1 / (1 + math.exp(-s[:4].sum())), 1 / (1 + math.exp(-s[4:].sum()))
            gate = g_a * (g_b * attention.grep_a[0, h, 0, 0] - 1) + 2
            scores = [q[i, head] @ k[j, head] / math.sqrt(size) for j in range(num_tokens)]
            weights = [math.exp(scores[j] + gate * bias[h, i, j]) for j in range(num_tokens)]
            for j in range(num_tokens):
                out[i, head] += weights[j] / sum(weights) * v[j, head]
    return attention.out_proj(out)


def convolve(conv, x):
    """The positional convolution of one item, one tap at a time."""
    num_tokens, width = x.shape
    group, taps = conv.weight_v.shape[1:]
    out = conv.bias.expand(num_tokens, width).clone()
    for tap in range(taps):
        v = conv.weight_v[:, :, tap]
        w = conv.weight_g[0, 0, tap] * v / math.sqrt(float((v**2).sum()) + 1e-6)
        for i in range(num_tokens):
            j = i + tap - taps // 2
            if 0 <= j < num_tokens:
                for first in range(0, width, group):
                    part = slice(first, first + group)
                    out[i, part] += w[part] @ x[j, part]
    return gelu(out)


def test_network_is_what_the_papers_describe():
    model = tiny().double()
    bias = model.encoder.layers[0].self_attn.relative_attention_bias.weight
    fbank = random_fbank(num_frames=37).double()  # two times of patches, five frames are left
    tokens = []
    for t in range(2):
        for f in range(8):
            patch = fbank[0, 16 * t : 16 * t + 16, 16 * f : 16 * f + 16]
            patch = (patch - 15.41663) / (2 * 6.55582)
            tokens.append((model.patch_embedding.weight[:, 0] * patch).sum((1, 2)))
    x = model.post_extract_proj(norm(model.layer_norm, torch.stack(tokens)))
    x = norm(model.encoder.layer_norm, x + convolve(model.encoder.pos_conv[0], x))
    bias = position_bias(bias, 16)
    alpha = (2 * 2) ** 0.25
    for layer in model.encoder.layers:
        x = norm(layer.self_attn_layer_norm, alpha * x + attend(layer.self_attn, x, bias))
        x = norm(layer.final_layer_norm, alpha * x + layer.fc2(gelu(layer.fc1(x))))
    # the filter bank is normalised in float32, whatever its dtype
    assert_close(model(fbank), x[None], atol=1e-5)


@pytest.mark.parametrize("num_taps", [5, 6])
@pytest.mark.parametrize("scale", [1, 1e-4], ids=["weights", "weights as small as epsilon"])
def test_positional_convolution_matches_its_formula(num_taps, scale):
    conv = tiny(conv_pos=num_taps).encoder.pos_conv[0].double()
    conv.weight_v.mul_(scale)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2)).double()
    assert_close(conv(x[None])[0], convolve(conv, x), atol=1e-6)  # its weights are float32


@pytest.mark.parametrize("num_taps", [5, 6])
def test_positional_convolution_by_products_is_the_convolution(num_taps):
    conv = tiny(conv_pos=num_taps).encoder.pos_conv[0].double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 12, 7, generator=generator).double()
    weight = torch.randn(conv.weight_v.shape, generator=generator).double()
    expected = torch.nn.functional.conv1d(
        x, weight, conv.bias, padding=num_taps // 2, groups=conv.num_groups
    )
    assert_close(conv.multiply(x, weight), expected, atol=1e-12)


def test_every_norm_has_the_epsilon_of_the_formula():
    # of inputs so small that it decides, which a whole network never sees
    model = tiny().double()
    norms = [part for part in model.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert len(norms) == 2 + 2 * 2
    for part in norms:
        x = torch.randn(7, len(part.weight), generator=torch.Generator().manual_seed(4)) * 1e-3
        assert_close(part(x.double()), norm(part, x.double()), atol=1e-9)


def test_positional_weights_of_almost_nothing_stay_finite():
    conv = tiny().encoder.pos_conv[0]
    conv.weight_v.zero_()
    assert conv(torch.ones(1, 9, 12)).isfinite().all()


def test_items_of_a_batch_do_not_mix():
    model, fbank = tiny(), random_fbank(batch=3)
    alone = torch.cat([model(item[None]) for item in fbank])
    assert_close(model(fbank), alone, atol=1e-5)


@pytest.mark.parametrize("num_frames", [16, 31, 32, 97, 400])
@pytest.mark.parametrize("patch_size", [16, 12])
def test_count_tokens_equals_forward(num_frames, patch_size):
    model = tiny(patch_size=patch_size)
    num_tokens = model.design.count_tokens(num_frames)
    assert model(random_fbank(2, num_frames)).shape == (2, num_tokens, 12)


def test_half_a_minute_is_1496_tokens():
    assert PUBLIC.count_tokens(2998) == 1496
    assert PUBLIC.count_tokens(15) == 0


@pytest.mark.parametrize(
    "shape", [(48, 128), (1, 48, 80), (1, 15, 128), (1, 0, 128), (1, 1, 48, 128)], ids=str
)
def test_fbank_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, T, 128\) with T at least 16"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", [-15.9375, 20.0], ids=["silence", "loudest"])
def test_half_precision_stays_finite(dtype, level):
    model = tiny().to(dtype)
    fbank = torch.full((1, 400, 128), level)
    assert model(fbank).isfinite().all()
    assert model.classify(fbank).isfinite().all()


def test_scores_beyond_float16_stay_finite():
    attention = tiny().encoder.layers[0].self_attn.half()
    attention.q_proj.weight.mul_(200)
    attention.k_proj.weight.mul_(200)
    x = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(3)).half()
    scores = attention.q_proj(x).float() @ attention.k_proj(x).float().mT
    assert scores.abs().max() > torch.finfo(torch.float16).max
    assert attention(x, torch.zeros(3, 9, 9).half()).isfinite().all()


def test_fbank_is_normalised_before_it_is_rounded_to_half():
    # near the mean the difference would be lost in the other order
    model = tiny().bfloat16()
    fbank = torch.full((1, 16, 128), 15.41663 + 0.01)
    patches = model.patch_embedding(torch.full((1, 1, 16, 128), 0.01 / 13.11164).bfloat16())
    stages = stages_of(model, fbank)
    assert_close(stages["patch"], patches[0], atol=1e-4)


def test_fbank_in_bfloat16_is_normalised_in_float32():
    model, fbank = tiny(), random_fbank().bfloat16()
    assert torch.equal(model(fbank), model(fbank.float()))


def test_widths_that_are_equal_need_no_projection():
    model = tiny(embed_dim=12)
    assert not [name for name in model.state_dict() if "post_extract" in name]
    assert model(random_fbank()).shape == (1, 24, 12)


def test_network_without_a_head_does_not_classify():
    model = tiny(num_classes=None)
    assert not [name for name in model.state_dict() if "predictor" in name]
    with pytest.raises(ValueError, match="no head"):
        model.classify(random_fbank())


def test_network_built_without_weights_runs_once_they_are_loaded():
    with init_empty_weights():
        model = BEATs(TINY)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    model.load_state_dict(tiny().state_dict(), assign=True)
    assert_close(model.eval()(random_fbank()), tiny()(random_fbank()), atol=1e-5)


def test_network_can_be_trained():
    model = BEATs(TINY)
    model.classify(random_fbank()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "design",
    [PUBLIC, SMALL, TINY, replace(TINY, embed_dim=12), replace(TINY, num_classes=None)],
    ids=["public", "small", "tiny", "equal widths", "no head"],
)
def test_design_is_read_off_the_shapes(design):
    assert read_design(shapes_of(design)) == design


def unreadable(**changes):
    """Damage the shapes of TINY; return the line that refuses them."""
    shapes = shapes_of(TINY) | {name.replace("__", "."): s for name, s in changes.items()}
    with pytest.raises(CheckpointError) as raised:
        read_design({name: shape for name, shape in shapes.items() if shape is not None})
    line = str(raised.value)
    assert line.isprintable()
    assert len(line) < 300
    return line


NEEDED = [
    "patch_embedding.weight",
    "post_extract_proj.weight",
    "encoder.layer_norm.weight",
    "encoder.pos_conv.0.weight_v",
    "encoder.layers.0.self_attn.relative_attention_bias.weight",
    "encoder.layers.0.fc1.weight",
    "encoder.layers.1.fc1.weight",
    "encoder.layers.1.self_attn.q_proj.weight",
    "encoder.layers.1.self_attn.grep_linear.weight",
]
HUGE = 2**40
SIZES = {
    "none": (),
    "zero": (0,),
    "one": (1,),
    "huge": (HUGE,),
    "negative": (-1, -1),
    "matrix": (3, 5),
    "zeros": (0, 0),
    "huge matrix": (HUGE, HUGE),
    "three": (0, 0, 0),
    "three others": (5, 7, 11),
    "four": (0, 0, 0, 0),
    "four others": (5, 3, 2, 7),
    "many": (1,) * 1000,
}


@pytest.mark.parametrize("name", NEEDED)
def test_absent_tensor_is_named(name):
    assert unreadable(**{name: None}) == f"tensor {name} is missing from the audio tower"


@pytest.mark.parametrize("name", [*NEEDED, "predictor.weight"])
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_impossible_shape_is_named(name, shape):
    line = unreadable(**{name: shape})
    assert line.startswith("tensor ")
    # a size that sets others makes these the ones that do not fit
    assert "is [" in line


@pytest.mark.parametrize(
    ("name", "shape", "line"),
    [
        ("patch_embedding.weight", (10, 3, 16, 16), "[10, 3, 16, 16], the audio tower's other"),
        ("patch_embedding.weight", (10, 1, 16, 8), "[10, 1, 16, 8], the audio tower's other"),
        ("patch_embedding.weight", (10, 1, 129, 129), "expected 1 to 128 where it has 129"),
        ("post_extract_proj.weight", (12, 11), "[12, 11], the audio tower's other tensors need"),
        (BIAS_NAME.format(0), (32, 5), "its 5 does not divide the audio tower's width 12"),
        (BIAS_NAME.format(0), (3, 3), "expected 4 to 3,199 where it has 3"),
        (BIAS_NAME.format(0), (3200, 3), "expected 4 to 3,199 where it has 3200"),
        (BIAS_NAME.format(0), (32, 4), "need [8, 3]"),
        ("encoder.pos_conv.0.weight_v", (12, 5, 6), "its 5 does not divide"),
        ("encoder.pos_conv.0.weight_v", (12, 6, 4096), "expected 1 to 4,095 where it has 4096"),
        ("encoder.pos_conv.0.weight_v", (11, 6, 6), "need [12, 6, 6]"),
        ("encoder.layers.1.fc1.weight", (21, 12), "need [20, 12]"),
        ("predictor.weight", (7, 11), "need [7, 12]"),
        ("encoder.layer_norm.weight", (2**20,), "expected 1 sizes of 1 to 1,048,575"),
    ],
)
def test_shape_that_does_not_agree_is_named_with_what_it_must_be(name, shape, line):
    assert line in unreadable(**{name: shape})


@pytest.mark.parametrize(
    "number", ["1023", "10" * 3000, "007", "3"], ids=["1023", "long", "007", "3"]
)
def test_layer_that_does_not_follow_the_others_is_refused(number):
    line = unreadable(**{f"encoder.layers.{number}.fc2.bias": (12,)})
    assert "layer" in line


@pytest.mark.parametrize("shapes", [{}, {"": ()}, {"model": (1,)}], ids=str)
def test_shapes_of_something_else_are_refused(shapes):
    with pytest.raises(CheckpointError, match=r"patch_embedding\.weight is missing"):
        read_design(shapes)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("linear", {"weight": (7, 5), "bias": (7,)}),
        ("mlp1x_gelu", {"0.weight": (7, 5), "0.bias": (7,)}),
        (
            "mlp2x_gelu",
            {"0.weight": (7, 5), "0.bias": (7,), "2.weight": (7, 7), "2.bias": (7,)},
        ),
        (
            "mlp3x_gelu",
            {f"{i}.weight": (7, 7 if i else 5) for i in (0, 2, 4)}
            | {f"{i}.bias": (7,) for i in (0, 2, 4)},
        ),
    ],
)
def test_projector_has_the_tensors_of_the_checkpoints(name, shapes):
    projector = build_audio_projector(name, 5, 7)
    assert {key: tuple(t.shape) for key, t in projector.state_dict().items()} == shapes
    assert projector(torch.zeros(2, 3, 5)).shape == (2, 3, 7)
    assert is_audio_projector_type(name)


def test_projector_of_the_public_checkpoint_has_its_parameters():
    with torch.device("meta"):
        projector = build_audio_projector("mlp2x_gelu", 768, 3584)
    assert sum(p.numel() for p in projector.parameters()) == 15_604_736


def test_mlp_projector_matches_its_formula():
    torch.manual_seed(0)
    projector = build_audio_projector("mlp2x_gelu", 5, 7).requires_grad_(False)
    first, second = projector[0], projector[2]
    x = torch.randn(2, 3, 5)
    hidden = gelu(x @ first.weight.T + first.bias)
    assert_close(projector(x), hidden @ second.weight.T + second.bias, atol=1e-6)


def test_identity_gives_back_what_it_gets():
    projector = build_audio_projector("identity", 5, 5)
    assert not projector.state_dict()
    x = torch.randn(2, 3, 5)
    assert projector(x) is x
    assert is_audio_projector_type("identity")


def test_identity_between_two_widths_is_refused():
    with pytest.raises(ValueError, match="between widths 5 and 7"):
        build_audio_projector("identity", 5, 7)


UNKNOWN = """
    mlp mlp0x_gelu mlpx_gelu mlp2x_relu mlp-1x_gelu mlp٢x_gelu mlp99999x_gelu xmlp2x_gelu LINEAR
    stc_connector spatial_pool
"""


@pytest.mark.parametrize("name", ["", "mlp2x_gelu\n", *UNKNOWN.split()], ids=repr)
def test_unknown_projector_is_refused(name):
    assert not is_audio_projector_type(name)
    with pytest.raises(ValueError, match="expected linear, identity or mlp2x_gelu"):
        build_audio_projector(name, 5, 7)
