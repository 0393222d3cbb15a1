import functools
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tests.tiny import tiny_av_engine, tiny_language_model
from vla2_models import packed
from vla2_models.beats import BEATs
from vla2_models.connectors import PROJECTOR_TYPES, build_connector
from vla2_models.miniature import AUDIO_TOWER
from vla2_models.packed import PackedLinear, attend, can_pack, pack, pack_front, pack_in_place

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
}
TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False)),
}
# of a sum of some hundred products
ATOL = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
both_dtypes = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not can_pack(CPU, torch.bfloat16), reason="no bfloat16 products here"
            ),
        ),
    ],
    ids=str,
)


def frozen(module, dtype=torch.float32):
    return module.to(dtype).eval().requires_grad_(False)


@both_dtypes
@pytest.mark.parametrize("shape", [(7, 20), (1, 1, 20), (3, 0, 20)], ids=str)
def test_packed_linear_equals_the_plain_one(dtype, shape):
    torch.manual_seed(0)
    linear = frozen(nn.Linear(20, 30), dtype)
    x = torch.randn(shape, dtype=dtype)
    packed_linear = PackedLinear(linear.weight, linear.bias)
    torch.testing.assert_close(packed_linear(x), linear(x), atol=ATOL[dtype], rtol=0)


def test_packed_linear_takes_a_strided_view():
    linear = frozen(nn.Linear(20, 30, bias=False))
    x = torch.randn(9, 60)[::2, 1::3]
    assert not x.is_contiguous()
    torch.testing.assert_close(PackedLinear(linear.weight)(x), linear(x), atol=1e-5, rtol=0)


@both_dtypes
@pytest.mark.parametrize("tower", TOWERS)
def test_packed_tower_equals_the_plain_one(tower, dtype):
    torch.manual_seed(0)
    plain = frozen(TOWERS[tower](), dtype)
    pixels = torch.randn(3, 3, 42, 42, dtype=dtype)
    found, wanted = (t(pixels).last_hidden_state for t in (pack(plain), plain))
    torch.testing.assert_close(found, wanted, atol=ATOL[dtype], rtol=0)


def test_packed_beats_equals_the_plain_one():
    torch.manual_seed(0)
    plain = frozen(BEATs(AUDIO_TOWER))
    for layer in plain.encoder.layers:  # gates that differ from head to head
        layer.self_attn.grep_a.normal_()
    fbank = torch.randn(2, 48, 128) * 6 + 15
    torch.testing.assert_close(pack(plain)(fbank), plain(fbank), atol=1e-5, rtol=0)


@pytest.mark.parametrize("projector_type", PROJECTOR_TYPES)
def test_packed_connector_equals_the_plain_one(projector_type, monkeypatch):
    torch.manual_seed(0)
    plain = frozen(build_connector(PROJECTOR_TYPES[projector_type], 20, 24))
    features = torch.randn(2, 4, 25, 20)
    # two frames at a time, then all of them
    for group_bytes in (2 * 25 * 24 * 4, 2**20):
        monkeypatch.setattr(packed, "GROUP_BYTES", group_bytes)
        torch.testing.assert_close(pack(plain)(features), plain(features), atol=1e-5, rtol=0)


def test_attention_head_by_head_equals_pytorchs():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    bias, gate = torch.randn(4, 9, 9), torch.rand(2, 4, 9, 1)
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=gate * bias)
    found = attend(q, k, v, bias, gate)
    torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(2), atol=1e-6, rtol=0)


def test_packing_leaves_the_model_as_it_was():
    model = tiny_av_engine().model
    before = {name: type(module) for name, module in model.named_modules()}
    clone = pack_front(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert clone.language_model is model.language_model
    assert not any(type(m) is nn.Linear for part in clone.front for m in part.modules())
    assert (clone.device, clone.dtype) == (model.device, model.dtype)


def test_only_the_cpu_and_its_own_dtypes_are_packed():
    assert can_pack(CPU, torch.float32)
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(CPU, torch.float64)
    assert not can_pack(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_is_packed_only_where_the_processor_has_it(monkeypatch, has_it):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_it)
    assert can_pack(CPU, torch.bfloat16) == has_it


# in place


@functools.cache
def language_logits(family, **changes):
    model = tiny_language_model(family, **changes)
    ids = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    pack_in_place(model)
    return model, plain, model(ids).logits


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2"])
def test_language_model_packed_in_place_says_the_same(family):
    model, plain, packed_logits = language_logits(family)
    torch.testing.assert_close(packed_logits, plain, atol=1e-5, rtol=0)
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert any(type(module) is PackedLinear for module in model.modules())


def test_tied_head_is_packed_and_the_embedding_stays():
    model, plain, packed_logits = language_logits("qwen2", tie_word_embeddings=True)
    torch.testing.assert_close(packed_logits, plain, atol=1e-5, rtol=0)
    assert type(model.lm_head) is PackedLinear
    assert model.get_input_embeddings().weight.shape == (97, 64)
    assert model.device == CPU


def test_packing_in_place_lets_each_weight_go_before_the_next():
    class Layer(nn.Linear):
        """Not exactly a linear layer: left as it is."""

    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 4)]), Layer(4, 4))
    weights = [weakref.ref(model[0].weight), weakref.ref(model[1][0].weight)]
    pack_in_place(model)
    assert [weight() for weight in weights] == [None, None]
    assert type(model[2]) is Layer


WEIGHT_MIB = 32
PACKING = """
from pathlib import Path
import torch
from torch import nn
from vla2_models.packed import pack_in_place

torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(2048, 4096, bias=False) for _ in range(8)))
def used_mib():
    fields = Path("/proc/self/status").read_text()
    return int(fields.partition("VmHWM:")[2].split()[0]) / 1024
pack_in_place(nn.Linear(8, 8))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = used_mib()
with torch.inference_mode():
    pack_in_place(model)
print(used_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_packing_in_place_holds_few_weights_twice():
    done = subprocess.run(
        [sys.executable, "-c", PACKING], capture_output=True, text=True, timeout=120, check=True
    )
    # eight weights; one of them is there twice, and one more while it is laid out
    assert float(done.stdout) < 3 * WEIGHT_MIB
