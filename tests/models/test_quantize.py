import importlib.util
import logging
import weakref

import pytest
import torch
from transformers import MistralConfig

from tests.tiny import FAMILIES, generate, load_tiny, tiny_language_model, write_tiny
from vla2_models import quantize as module
from vla2_models.errors import CheckpointError
from vla2_models.quantize import QUANTIZATIONS, check_quantization, quantize_layer
from vla2cli.config import GenerationSettings

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
KINDS = [
    ("mistral", "4bit"),
    ("qwen2", "4bit"),
    ("mixtral", "4bit"),
    ("mistral", "8bit"),
    ("qwen2", "8bit"),
]
CPU = torch.device("cpu")
CUDA = pytest.param(
    torch.device("cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
)
PROMPTS = (torch.arange(11), torch.tensor([90, 5, 5, 17]))

# half of the widest gap between two values of nf4, between -1 and -0.6962
NF4_HALF_STEP = 0.1519
# the same for the scales of the blocks: 64 steps from 0.1 to 1 in the code of 8 bits
SCALE_HALF_STEP = 0.9 / 64 / 2
INT8_HALF_STEP = 0.5 / 127
# between the logits of three random layers, quantized and not
LEAST_COSINE = {"4bit": 0.95, "8bit": 0.999}


def quantize(model, name, **kwargs):
    check_quantization(name, model.config, kwargs["device"])
    for layer in model.model.layers:
        quantize_layer(layer, name, **kwargs)


def tiny_model(family, dtype=torch.float32):
    """A random model, the same each time; widths are multiples of nf4's block."""
    # products that neither vanish beside the residual nor drown it
    std = 0.05
    model = tiny_language_model(
        family, dtype, hidden_size=128, intermediate_size=192, initializer_range=std
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.copy_(0.1 * torch.randn(weight.shape))  # drawn alike in every dtype
    return model


def quantized_model(family, name, dtype=torch.float32, device=CPU):
    model = tiny_model(family, dtype)
    quantize(model, name, compute_dtype=dtype, device=device)
    return model.to(device)


def linears_of(model):
    """The modules of the decoder layers that were linear, by name."""
    return {
        name: part
        for name, part in model.model.layers.named_modules()
        if isinstance(part, torch.nn.Linear)
    }


def unpack(linear):
    """The weight that a quantized layer stands for, in float32."""
    import bitsandbytes

    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        state = linear.weight.quant_state
        return bitsandbytes.functional.dequantize_4bit(linear.weight.data, state).float()
    return linear.weight.data * linear.weight.SCB[:, None] / 127


def logits_of(model):
    ids = PROMPTS[0][None].to(model.device)
    with torch.inference_mode():
        return model(input_ids=ids).logits.float().cpu()


def cosine(one, other):
    return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def assert_close_to_nf4(found, weight):
    blocks = weight.float().reshape(-1, 64)
    scales = blocks.abs().amax(dim=-1, keepdim=True)
    room = NF4_HALF_STEP * scales + SCALE_HALF_STEP * (scales.max() - scales.min())
    error = (found.float().reshape(-1, 64) - blocks).abs()
    assert (error <= room).all()
    assert error.max() > 0.05 * scales.max()


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_4_bits_are_within_the_step_of_nf4(family):
    linears = linears_of(tiny_model(family))
    quantized = linears_of(quantized_model(family, "4bit"))
    assert list(quantized) == list(linears)
    assert len(linears) == 3 * (4 if family == "mixtral" else 7)
    for name, linear in linears.items():
        assert_close_to_nf4(unpack(quantized[name]), linear.weight)


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_weights_in_8_bits_are_within_the_step_of_int8(family):
    linears = linears_of(tiny_model(family))
    quantized = linears_of(quantized_model(family, "8bit"))
    assert list(quantized) == list(linears)
    for name, linear in linears.items():
        greatest = linear.weight.abs().amax(dim=-1, keepdim=True)
        error = (unpack(quantized[name]) - linear.weight).abs()
        # bitsandbytes takes the weight as float16
        assert (error <= (INT8_HALF_STEP + 2**-11) * greatest).all()
        assert error.max() > 0


@needs_bitsandbytes
def test_fused_experts_are_within_the_step_of_nf4_and_keep_nothing_in_full_size():
    layers = zip(
        tiny_model("mixtral").model.layers,
        quantized_model("mixtral", "4bit").model.layers,
        strict=True,
    )
    for layer, quantized in layers:
        for name in ("gate_up_proj", "down_proj"):
            weight = layer.mlp.experts.get_parameter(name)
            assert_close_to_nf4(getattr(quantized.mlp.experts, name), weight)
            held = quantized.mlp.experts.parametrizations[name].original
            assert (held.dtype, held.nbytes) == (torch.uint8, weight.numel() // 2)


@needs_bitsandbytes
@pytest.mark.parametrize(("family", "name"), KINDS, ids=map("-".join, KINDS))
def test_all_but_decoder_layers_stays_as_it_is(family, name):
    whole, model = tiny_model(family), quantized_model(family, name)
    kept = dict(model.named_parameters())
    for path, weight in whole.named_parameters():
        in_full = ".layers." not in path or weight.ndim == 1 or path.endswith("mlp.gate.weight")
        if in_full:
            assert kept[path].dtype == torch.float32
            assert torch.equal(kept[path], weight)
        elif path in kept:
            assert kept[path].dtype in (torch.uint8, torch.int8)
    assert not any(weight.requires_grad for weight in model.parameters())
    # in training bitsandbytes multiplies in other ways
    assert not any(part.training for part in model.modules())


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_4_bits_are_those_of_the_unpacked_weights(family):
    model, unpacked = quantized_model(family, "4bit"), tiny_model(family)
    linears = linears_of(unpacked)
    for name, linear in linears_of(model).items():
        linears[name].weight.copy_(unpack(linear))
    if family == "mixtral":
        for layer, packed in zip(unpacked.model.layers, model.model.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                layer.mlp.experts.get_parameter(name).copy_(getattr(packed.mlp.experts, name))
    # float32 sums in another order at most
    torch.testing.assert_close(logits_of(model), logits_of(unpacked), atol=1e-4, rtol=0)


@needs_bitsandbytes
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "name"), KINDS, ids=map("-".join, KINDS))
def test_logits_point_where_those_of_the_whole_model_do(family, name, dtype, device):
    # nf4 is off by 9% of a normal weight (rms): by 16% after three products in a row, by 28% after
    # three layers, which is a cosine of 0.96; a router may choose otherwise besides. int8 is off
    # by 0.6% of either factor: by 2.5% after nine products, a cosine of 0.9997
    least = LEAST_COSINE[name]
    found = logits_of(quantized_model(family, name, dtype, device))
    assert found.isfinite().all()
    assert least < cosine(found, logits_of(tiny_model(family))) < 1 - 1e-6


@needs_bitsandbytes
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "name"), KINDS, ids=map("-".join, KINDS))
def test_quantized_model_says_greedily_what_its_own_logits_say(family, name, dtype, device):
    model = quantized_model(family, name, dtype, device)
    embed = model.get_input_embeddings()
    settings = GenerationSettings(eos_token_ids=(), max_new_tokens=8)
    embeds = [embed(ids.to(device)) for ids in PROMPTS]
    rows = generate(model, embeds, settings, [0, 0])
    assert all(row.is_finite and len(row.ids) == 8 for row in rows)
    # a whole forward pass, without cache and padding, over what was said
    for ids, row in zip(PROMPTS, rows, strict=True):
        said = torch.cat([ids, torch.tensor(row.ids[:-1])])[None].to(device)
        with torch.inference_mode():
            logits = model(input_ids=said, logits_to_keep=8).logits[0].float()
        best = logits.max(-1).values
        chosen = logits.gather(-1, torch.tensor(row.ids, device=device)[:, None])[:, 0]
        # where two tokens are nearly even, rounding decides
        torch.testing.assert_close(chosen, best, atol=0.1, rtol=0)


