"""Damaged folders: each is refused in one line that names the key, what it is and should be."""

import json
import re
from dataclasses import replace

import pytest
import torch

from tests.goldens import golden_audio
from tests.tiny import (
    SHORT_WINDOW,
    change_json,
    load_tiny,
    open_tiny,
    read_tensors,
    write_json,
    write_shards,
    write_tensors,
    write_tiny,
)
from vla2_models.checkpoint import Layer, open_checkpoint
from vla2_models.errors import CheckpointError
from vla2_models.hub import Source
from vla2_models.loading import build_empty, check_weights, claim_tensors, load_model

LM_HEAD = "lm_head.weight"
TOWER_KEY = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
FIRST_BLOCK = "model.mm_projector.s1.b1.conv1.conv.weight"
READOUT = "model.mm_projector.readout.0.weight"
BIAS = "model.audio_tower.encoder.layers.{}.self_attn.relative_attention_bias.weight"
AUDIO_KEY = "model.audio_tower.encoder.layers.1.fc2.weight"


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path)


def refusal(folder):
    """Load a folder that must be refused; return the line, which both ways of checking agree on."""
    with pytest.raises(CheckpointError) as loaded:
        load_tiny(folder)
    with pytest.raises(CheckpointError) as checked:
        check_weights(open_tiny(folder))
    line = str(loaded.value)
    assert line == str(checked.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


def test_whole_checkpoint_loads_and_counts_its_parameters(folder):
    model = load_tiny(folder)
    tensors = read_tensors(folder)
    assert check_weights(open_tiny(folder)) == sum(t.numel() for t in tensors.values())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.language_model.lm_head.weight, tensors[LM_HEAD])
    assert torch.equal(model.mm_projector.readout[0].weight, tensors[READOUT])
    assert torch.equal(model.vision_tower.encoder.layers[0].mlp.fc1.weight, tensors[TOWER_KEY])


@pytest.mark.parametrize("key", [LM_HEAD, TOWER_KEY, READOUT])
def test_missing_tensor_is_named(folder, key):
    tensors = read_tensors(folder)
    shape = list(tensors.pop(key).shape)
    write_tensors(folder, tensors)
    assert f"tensor {key} missing, found none, wanted {shape}" in refusal(folder)


def test_several_missing_tensors_are_counted(folder):
    tensors = {k: v for k, v in read_tensors(folder).items() if ".mm_projector." not in k}
    write_tensors(folder, tensors)
    assert re.search(
        r"tensor model\.mm_projector\.\S+ and 112 more tensors missing", refusal(folder)
    )


def test_foreign_tensor_is_named(folder):
    write_tensors(folder, read_tensors(folder) | {"model.audio_tower.weight": torch.zeros(3, 5)})
    line = refusal(folder)
    assert "tensor model.audio_tower.weight [3, 5]" in line
    assert "found [3, 5], wanted none" in line


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (LM_HEAD, "language model"),
        (TOWER_KEY, "tower"),
        (FIRST_BLOCK, "tower"),
        (READOUT, "connector"),
    ],
)
def test_tensor_of_another_shape_is_named_with_both(folder, key, part):
    tensors = read_tensors(folder)
    wanted = list(tensors[key].shape)
    tensors[key] = torch.zeros(7, 1)
    write_tensors(folder, tensors)
    assert f"tensor {key} is [7, 1], this config's {part} needs {wanted}" in refusal(folder)


def test_transposed_tensor_is_not_taken(folder):
    tensors = read_tensors(folder)
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].T.contiguous()
    write_tensors(folder, tensors)
    assert f"tensor {key} is [32, 128]" in refusal(folder)


def test_tensor_held_twice_names_both_files(folder):
    tensors = read_tensors(folder)
    write_shards(folder, {"a.safetensors": tensors, "b.safetensors": {LM_HEAD: tensors[LM_HEAD]}})
    line = refusal_of_files(folder, {"x": "a.safetensors", "y": "b.safetensors"})
    assert f"tensor {LM_HEAD} is held twice, by 'a.safetensors' and 'b.safetensors'" in line


def refusal_of_files(folder, weight_map):
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "no_header", "half_header", "tail"])
def test_truncated_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"'{path}' is not a whole safetensors file" in refusal(folder)


