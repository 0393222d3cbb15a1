"""Adapters against the plain formula, on files written by peft 0.4.0 and on tiny random models."""

import copy
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from tests.goldens import golden
from tests.tiny import FAMILIES, tiny_language_model
from vla2_models.adapter import adapter_shapes, merge_adapter, read_adapter_config
from vla2_models.errors import CheckpointError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]  # upstream's targets

# no two matrices of the same shape; torch takes only rows of whole 16 bytes for Mixtral's experts
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "head_dim": 14,
    "num_local_experts": 3,  # only Mixtral looks at it
}
ATOL = 1e-6  # what the order of sums in a float32 product may change
MODELS_FOLDER = Path(__file__).parents[2] / "models"
O_PROJ_B = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an adapter reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def build(name="mistral", dtype=torch.float32, **changes):
    """A random model; biases and norms too, so that a change of any of them is seen."""
    model = tiny_language_model(name, **(SIZES | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def build_empty(name="mistral", **changes):
    with init_empty_weights():
        return tiny_language_model(name, **(SIZES | changes))


def write_config(folder, **changes):
    """Write an adapter_config.json with peft 0.4.0's fields."""
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": "somewhere/else",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 3,
        "revision": None,
        "target_modules": ATTENTION,
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | changes), encoding="utf-8")
    return folder


def configure(folder, **changes):
    return read_adapter_config(write_config(folder, **changes))


def refusal(folder, **changes):
    with pytest.raises(CheckpointError) as raised:
        configure(folder, **changes)
    line = str(raised.value)
    assert "\n" not in line
    assert f"'{folder / 'adapter_config.json'}'" in line
    return line


def draw(shapes, dtype=torch.float32):
    """Random tensors for an adapter, where peft would have begun with zeros."""
    generator = torch.Generator().manual_seed(11)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def deltas(tensors, scaling):
    """Weight's name -> scaling * B A in float32; `scaling` is a function of the name and r."""
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = re.sub(r"^base_model\.model\.(.+)\.lora_A\.weight$", r"\1.weight", key)
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            found[name] = scaling(name, a.shape[0]) * (b.float() @ a.float())
    assert len(found) == len(tensors) / 2
    return found


def assert_merged(model, before, expected):
    """Check each weight: before + delta where there is one, else untouched to the bit."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert expected.keys() <= before.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        if name not in expected:
            assert torch.equal(after[name], weight), name
            continue
        wanted = (weight.float() + expected[name]).to(weight.dtype)
        assert not torch.equal(after[name], weight), name
        # where float32 sums differ, the smaller dtypes may round to the neighbour
        rtol = 0 if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps
        torch.testing.assert_close(after[name], wanted, atol=ATOL, rtol=rtol)


def classes_of(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.fixture
def golden_folder():
    return golden("checkpoints/mistral_clip_stc_8f_lora/adapter_model.bin").parent


@pytest.fixture
def golden_tensors(golden_folder):
    return torch.load(golden_folder / "adapter_model.bin", weights_only=True)


@pytest.fixture
def golden_base():
    """The base's weights as they are mapped from its file, and that file."""
    path = golden("towers/mistralai/Mistral-tiny-open/model.safetensors")
    return load_file(path), path


def golden_model(tensors, path):
    config = MistralConfig.from_pretrained(path.parent)
    with init_empty_weights():
        model = MistralForCausalLM(config)
    model.load_state_dict(tensors, assign=True)
    return model


def test_golden_adapter_holds_exactly_the_tensors_asked_for(
    golden_folder, golden_tensors, golden_base
):
    config = read_adapter_config(golden_folder)
    found = {key: tuple(tensor.shape) for key, tensor in golden_tensors.items()}
    assert adapter_shapes(golden_model(*golden_base), config) == found
    assert len(found) == 3 * 7 * 2