def bits_of(linear, name):
    """Bits that a layer holds for each weight, with its scales."""
    if name == "8bit":
        held = [linear.weight.data, linear.weight.SCB]
    else:
        state = linear.weight.quant_state
        held = [linear.weight.data, state.absmax, state.state2.absmax]
    return 8 * sum(tensor.nbytes for tensor in held) / (linear.in_features * linear.out_features)


@needs_bitsandbytes
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_bits_held_for_a_weight_are_those_of_the_format(name):
    # nf4: 4, a byte a block of 64, a float32 for 256 of those; int8: 8 and a float32 a row
    for path, linear in linears_of(quantized_model("mistral", name)).items():
        num_weights = linear.in_features * linear.out_features
        num_groups = -(-num_weights // (64 * 256))
        expected = {
            "4bit": 4 + 8 / 64 + 32 * num_groups / num_weights,
            "8bit": 8 + 32 / linear.in_features,
        }[name]
        assert bits_of(linear, name) == pytest.approx(expected), path


@needs_bitsandbytes
@pytest.mark.parametrize(("family", "name"), KINDS[2:4], ids=map("-".join, KINDS[2:4]))
def test_each_weight_is_dropped_before_the_next_is_quantized(family, name, monkeypatch):
    import bitsandbytes

    model = tiny_model(family)
    weights = [linear.weight for linear in linears_of(model).values()]
    weights += [weight for weight in model.model.layers.parameters() if weight.ndim == 3]
    full = [weakref.ref(weight) for weight in weights]
    weights.clear()
    alive = []
    step = {"4bit": "quantize_4bit", "8bit": "int8_vectorwise_quant"}[name]
    original = getattr(bitsandbytes.functional, step)

    def count(*args, **kwargs):
        alive.append(sum(weight() is not None for weight in full))
        return original(*args, **kwargs)

    monkeypatch.setattr(bitsandbytes.functional, step, count)
    quantize(model, name, compute_dtype=torch.float32, device=CPU)
    assert alive == list(range(len(full), 0, -1))


@needs_bitsandbytes
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_memory_mapped_checkpoint_is_quantized_and_its_file_is_not_changed(name, tmp_path):
    folder = write_tiny(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    model = load_tiny(folder).language_model
    whole = logits_of(model)
    quantize(model, name, compute_dtype=torch.float32, device=CPU)
    assert cosine(logits_of(model), whole) > LEAST_COSINE[name]
    assert (folder / "model.safetensors").read_bytes() == before


@needs_bitsandbytes
def test_float32_is_computed_in_float32_on_every_cpu():
    # with AVX512-BF16 bitsandbytes would round inputs and scales to bfloat16
    linear = linears_of(quantized_model("mistral", "4bit"))["0.mlp.down_proj"]
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = linear(x)
    torch.testing.assert_close(found, x @ unpack(linear).T, atol=1e-5, rtol=0)


@needs_bitsandbytes
def test_odd_shapes_can_be_had_in_bfloat16():
    # bitsandbytes asserts rows by 32 on a CPU with AVX512-BF16
    sizes = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 5}
    model = tiny_language_model("mistral", torch.bfloat16, num_key_value_heads=1, **sizes)
    whole = logits_of(model)
    quantize(model, "4bit", compute_dtype=torch.bfloat16, device=CPU)
    assert cosine(logits_of(model), whole) > LEAST_COSINE["4bit"]


@needs_bitsandbytes
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantized_model_says_nothing_on_stderr(name, caplog):
    with caplog.at_level(logging.WARNING):
        logits_of(quantized_model("mistral", name, torch.bfloat16))
    assert caplog.records == []


def test_unknown_quantization_is_refused():
    with pytest.raises(ValueError, match="unknown quantization 'int4', expected 4bit or 8bit"):
        check_quantization("int4", MistralConfig(), CPU)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_missing_bitsandbytes_names_the_extra(name, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"need bitsandbytes: pip install bitsandbytes$"):
        check_quantization(name, MistralConfig(), CPU)


@needs_bitsandbytes
def test_experts_in_8_bits_are_refused_and_the_model_is_not_touched():
    model = tiny_model("mixtral")
    with pytest.raises(CheckpointError, match="experts of a mixtral model; take 4bit"):
        quantize(model, "8bit", compute_dtype=torch.float32, device=CPU)
    assert torch.equal(logits_of(model), logits_of(tiny_model("mixtral")))


@needs_bitsandbytes
@pytest.mark.parametrize("device", ["mps", "meta", "xpu:0"])
def test_device_of_another_kind_is_refused(device):
    with pytest.raises(ValueError, match=f"on '{device}', expected cpu or cuda"):
        check_quantization("4bit", MistralConfig(), torch.device(device))


@needs_bitsandbytes
@pytest.mark.skipif(torch.cuda.is_available(), reason="its library has CUDA")
def test_library_without_cuda_is_refused():
    with pytest.raises(ValueError, match="this bitsandbytes has no library for CUDA"):
        check_quantization("4bit", MistralConfig(), torch.device("cuda"))


@needs_bitsandbytes
def test_old_gpu_is_refused_for_8_bits_alone(monkeypatch):
    import bitsandbytes

    monkeypatch.setattr(type(bitsandbytes.cextension.lib), "compiled_with_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 0))
    device = torch.device("cuda:0")
    check_quantization("4bit", MistralConfig(), device)
    with pytest.raises(ValueError, match=r"capability is 7\.0, expected 7\.5 or more; take 4bit"):
        check_quantization("8bit", MistralConfig(), device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    check_quantization("8bit", MistralConfig(), device)


@needs_bitsandbytes
@pytest.mark.parametrize(("family", "name"), KINDS, ids=map("-".join, KINDS))
def test_what_can_be_had_on_the_cpu_is_not_refused(family, name):
    check_quantization(name, FAMILIES[family](), CPU)