def test_text_instead_of_weights_is_refused(folder):
    # what git leaves where the large files were not fetched
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is not a whole safetensors file" in refusal(folder)


def test_absent_shard_is_named(folder):
    tensors = read_tensors(folder)
    write_shards(folder, {"a.safetensors": tensors, "b.safetensors": {"x": torch.zeros(1)}})
    (folder / "b.safetensors").unlink()
    assert "lacks 'b.safetensors', which its index names" in refusal(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors"])
def test_index_that_leaves_its_folder_is_refused(folder, name):
    line = refusal_of_files(folder, {LM_HEAD: name})
    assert f"names '{name}', which is outside its folder" in line


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}], ids=str)
def test_index_without_weight_map_is_refused(folder, content):
    write_json(folder / "model.safetensors.index.json", content)
    assert "has no weight_map" in refusal(folder)


def test_pickles_are_named_and_not_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"not even a pickle")
    line = refusal(folder)
    assert "only pickles such as 'pytorch_model-00001-of-00001.bin'" in line
    assert line.endswith(f"write them anew: vla2 models convert {folder} -o FOLDER")


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "holds no weights: expected model.safetensors, shards with an index," in refusal(folder)


def test_weights_of_other_config_are_refused_before_any_is_read(folder):
    change_json(folder / "config.json", num_hidden_layers=2)
    assert "tensor model.layers.1." in refusal(folder)


def test_sharded_checkpoint_equals_single_file(folder):
    single = load_tiny(folder).state_dict()
    tensors = read_tensors(folder)
    keys = sorted(tensors)
    shards = {
        f"model-0000{i + 1}-of-00003.safetensors": {k: tensors[k] for k in keys[i::3]}
        for i in range(3)
    }
    write_shards(folder, shards)
    checkpoint = open_tiny(folder)
    assert [path.name for path in checkpoint.weight_files()] == list(shards)
    assert checkpoint.size_bytes == sum((folder / name).stat().st_size for name in shards)
    sharded = load_tiny(folder).state_dict()
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[key], single[key]) for key in single)


def test_layers_are_settled_as_soon_as_they_are_read(tmp_path):
    folder = write_tiny(tmp_path, num_hidden_layers=3)
    tensors = read_tensors(folder)
    later = {key: tensors.pop(key) for key in list(tensors) if key.startswith("model.layers.2.")}
    # a layer of two files is whole after the second
    first_norm = "model.layers.0.input_layernorm.weight"
    later[first_norm] = tensors.pop(first_norm)
    damaged = later["model.layers.2.mlp.up_proj.weight"].fill_(float("nan"))
    write_shards(folder, {"a.safetensors": tensors, "b.safetensors": later})
    settled = []

    def settle(name, layer):
        assert not any(p.is_meta or p.requires_grad for p in layer.parameters())
        settled.append(name)

    with pytest.raises(CheckpointError, match="NaN"):
        load_model(open_tiny(folder), settle=settle)
    assert settled == ["model.layers.1"]
    damaged.fill_(1)
    write_shards(folder, {"a.safetensors": tensors, "b.safetensors": later})
    settled.clear()
    model = load_model(open_tiny(folder), settle=settle)
    assert settled == [f"model.layers.{i}" for i in (1, 0, 2)]
    whole = load_tiny(folder).state_dict()
    assert all(torch.equal(t, whole[name]) for name, t in model.state_dict().items())


def test_experts_of_two_dtypes_are_not_mixed(tmp_path):
    mixtral = {"model_type": "videollama2_mixtral", "num_local_experts": 2}
    folder = write_tiny(tmp_path, num_experts_per_tok=1, **mixtral)
    tensors = read_tensors(folder)
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    write_tensors(folder, tensors | {name: tensors[name].half()})
    with pytest.raises(CheckpointError, match=r"other experts of its layer are .*; give a --dtype"):
        load_model(open_tiny(folder), dtype=None)
    assert load_tiny(folder).dtype == torch.float32


def test_bfloat16_on_disk_loads_as_float32(folder):
    stored = {key: t.to(torch.bfloat16) for key, t in read_tensors(folder).items()}
    write_tensors(folder, stored)
    model = load_tiny(folder, torch.float32)
    assert model.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.language_model.lm_head.weight, stored[LM_HEAD].float())