def test_golden_adapter_merges_as_the_formula(golden_folder, golden_tensors, golden_base):
    tensors = {key: tensor.float() for key, tensor in golden_base[0].items()}
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    raw = json.loads((golden_folder / "adapter_config.json").read_text(encoding="utf-8"))
    model = golden_model(tensors, golden_base[1])
    merge_adapter(model, read_adapter_config(golden_folder), golden_tensors)
    scaling = raw["lora_alpha"] / raw["r"]
    assert_merged(model, before, deltas(golden_tensors, lambda name, r: scaling))


def test_weights_mapped_from_a_file_merge_and_the_file_stays(
    golden_folder, golden_tensors, golden_base, tmp_path
):
    # float16, so that nothing is converted and the weights are the file's own pages
    path = tmp_path / "model.safetensors"
    path.write_bytes(golden_base[1].read_bytes())
    path.chmod(0o444)
    model = golden_model(load_file(path), golden_base[1])
    merge_adapter(model, read_adapter_config(golden_folder), golden_tensors)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert path.read_bytes() == golden_base[1].read_bytes()
    assert_merged(model, golden_base[0], deltas(golden_tensors, lambda name, r: 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "targets"),
    [("mistral", ALL_LINEAR), ("qwen2", ALL_LINEAR), ("mixtral", ATTENTION)],
    ids=["mistral", "qwen2", "mixtral"],
)
def test_merge_leaves_a_plain_model(tmp_path, name, targets, dtype):
    config = configure(tmp_path, target_modules=targets)
    model = build(name, dtype).train()
    classes, attributes = classes_of(model), vars(model).keys()
    fields = model.config.to_dict()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors = draw(adapter_shapes(model, config), torch.bfloat16)
    assert len(tensors) == 2 * len(targets) * 2
    merge_adapter(model, config, tensors)
    assert_merged(model, before, deltas(tensors, lambda name, r: 2))
    assert classes_of(model) == classes
    assert vars(model).keys() == attributes
    assert model.config.to_dict() == fields
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sum_is_rounded_once(tmp_path, dtype):
    config = configure(tmp_path, target_modules=["q_proj"])
    model = build(dtype=dtype)
    q_proj = model.model.layers[0].self_attn.q_proj
    weight = q_proj.weight.detach().clone()
    tensors = draw(adapter_shapes(model, config))
    delta = deltas(tensors, lambda name, r: 2)["model.layers.0.self_attn.q_proj.weight"]
    merge_adapter(model, config, tensors)
    once = (weight.float() + delta).to(dtype)
    assert not torch.equal(once, weight + delta.to(dtype))
    # a float32 sum may differ by an ulp and then round to the neighbour, but hardly ever
    assert (q_proj.weight == once).float().mean() > 0.99


def test_rank_stabilised_adapter_is_scaled_by_the_root_of_its_rank(tmp_path):
    config = configure(tmp_path, use_rslora=True)
    model = build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors = draw(adapter_shapes(model, config))
    merge_adapter(model, config, tensors)
    assert_merged(model, before, deltas(tensors, lambda name, r: 6 / math.sqrt(3)))


def test_patterns_change_rank_and_scale_of_the_layers_they_name(tmp_path):
    config = configure(
        tmp_path,
        rank_pattern={"layers.1.self_attn.q_proj": 5, "v_proj": 2},
        alpha_pattern={"v_proj": 8.5},
    )
    model = build()
    shapes = adapter_shapes(model, config)
    ranks = {key: shape[0] for key, shape in shapes.items() if ".lora_A." in key}
    assert all(
        rank == (2 if "v_proj" in key else 5 if "1.self_attn.q_proj" in key else 3)
        for key, rank in ranks.items()
    )
    assert sorted(ranks.values()) == [2, 2, 3, 3, 3, 3, 3, 5]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors = draw(shapes)
    merge_adapter(model, config, tensors)
    assert_merged(model, before, deltas(tensors, lambda n, r: (8.5 if "v_proj" in n else 6) / r))


