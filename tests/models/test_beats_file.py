"""Files with BEATs alone: the two public kinds load, everything else is one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.goldens import golden_audio
from vla2_models.beats import BEATs
from vla2_models.beats_design import BIAS_NAME, BEATsDesign
from vla2_models.beats_file import load_beats
from vla2_models.errors import CheckpointError
from vla2_models.names import AUDIO_TOWER_PREFIX

DESIGN = BEATsDesign(
    patch_size=16,
    embed_dim=10,
    hidden_size=12,
    intermediate_size=20,
    num_layers=3,
    num_heads=3,
    num_buckets=32,
    conv_pos=6,
    conv_pos_groups=2,
    num_classes=7,
)
CFG = {
    "input_patch_size": 16,
    "embed_dim": 10,
    "conv_bias": False,
    "encoder_layers": 3,
    "encoder_embed_dim": 12,
    "encoder_ffn_embed_dim": 20,
    "encoder_attention_heads": 3,
    "activation_fn": "gelu",
    "layer_wise_gradient_decay_ratio": 0.6,
    "layer_norm_first": False,
    "deep_norm": True,
    "dropout": 0.1,
    "encoder_layerdrop": 0.05,
    "conv_pos": 6,
    "conv_pos_groups": 2,
    "relative_position_embedding": True,
    "num_buckets": 32,
    "max_distance": 800,
    "gru_rel_pos": True,
    "finetuned_model": True,
    "predictor_dropout": 0.1,
    "predictor_class": 7,
    "hidden_size": 4096,
}
LABELS = {0: "/m/09x0r", 1: "/m/05zppz"}
FIRST = BIAS_NAME.format(0)


def tensors_of(num_copies=2, dtype=torch.float32):
    """The tensors of a random BEATs, with further copies of the shared bias."""
    torch.manual_seed(0)
    state = BEATs(DESIGN).state_dict()
    state |= {BIAS_NAME.format(i): state[FIRST].clone() for i in range(1, num_copies + 1)}
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write_published(path, tensors, cfg=CFG):
    torch.save({"cfg": cfg, "model": tensors, "label_dict": LABELS}, path)


def write_trained(path, tensors, cfg=None):
    prefixed = {AUDIO_TOWER_PREFIX + name: tensor for name, tensor in tensors.items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(prefixed, path)


KINDS = pytest.mark.parametrize(
    ("name", "write"),
    [
        ("beats.pt", write_published),
        ("beats.pth", write_published),
        ("audio_tower.bin", write_trained),
        ("audio_tower.safetensors", write_trained),
    ],
    ids=["pt", "pth", "bin", "safetensors"],
)


def refusal(path):
    """Load a file that must be refused; return the line, which names the file first."""
    with pytest.raises(CheckpointError) as raised:
        load_beats(path)
    line = str(raised.value)
    assert line.startswith(f"'{path}'")
    assert line.isprintable(), line
    assert len(line) < len(str(path)) + 400
    return line


@KINDS
@pytest.mark.parametrize("num_copies", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_file_loads_with_any_number_of_equal_copies(tmp_path, name, write, num_copies, dtype):
    write(tmp_path / name, tensors_of(num_copies, dtype))
    model = load_beats(tmp_path / name)
    assert model.design == DESIGN
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    state, expected = model.state_dict(), tensors_of(0, dtype)
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[key].float())


def test_reference_file_loads():
    model = load_beats(golden_audio("BEATs_small.pt"))
    assert model.design.num_classes == 527
    stored = torch.load(golden_audio("BEATs_small.pt"), weights_only=True)["model"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[key])


def test_by_product_of_training_is_the_tower_of_its_checkpoint():
    model = load_beats(golden_audio("VideoLLaMA2.1-tiny-AV/audio_tower.bin"))
    folder = golden_audio("VideoLLaMA2.1-tiny-AV/config.json").parent
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for key, tensor in model.state_dict().items():
        stored = load_file(folder / index["weight_map"][AUDIO_TOWER_PREFIX + key])[
            AUDIO_TOWER_PREFIX + key
        ]
        assert torch.equal(tensor, stored.float())


def test_head_may_be_absent(tmp_path):
    tensors = {k: t for k, t in tensors_of().items() if not k.startswith("predictor.")}
    cfg = {**CFG, "finetuned_model": False, "predictor_class": 527}
    write_published(tmp_path / "a.pt", tensors, cfg)
    assert load_beats(tmp_path / "a.pt").design.num_classes is None


@pytest.mark.parametrize("key", CFG)
def test_setting_that_cfg_leaves_out_is_taken_from_the_tensors(tmp_path, key):
    cfg = {name: value for name, value in CFG.items() if name != key}
    write_published(tmp_path / "a.pt", tensors_of(), cfg)
    assert load_beats(tmp_path / "a.pt").design == DESIGN


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("layer_norm_first", True, "False"),
        ("deep_norm", False, "True"),
        ("gru_rel_pos", False, "True"),
        ("relative_position_embedding", False, "True"),
        ("conv_bias", True, "False"),
        ("activation_fn", "relu", "'gelu'"),
        ("activation_fn", "gelu_accurate", "'gelu'"),
        ("max_distance", 128, "800"),
        ("max_distance", None, "800"),
        ("input_patch_size", 8, "16"),
        ("embed_dim", 512, "10"),
        ("encoder_layers", 12, "3"),
        ("encoder_embed_dim", 768, "12"),
        ("encoder_ffn_embed_dim", 3072, "20"),
        ("encoder_attention_heads", 12, "3"),
        ("num_buckets", 320, "32"),
        ("conv_pos", 128, "6"),
        ("conv_pos_groups", 16, "2"),
        ("finetuned_model", False, "True"),
        ("predictor_class", 527, "7"),
        ("encoder_layers", "3", "3"),
        ("deep_norm", ["\n\x1b[2J"] * 10**4, "True"),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_cfg_of_another_network_is_refused(tmp_path, key, value, expected):
    write_published(tmp_path / "a.pt", tensors_of(), {**CFG, key: value})
    assert f"cfg has {key} {value!r:.100}, expected {expected}, " in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("cfg", [None, [], "cfg", 7], ids=repr)
def test_file_without_a_cfg_is_refused(tmp_path, cfg):
    write_published(tmp_path / "a.pt", tensors_of(), cfg)
    assert "cfg: found " in refusal(tmp_path / "a.pt")


def test_file_of_something_else_is_refused(tmp_path):
    torch.save({"cfg": CFG, "state_dict": tensors_of()}, tmp_path / "a.pt")
    assert "holds no 'model', expected a dict of tensors" in refusal(tmp_path / "a.pt")
    torch.save(tensors_of(), tmp_path / "b.bin")
    wanted = f"expected only names that begin with '{AUDIO_TOWER_PREFIX}'"
    assert wanted in refusal(tmp_path / "b.bin")
    write_trained(tmp_path / "c.bin", {})
    assert "tensor patch_embedding.weight is missing" in refusal(tmp_path / "c.bin")
    (tmp_path / "d.txt").touch()
    assert "is no file of tensors" in refusal(tmp_path / "d.txt")
    with pytest.raises(CheckpointError, match=r"has no e\.pt"):
        load_beats(tmp_path / "e.pt")


def test_tensor_of_another_part_is_refused(tmp_path):
    prefixed = {AUDIO_TOWER_PREFIX + name: tensor for name, tensor in tensors_of().items()}
    torch.save(prefixed | {"model.mm_projector_a.0.bias": torch.ones(1)}, tmp_path / "a.bin")
    assert "holds tensor 'model.mm_projector_a.0.bias'" in refusal(tmp_path / "a.bin")


@KINDS
@pytest.mark.parametrize("key", list(tensors_of(0)))
def test_missing_tensor_is_refused_by_name(tmp_path, name, write, key):
    tensors = tensors_of(0)
    del tensors[key]
    write(tmp_path / name, tensors)
    line = refusal(tmp_path / name)
    # without its weight there is no head, so that its bias is the odd one
    found = f"tensor {key} is missing"
    if key == "predictor.weight":
        found = "finetuned_model True" if write is write_published else "'predictor.bias' [7] has"
    assert found in line


@KINDS
@pytest.mark.parametrize("key", list(tensors_of(0)))
def test_tensor_of_another_shape_is_refused(tmp_path, name, write, key):
    tensors = tensors_of(0)
    tensors[key] = torch.ones(1, 2, 3, 4, 5)
    write(tmp_path / name, tensors)
    line = refusal(tmp_path / name)
    assert key in line
    assert "[1, 2, 3, 4, 5]" in line


@KINDS
@pytest.mark.parametrize(
    "key",
    ["mask_emb", "encoder.layers.2.self_attn.extra", "encoder.layer_norm.weight\n\x1b", "x" * 1000],
    ids=repr,
)
def test_foreign_tensor_is_refused(tmp_path, name, write, key):
    write(tmp_path / name, tensors_of() | {key: torch.ones(3)})
    line = refusal(tmp_path / name)
    assert f"tensor {key!r:.100} [3] has no place in BEATs" in line


@KINDS
def test_copies_that_differ_are_refused(tmp_path, name, write):
    tensors = tensors_of()
    tensors[BIAS_NAME.format(2)][31, 2] += 1
    write(tmp_path / name, tensors)
    line = refusal(tmp_path / name)
    assert f"tensor {BIAS_NAME.format(2)} differs from that of layer 0" in line


@KINDS
def test_copy_of_another_shape_is_refused(tmp_path, name, write):
    write(tmp_path / name, tensors_of() | {BIAS_NAME.format(1): torch.ones(5)})
    assert f"tensor {BIAS_NAME.format(1)} differs" in refusal(tmp_path / name)


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("key", ["encoder.layers.1.fc1.weight", FIRST, "predictor.bias"])
def test_values_that_are_not_finite_are_refused(tmp_path, name, write, key, value):
    tensors = tensors_of()
    tensors[key].ravel()[-1] = value
    write(tmp_path / name, tensors)
    assert f"tensor {key} holds NaN or infinite values" in refusal(tmp_path / name)


@KINDS
def test_numbers_beyond_float32_are_refused(tmp_path, name, write):
    tensors = tensors_of(0, torch.float64)
    tensors["layer_norm.bias"][0] = 1e39
    write(tmp_path / name, tensors)
    assert "tensor layer_norm.bias holds NaN or infinite" in refusal(tmp_path / name)


@KINDS
def test_integers_are_refused(tmp_path, name, write):
    write(tmp_path / name, tensors_of() | {"layer_norm.bias": torch.ones(10, dtype=torch.int8)})
    assert "tensor layer_norm.bias holds torch.int8, expected floats" in refusal(tmp_path / name)


def test_widths_that_would_fill_the_memory_are_refused(tmp_path):
    # all this has its bytes, but a network of these widths would have 2 ** 40 weights
    wide = {
        "encoder.layer_norm.weight": torch.ones(2**19),
        "encoder.layers.0.fc1.weight": torch.ones(2**19, 1),
    }
    write_published(tmp_path / "a.pt", tensors_of(0) | wide)
    assert "need [524288, 10]" in refusal(tmp_path / "a.pt")