def test_rotary_table_stays_float32_in_bfloat16(folder):
    # rounded to bfloat16 it would move every position
    model = load_tiny(folder, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.language_model.model.rotary_emb.inv_freq.device.type == "cpu"


def test_buffers_of_older_releases_are_ignored(folder):
    extra = {
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    plain = load_tiny(folder).state_dict()
    write_tensors(folder, read_tensors(folder) | extra)
    loaded = load_tiny(folder)
    assert all(torch.equal(loaded.state_dict()[key], plain[key]) for key in plain)
    assert loaded.vision_tower.embeddings.position_ids.tolist() == [list(range(17))]


def test_model_of_another_kind_is_refused(folder):
    change_json(folder / "config.json", model_type="llava")
    with pytest.raises(CheckpointError, match=r"of type 'llava', expected a VideoLLaMA 2"):
        open_tiny(folder)


def test_miniature_says_that_it_is_a_demonstration(folder):
    assert open_tiny(folder).config.is_demo
    assert json.loads((folder / "config.json").read_text())["vla2_demo_model"] is True


@pytest.fixture
def ears(tmp_path):
    """A checkpoint with ears; its audio tower has two layers."""
    return write_tiny(tmp_path, has_ears=True, **SHORT_WINDOW)


def change_tensors(folder, change):
    tensors = read_tensors(folder)
    change(tensors)
    write_tensors(folder, tensors)


def test_golden_ears_are_claimed_tensor_by_tensor():
    folder = golden_audio("VideoLLaMA2.1-tiny-AV/config.json").parent
    checkpoint = open_checkpoint(str(folder), Source(folder.parent, offline=True))
    # neither audio_tower.bin nor mm_projector_a.bin, which are beside them
    assert [path.name for path in checkpoint.weight_files()] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    claims = claim_tensors(checkpoint, build_empty(checkpoint.config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    claimed = {claim.public: claim.path.name for claim in claims}
    assert len(claims) == len(claimed)
    assert claimed == index["weight_map"]


def test_checkpoint_without_ears_has_no_tensors_of_them(folder):
    model = load_tiny(folder)
    assert (model.audio_tower, model.mm_projector_a) == (None, None)
    assert not [name for name in model.state_dict() if "audio" in name or "_a." in name]


def test_ears_load_and_count_their_parameters(ears):
    model, tensors = load_tiny(ears), read_tensors(ears)
    assert BIAS.format(1) in tensors
    own = sum(t.numel() for key, t in tensors.items() if key != BIAS.format(1))
    assert check_weights(open_tiny(ears), values=True) == own
    assert torch.equal(model.audio_tower.encoder.layers[1].fc2.weight, tensors[AUDIO_KEY])
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not model.audio_tower.training


def test_ears_load_in_bfloat16(ears):
    model = load_tiny(ears, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_copies_of_the_position_biases_may_be_absent(ears):
    with_copies = load_tiny(ears).state_dict()
    change_tensors(ears, lambda t: t.pop(BIAS.format(1)))
    without = load_tiny(ears).state_dict()
    assert without.keys() == with_copies.keys()
    assert all(torch.equal(t, with_copies[name]) for name, t in without.items())


def test_original_of_the_position_biases_may_not(ears):
    change_tensors(ears, lambda t: t.pop(BIAS.format(0)))
    assert BIAS.format(0).removeprefix("model.audio_tower.") in refusal(ears)


def differ(tensors):
    tensors[BIAS.format(1)][7, 1] += 1


def narrow(tensors):
    tensors[BIAS.format(1)] = tensors[BIAS.format(1)].half()


@pytest.mark.parametrize("change", [differ, narrow])
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_copy_that_differs_from_the_original_is_named(ears, change, is_first):
    tensors = read_tensors(ears)
    change(tensors)
    copy = {BIAS.format(1): tensors.pop(BIAS.format(1))}
    names = ("a", "b") if is_first else ("b", "a")
    write_shards(ears, dict(zip((f"{name}.safetensors" for name in names), (copy, tensors))))
    one, other = (1, 0) if not is_first else (0, 1)
    said = f"tensor {BIAS.format(one)} differs from {BIAS.format(other)}"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        load_tiny(ears)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        check_weights(open_tiny(ears), values=True)


def test_copy_with_a_nan_is_named(ears):
    change_tensors(ears, lambda t: t[BIAS.format(1)].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(BIAS.format(1))} holds NaN"):
        load_tiny(ears)


def test_copy_for_a_layer_that_is_not_there_is_refused(ears):
    change_tensors(ears, lambda t: t.update({BIAS.format(2): t[BIAS.format(0)].clone()}))
    assert "encoder.layers.2." in refusal(ears)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (BIAS.format(1), "audio tower"),
        ("model.audio_tower.encoder.layers.1.fc2.bias", "audio tower"),
        ("model.mm_projector_a.2.weight", "audio projector"),
    ],
)
def test_tensor_of_the_ears_of_another_shape_is_named_with_both(ears, key, part):
    wanted = list(read_tensors(ears)[key].shape)
    change_tensors(ears, lambda t: t.update({key: torch.zeros(7, 1)}))
    assert f"tensor {key} is [7, 1], this config's {part} needs {wanted}" in refusal(ears)


@pytest.mark.parametrize("key", [AUDIO_KEY, "model.mm_projector_a.0.bias"])
def test_missing_tensor_of_the_ears_is_named(ears, key):
    change_tensors(ears, lambda t: t.pop(key))
    assert f"tensor {key} missing, found none" in refusal(ears)


def test_ears_that_no_file_holds_are_refused(ears):
    tensors = read_tensors(ears)
    write_tensors(ears, {k: t for k, t in tensors.items() if ".audio_tower." not in k})
    # the by-product of training, whatever it holds, is not read
    torch.save(tensors, ears / "audio_tower.bin")
    line = refusal(ears)
    assert "names an mm_audio_tower, but no weight file holds a tensor model.audio_tower." in line


def test_ears_that_the_config_does_not_name_are_refused(ears):
    change_json(ears / "config.json", mm_audio_tower=None)
    assert re.search(r"tensor model\.(audio_tower|mm_projector_a)\.\S+ .* no place", refusal(ears))


def test_ears_of_two_models_are_refused(ears):
    change_json(ears / "config.json", mm_hidden_size_a=768)
    assert "mm_hidden_size_a is 768, but its audio tower is 32 wide" in refusal(ears)


def test_audio_tower_of_no_design_is_named_with_its_folder(ears):
    name = "model.audio_tower.patch_embedding.weight"
    change_tensors(ears, lambda t: t.update({name: torch.zeros(16, 1, 16, 8)}))
    assert "tensor patch_embedding.weight is [16, 1, 16, 8]" in refusal(ears)


def test_by_products_of_training_are_not_read(ears):
    for name in ("audio_tower.bin", "mm_projector_a.bin"):
        (ears / name).write_bytes(b"not even a pickle")
    assert [path.name for path in open_tiny(ears).weight_files()] == ["model.safetensors"]
    load_tiny(ears)


@pytest.mark.parametrize("kind", ["linear", "identity", "mlp3x_gelu"])
def test_every_kind_of_audio_projector_loads(tmp_path, kind):
    # the language model of `write_tiny` is as wide as the audio tower
    folder = write_tiny(tmp_path, has_ears=True, mm_projector_a_type=kind)
    num_linear = {"linear": 1, "identity": 0, "mlp3x_gelu": 3}[kind]
    model = load_tiny(folder)
    weights = [name for name in model.mm_projector_a.state_dict() if name.endswith("weight")]
    assert len(weights) == num_linear
    assert model.project_sound(torch.zeros(1, 5, 32)).shape == (1, 5, 32)


def test_copies_below_a_table_that_was_trained_on_do_not_count(ears, tmp_path):
    table = read_tensors(ears)[BIAS.format(0)] + 1
    folder = tmp_path / "above"
    folder.mkdir()
    write_tensors(folder, {BIAS.format(0): table})
    below = open_tiny(ears)
    above = Layer((folder / "model.safetensors",), {"": ""}, is_own=True)
    model = load_model(replace(below, layers=(above, *below.layers)))
    found = model.audio_tower.encoder.get_parameter(
        "layers.0.self_attn.relative_attention_bias.weight"
    )
    assert torch.equal(found, table)