def test_only_the_layers_that_are_named_get_tensors(tmp_path):
    chosen = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    wanted = {f"{name}.lora_A.weight": (3, 24), f"{name}.lora_B.weight": (56, 3)}
    assert adapter_shapes(build_empty(), configure(tmp_path, **chosen)) == wanted
    excluded = {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}
    assert adapter_shapes(build_empty(), configure(tmp_path, **excluded)) == wanted
    pattern = r".*\.1\..*q_proj"
    assert adapter_shapes(build_empty(), configure(tmp_path, target_modules=pattern)) == wanted


def test_all_linear_layers_leave_the_head_out(tmp_path):
    config = configure(tmp_path, target_modules="all-linear")
    shapes = adapter_shapes(build_empty(), config)
    assert shapes == adapter_shapes(build_empty(), configure(tmp_path, target_modules=ALL_LINEAR))


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_need_no_weights_and_change_nothing(tmp_path, name):
    config = configure(tmp_path)
    asked = copy.deepcopy(config)
    empty, full = build_empty(name).train().requires_grad_(True), build(name)
    classes, attributes = classes_of(empty), vars(empty).keys()
    assert adapter_shapes(empty, config) == adapter_shapes(full, config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert all(p.requires_grad for p in empty.parameters())
    assert empty.training
    assert classes_of(empty) == classes
    assert vars(empty).keys() == attributes
    assert config == asked


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(O_PROJ_B),
        lambda tensors: tensors.update({O_PROJ_B.replace("o_proj", "p_proj"): torch.zeros(1)}),
        lambda tensors: tensors.update({O_PROJ_B: tensors[O_PROJ_B].T}),
    ],
    ids=["missing", "foreign", "transposed"],
)
def test_file_that_holds_other_tensors_differs_and_is_not_merged(tmp_path, change):
    config, model = configure(tmp_path), build()
    shapes = adapter_shapes(model, config)
    tensors = draw(shapes)
    change(tensors)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} != shapes
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(AssertionError, match=r"differ: .*layers\.1\.self_attn"):
        merge_adapter(model, config, tensors)
    assert_merged(model, before, {})


@pytest.mark.parametrize(
    ("name", "targets", "line"),
    [
        ("mistral", ["c_attn", "a"], r'target_modules \["a", "c_attn"\] fit no layer of a Mistral'),
        ("mistral", [], r"target_modules \[\] fit no layer"),
        ("mistral", "q_proj", 'target_modules "q_proj" fit no layer'),
        ("mistral", "dummy-target-modules", "fit no layer"),
        ("mistral", "(q_proj", "cannot be put on a MistralForCausalLM: missing"),
        ("mistral", ["embed_tokens"], r"'model.embed_tokens' .* a Embedding, and only linear"),
        ("mistral", ["self_attn"], "cannot be put on a MistralForCausalLM: Target module"),
        ("mixtral", [*ATTENTION, "w1", "w2", "w3"], r"'model.layers.0.mlp.experts' .* only linear"),
        ("mixtral", ["w2"], r"'model.layers.0.mlp.experts' .* a MixtralExperts, and only linear"),
        ("mixtral", ["w1"], "cannot be put on a MixtralForCausalLM: Cannot convert PEFT"),
        ("mixtral", ["gate"], r"'model.layers.0.mlp.gate' .* a MixtralTopKRouter, and only"),
        ("mixtral", "all-linear", "only linear layers can be merged"),
    ],
)
def test_targets_that_cannot_be_merged_are_refused_in_one_line(tmp_path, name, targets, line):
    config = configure(tmp_path, target_modules=targets)
    with pytest.raises(CheckpointError, match=line) as raised:
        adapter_shapes(build_empty(name), config)
    assert "\n" not in str(raised.value)


def test_head_is_adapted_unless_it_is_tied_to_the_embeddings(tmp_path):
    config = configure(tmp_path, target_modules=["lm_head"])
    assert len(adapter_shapes(build_empty("qwen2"), config)) == 2
    with pytest.raises(CheckpointError, match="'lm_head' of a Qwen2ForCausalLM, which is tied"):
        adapter_shapes(build_empty("qwen2", tie_word_embeddings=True), config)


def test_merge_beside_tied_embeddings_keeps_them_tied(tmp_path):
    config, model = configure(tmp_path), build("qwen2", tie_word_embeddings=True)
    merge_adapter(model, config, draw(adapter_shapes(model, config)))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_config_of_old_and_of_coming_releases_is_read(tmp_path):
    plain = configure(tmp_path)
    config = configure(
        tmp_path,
        enable_lora=None,
        field_of_tomorrow={"a": [1]},
        runtime_config={"ephemeral_gpu_offload": True},
        loftq_config={},
        megatron_core="megatron.core",
        qalora_group_size=16,
        use_dora=False,
        task_type="OF_TOMORROW",
        fan_in_fan_out=True,
    )
    assert adapter_shapes(build_empty(), config) == adapter_shapes(build_empty(), plain)


def test_named_class_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "vla2_trap.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Model", "parent_library": "vla2_trap"}
    config = configure(tmp_path, auto_mapping=mapping, task_type=None)
    assert config.auto_mapping is None


def test_nothing_is_fetched_or_said_by_what_peft_imports(tmp_path):
    # a bitsandbytes that does as the real one on some processors: it runs code from the hub
    package = write_config(tmp_path) / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import logging, types\n"
        "nn = types.SimpleNamespace()\n"
        "try:\n"
        "    import kernels\n"
        "except ImportError:\n"
        "    logging.getLogger('bitsandbytes').warning('no kernels')\n"
    )
    (tmp_path / "kernels.py").write_text("raise AssertionError('code from the hub')")
    code = (
        "import sys; from pathlib import Path; "
        "from vla2_models.adapter import read_adapter_config; "
        "print(read_adapter_config(Path(sys.argv[1])).r, end=''); "
        "assert sys.modules['bitsandbytes'].__file__.startswith(sys.argv[1]); "
        "assert 'kernels' not in sys.modules"
    )
    # a process of its own, since this one may have imported the real ones
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(MODELS_FOLDER)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("3", "")


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("peft_type", "IA3", 'peft_type is "IA3", expected "LORA"'),
        ("peft_type", None, "peft_type is null"),
        ("peft_type", ["LORA"], 'peft_type is ["LORA"]'),
        ("bias", "all", 'bias "all" is not supported, expected "none"'),
        ("modules_to_save", ["lm_head"], 'modules_to_save ["lm_head"] is not supported'),
        ("use_dora", True, "use_dora true is not supported"),
        ("target_parameters", ["experts"], 'target_parameters ["experts"] is not supported'),
        ("layer_replication", [[0, 2]], "layer_replication [[0, 2]] is not supported"),
        ("init_lora_weights", "pissa_niter_4", 'init_lora_weights "pissa_niter_4" trains beside'),
        ("r", 0, "r is 0, expected a whole number from 1"),
        ("r", "8", 'r is "8"'),
        ("r", True, "r is true"),
        ("r", None, "r is null"),
        ("lora_alpha", None, "lora_alpha is null, expected a number"),
        ("lora_alpha", math.nan, "lora_alpha is NaN"),
        ("target_modules", None, "target_modules is null, expected a list of names"),
        ("target_modules", [1], "target_modules is [1]"),
        ("exclude_modules", 3, "exclude_modules is 3"),
        ("layers_to_transform", "1", 'layers_to_transform is "1", expected numbers of layers'),
        ("rank_pattern", {"q_proj": 0}, 'rank_pattern is {"q_proj": 0}'),
        ("alpha_pattern", [1], "alpha_pattern is [1], expected an object of numbers"),
        ("use_rslora", 1, "use_rslora is 1, expected true or false"),
        ("layers_pattern", "layers", "is not understood: When `layers_pattern` is specified"),
    ],
)
def test_config_that_is_no_plain_lora_is_refused(tmp_path, field, value, line):
    assert line in refusal(tmp_path, **{field: value})


@pytest.mark.parametrize(
    ("text", "line"),
    [("{", "cannot be read"), ("[]", "holds a list, expected an object")],
)
def test_damaged_config_is_refused(tmp_path, text, line):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=line):
        read_adapter_config(tmp_path)


def test_absent_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read_adapter_config(tmp_path)
