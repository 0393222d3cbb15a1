"""The three forms of a checkpoint: whole, projector on a language model, adapter on one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.goldens import golden, golden_source
from tests.tiny import change_json, open_tiny, tower_of, write_tensors, write_tiny
from vla2_models.checkpoint import open_checkpoint
from vla2_models.errors import CheckpointError
from vla2_models.fingerprint import hash_weights
from vla2_models.hub import Source
from vla2_models.loading import check_weights, load_model
from vla2_models.names import CONNECTOR_PREFIX, TOWER_PREFIX

WHOLE, BASE, LORA = (f"mistral_clip_stc_8f{form}" for form in ("", "_Base", "_lora"))
TOWER = "openai/clip-vit-tiny-patch14-56"
LANGUAGE = "mistralai/Mistral-tiny-open"


def open_golden(case):
    return open_checkpoint(str(golden(f"checkpoints/{case}/config.json").parent), golden_source())


def names_of(checkpoint):
    return [f"{path.parent.name}/{path.name}" for path in checkpoint.weight_files()]


@pytest.fixture
def own(tmp_path):
    """Copy a golden checkpoint and all it builds on, to be changed: `own(case)` -> its folder."""

    def copy(case):
        source = golden(f"checkpoints/{case}/config.json").parent
        for name in (TOWER, LANGUAGE):
            shutil.copytree(
                golden(f"towers/{name}/model.safetensors").parent, tmp_path / "hub" / name
            )
        folder = tmp_path / "checkpoints" / "renamed"
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        return folder

    return copy


def open_own(folder, **kwargs):
    return open_checkpoint(str(folder), Source(folder.parents[1] / "hub", offline=True), **kwargs)


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        load_model(open_own(folder))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_whole_checkpoint_is_its_own_files_alone():
    checkpoint = open_golden(WHOLE)
    assert checkpoint.form == "whole"
    assert names_of(checkpoint) == [f"{WHOLE}/model.safetensors"]
    assert checkpoint.text_folder == checkpoint.folder


def test_projector_builds_on_language_model_and_tower():
    checkpoint = open_golden(BASE)
    assert checkpoint.form == "projector"
    assert names_of(checkpoint) == [
        f"{BASE}/mm_projector.bin",
        "Mistral-tiny-open/model.safetensors",
        "clip-vit-tiny-patch14-56/model.safetensors",
    ]
    assert checkpoint.text_folder.name == "Mistral-tiny-open"


def test_adapter_builds_on_language_model_and_tower():
    checkpoint = open_golden(LORA)
    assert checkpoint.form == "adapter"
    assert names_of(checkpoint) == [
        f"{LORA}/adapter_model.bin",
        f"{LORA}/adapter_config.json",
        f"{LORA}/non_lora_trainables.bin",
        "Mistral-tiny-open/model.safetensors",
        "clip-vit-tiny-patch14-56/model.safetensors",
    ]


@pytest.mark.parametrize("case", [BASE, LORA])
def test_form_is_told_by_the_files_and_not_by_the_folders_name(own, case):
    # the reference takes a folder with "lora" in its name for one, and no other
    folder = own(case)
    assert folder.name == "renamed"
    assert open_own(folder).form == open_golden(case).form
    whole = own_whole_called(folder, "my-lora-Base")
    assert open_own(whole).form == "whole"


def own_whole_called(folder, name):
    source = golden(f"checkpoints/{WHOLE}/config.json").parent
    shutil.copytree(source, folder.parent / name)
    return folder.parent / name


@pytest.mark.parametrize(("is_tuned", "form"), [(True, "projector"), (False, "whole")])
def test_config_decides_where_a_folder_holds_both(own, is_tuned, form):
    folder = own(WHOLE)
    change_json(folder / "config.json", tune_mm_mlp_adapter=is_tuned, _name_or_path=LANGUAGE)
    projector = golden(f"checkpoints/{BASE}/mm_projector.bin")
    shutil.copyfile(projector, folder / "mm_projector.bin")
    assert open_own(folder).form == form


def lose_index(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard = {key: tensors[key] for key in keys}
        write_tensors(folder, shard, f"model-{i:05}-of-00002.safetensors")


@pytest.mark.parametrize("hide", [lambda folder: to_pickles(folder, 1), lose_index])
def test_projector_beside_any_whole_model_does_not_replace_it(own, hide):
    # its own language model would be ignored without a word
    folder = own(WHOLE)
    projector = golden(f"checkpoints/{BASE}/mm_projector.bin")
    shutil.copyfile(projector, folder / "mm_projector.bin")
    hide(folder)
    checkpoint = open_own(folder, allow_pickles=True)
    assert checkpoint.form == "whole"
    assert {path.parent for path in checkpoint.weight_files()} == {folder}


@pytest.mark.parametrize("case", [BASE, LORA])
def test_small_forms_take_tower_and_language_model_as_they_are(case):
    checkpoint = open_golden(case)
    model = load_model(checkpoint, dtype=None)
    tower = load_file(golden(f"towers/{TOWER}/model.safetensors"))
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, tower[f"vision_model.{name}"])
    language = load_file(golden(f"towers/{LANGUAGE}/model.safetensors"))
    adapted = 0
    for name, tensor in model.language_model.state_dict().items():
        adapted += not torch.equal(tensor, language[name])
    # seven linear layers in each of three decoder layers
    assert adapted == (21 if case == LORA else 0)


def test_projector_as_safetensors_equals_the_pickle(own):
    folder = own(BASE)
    first = load_model(open_own(folder)).state_dict()
    tensors = torch.load(folder / "mm_projector.bin", weights_only=True)
    save_file(tensors, folder / "mm_projector.safetensors")
    (folder / "mm_projector.bin").unlink()
    second = load_model(open_own(folder)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapter_on_a_whole_checkpoint_keeps_its_own_projector(own):
    # trained on from a VideoLLaMA 2, whose tower needs no other folder then
    folder = own(LORA)
    base = own_whole_called(folder, "base")
    change_json(folder / "config.json", _name_or_path=str(base))
    own_tensors = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    bias = "mm_projector.readout.2.bias"
    own_tensors[f"base_model.model.model.{bias}"] += 1
    torch.save(own_tensors, folder / "non_lora_trainables.bin")
    checkpoint = open_own(folder)
    assert [len(layer.files) for layer in checkpoint.layers] == [1, 1]
    state = load_model(checkpoint, dtype=None).state_dict()
    assert torch.equal(state[bias], own_tensors[f"base_model.model.model.{bias}"])
    of_base = load_file(base / "model.safetensors")
    embedding = "embeddings.class_embedding"
    assert torch.equal(state[f"vision_tower.{embedding}"], of_base[TOWER_PREFIX + embedding])


def test_adapter_on_a_projector_builds_on_all_of_it(own):
    folder = own(LORA)
    base = folder.parent / "base"
    shutil.copytree(golden(f"checkpoints/{BASE}/mm_projector.bin").parent, base)
    change_json(folder / "config.json", _name_or_path=str(base))
    checkpoint = open_own(folder)
    assert checkpoint.text_folder.name == "Mistral-tiny-open"
    found, expected = (
        load_model(checkpoint).state_dict(),
        load_model(open_golden(LORA)).state_dict(),
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("case", "other"), [(LORA, LORA), (BASE, BASE), (BASE, LORA)])
def test_form_that_cannot_be_built_upon_is_refused(own, case, other):
    folder = own(case)
    base = folder.parent / "base"
    shutil.copytree(golden(f"checkpoints/{other}/config.json").parent, base)
    change_json(folder / "config.json", _name_or_path=str(base))
    line = refusal(folder)
    assert f"'{folder}' builds on '{base}', which is no language model" in line
    assert line.endswith(f"vla2 models convert {base} -o FOLDER")


def test_base_whose_weights_are_quantised_is_refused(own):
    # int8 weights have the names and shapes of the floats they stand for
    folder = own(BASE)
    base = folder.parents[1] / "hub" / LANGUAGE
    change_json(base / "config.json", quantization_config={"load_in_8bit": True})
    assert f"builds on '{base}', whose weights are quantised" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool], ids=str)
def test_weights_that_are_no_whole_floats_are_refused(own, dtype):
    folder = own(BASE)
    base = folder.parents[1] / "hub" / LANGUAGE
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    write_tensors(base, tensors | {name: tensors[name].to(dtype)})
    assert f"tensor {name} holds {dtype}, expected floats" in refusal(folder)


def test_tensor_under_two_names_of_a_file_is_held_twice(own):
    folder = own(LORA)
    path = folder / "non_lora_trainables.bin"
    tensors = torch.load(path, weights_only=True)
    name = "model.mm_projector.readout.2.bias"
    torch.save(tensors | {name: torch.zeros(128)}, path)
    assert f"tensor {name} is held twice" in refusal(folder)


def test_merge_that_overflows_is_refused(own):
    folder = own(LORA)
    path = folder / "adapter_model.bin"
    tensors = torch.load(path, weights_only=True)
    for name in list(tensors)[:2]:
        tensors[name].fill_(1e3)
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=r"merged into model\.layers\.0\..* not finite"):
        load_model(open_own(folder), dtype=torch.float16)


def test_adapters_base_is_read_from_its_own_config_where_the_other_names_none(own):
    folder = own(LORA)
    change_json(folder / "config.json", _name_or_path=None)
    assert open_own(folder).text_folder.name == "Mistral-tiny-open"


def test_whole_checkpoint_without_its_tower_takes_the_named_one(own):
    folder = own(WHOLE)
    tensors = load_file(folder / "model.safetensors")
    write_tensors(folder, {k: t for k, t in tensors.items() if not k.startswith(TOWER_PREFIX)})
    checkpoint = open_own(folder)
    assert names_of(checkpoint)[1:] == ["clip-vit-tiny-patch14-56/model.safetensors"]
    assert check_weights(checkpoint) == check_weights(open_golden(WHOLE))


def test_tower_that_is_held_in_part_is_incomplete(own):
    folder = own(WHOLE)
    tensors = load_file(folder / "model.safetensors")
    key = f"{TOWER_PREFIX}post_layernorm.bias"
    del tensors[key]
    write_tensors(folder, tensors)
    assert f"tensor {key} missing" in refusal(folder)


def test_towers_folder_may_hold_a_whole_clip_model(own):
    # text tower and projections beside it, as the public one does
    folder = own(BASE)
    tower = folder.parents[1] / "hub" / TOWER
    tensors = load_file(tower / "model.safetensors")
    write_tensors(tower, tensors | {"logit_scale": torch.ones(()), "text_model.x": torch.ones(2)})
    assert check_weights(open_own(folder)) == check_weights(open_golden(WHOLE))


def test_towers_folder_may_be_a_pickle(own):
    folder = own(BASE)
    tower = folder.parents[1] / "hub" / TOWER
    tensors = load_file(tower / "model.safetensors")
    torch.save(tensors, tower / "pytorch_model.bin")
    first = load_model(open_own(folder)).state_dict()
    (tower / "model.safetensors").unlink()
    second = load_model(open_own(folder)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tower_without_weights_is_named(own):
    folder = own(BASE)
    (folder.parents[1] / "hub" / TOWER / "model.safetensors").unlink()
    line = refusal(folder)
    assert "clip-vit-tiny-patch14-56' has no model.safetensors" in line


def test_base_that_is_nowhere_is_named_with_the_way_out(own):
    folder = own(BASE)
    change_json(folder / "config.json", _name_or_path="/mnt/train/Mistral-7B")
    line = refusal(folder)
    assert f"'{folder}' builds on the language model '/mnt/train/Mistral-7B'" in line
    assert line.endswith("(or set _name_or_path in its config.json to that model's folder)")


def test_base_that_nobody_names_is_missed(own):
    folder = own(BASE)
    change_json(folder / "config.json", _name_or_path=None)
    assert f"'{folder}/config.json' has no _name_or_path" in refusal(folder)


def test_base_of_another_family_is_refused(own):
    folder = own(BASE)
    base = folder.parents[1] / "hub" / LANGUAGE
    change_json(base / "config.json", model_type="qwen2")
    line = refusal(folder)
    assert f"builds on '{base}' of type 'qwen2'; the two do not belong together" in line


def test_base_of_another_size_is_refused(own):
    folder = own(BASE)
    base = folder.parents[1] / "hub" / LANGUAGE
    tensors = load_file(base / "model.safetensors")
    write_tensors(base, tensors | {"lm_head.weight": torch.zeros(7, 128)})
    line = refusal(folder)
    assert f"'{base}': tensor lm_head.weight is [7, 128]" in line
    assert "needs [700, 128]" in line


@pytest.mark.parametrize("case", [BASE, LORA])
def test_foreign_tensor_in_a_small_form_is_refused(own, case):
    folder = own(case)
    name = "mm_projector.bin" if case == BASE else "non_lora_trainables.bin"
    tensors = torch.load(folder / name, weights_only=True)
    torch.save(tensors | {"model.mm_projector.s3.weight": torch.zeros(3)}, folder / name)
    assert f"tensor model.mm_projector.s3.weight [3] in '{name}' has no place" in refusal(folder)


def test_adapter_without_projector_says_what_is_missing(own):
    folder = own(LORA)
    (folder / "non_lora_trainables.bin").unlink()
    # its base may have a connector, which is another one
    line = refusal(folder)
    assert "has an adapter but no non_lora_trainables.bin, which holds its connector" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(next(iter(t))), "missing, found none"),
        (lambda t: t.update(foreign=torch.zeros(2)), "tensor foreign [2] has no place"),
        (lambda t: t.update({next(iter(t)): torch.zeros(9, 9)}), "is [9, 9]"),
        (lambda t: t[next(iter(t))].fill_(float("nan")), "holds NaN"),
    ],
    ids=["missing", "foreign", "shape", "nan"],
)
def test_damaged_adapter_is_refused(own, change, said):
    folder = own(LORA)
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "adapter_model.bin")
    line = refusal(folder)
    assert said in line
    assert "adapter_model.bin" in line or str(folder) in line


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json"])
def test_adapter_without_a_config_is_refused(own, name):
    folder = own(LORA)
    (folder / name).unlink()
    assert f"'{folder}' has no {name}" in refusal(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_config.json"])
def test_hash_of_the_model_notices_another_adapter(own, tmp_path, name):
    folder = own(LORA)
    cache = tmp_path / "cache.json"
    before = hash_weights(open_own(folder).weight_files(), cache)
    if name == "adapter_config.json":
        change_json(folder / name, lora_alpha=16)
    else:
        tensors = torch.load(folder / name, weights_only=True)
        next(iter(tensors.values())).add_(1)
        torch.save(tensors, folder / name)
    assert hash_weights(open_own(folder).weight_files(), cache) != before


def to_pickles(folder, num_files):
    """Hold a tiny checkpoint's weights as older public ones do."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    keys, weight_map = sorted(tensors), {}
    for i in range(num_files):
        name = f"pytorch_model-{i + 1:05}-of-{num_files:05}.bin"
        torch.save({key: tensors[key] for key in keys[i::num_files]}, folder / name)
        weight_map |= dict.fromkeys(keys[i::num_files], name)
    index = {"weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("num_files", [1, 3])
def test_whole_model_of_pickles_is_read_only_when_allowed(tmp_path, num_files):
    folder = write_tiny(tmp_path)
    first = load_model(open_tiny(folder)).state_dict()
    to_pickles(folder, num_files)
    with pytest.raises(CheckpointError, match="write them anew: vla2 models convert"):
        open_tiny(folder)
    checkpoint = open_checkpoint(str(folder), Source(tmp_path), allow_pickles=True)
    second = load_model(checkpoint).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_base_of_pickles_is_read_only_when_allowed(own):
    folder = own(BASE)
    base = folder.parents[1] / "hub" / LANGUAGE
    to_pickles(base, 1)
    # what is to be converted is the checkpoint: its base alone is no VideoLLaMA 2
    assert refusal(folder).endswith(f"vla2 models convert {folder} -o FOLDER")
    checkpoint = open_own(folder, allow_pickles=True)
    assert check_weights(checkpoint) == check_weights(open_golden(WHOLE))


def test_shards_without_their_index_are_found(tmp_path):
    folder = write_tiny(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    for i in (0, 1):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        write_tensors(folder, {key: tensors[key] for key in keys[i::2]}, name)
    assert check_weights(open_tiny(folder)) == sum(t.numel() for t in tensors.values())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no index and 1 shards, but '.*' is one of 00002"):
        check_weights(open_tiny(folder))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("VideoLLaMA2-7B", "DAMO-NLP-SG/VideoLLaMA2-7B"),
        ("DAMO-NLP-SG/VideoLLaMA2-7b-16f", "DAMO-NLP-SG/VideoLLaMA2-7B-16F"),
        ("vla2/minature-7B", "vla2/miniature-7B"),
    ],
)
def test_wrong_id_suggests_the_nearest(tmp_path, name, near):
    write_tiny(tmp_path)
    with pytest.raises(CheckpointError, match=f"did you mean '{near}'\\?$"):
        open_checkpoint(name, Source(tmp_path, offline=True))


def test_id_that_is_like_no_other_gets_no_suggestion(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not fetched offline$"):
        open_checkpoint("someone/bert", Source(tmp_path, offline=True))


def test_tower_is_found_where_the_checkpoint_is(tmp_path):
    folder = write_tiny(tmp_path)
    assert open_tiny(folder).config.mm_hidden_size == 48
    shutil.rmtree(tower_of(folder))
    with pytest.raises(CheckpointError, match="clip-vit-miniature"):
        open_checkpoint(str(folder), Source(tmp_path, offline=True))


def take_apart(case, place):
    """Lay a whole golden checkpoint out as its Base form: projector, language model and tower."""
    source = golden(f"checkpoints/{case}/config.json").parent
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    parts = {TOWER_PREFIX: {}, CONNECTOR_PREFIX: {}, "": {}}
    for key, tensor in tensors.items():
        parts[next(prefix for prefix in parts if key.startswith(prefix))][key] = tensor
    folder, language, tower = (place / name for name in ("base", "hub/lm/it", "hub/tower/it"))
    shutil.copytree(golden(f"towers/{config['mm_vision_tower']}/config.json").parent, tower)
    shutil.copytree(source, language, copy_function=shutil.copyfile)
    for path in (language, tower):
        path.chmod(0o755)
    folder.mkdir()
    mm = {"_name_or_path": "lm/it", "mm_vision_tower": "tower/it", "tune_mm_mlp_adapter": True}
    (folder / "config.json").write_text(json.dumps(config | mm))
    change_json(
        language / "config.json", model_type=config["model_type"].removeprefix("videollama2_")
    )
    torch.save(parts[CONNECTOR_PREFIX], folder / "mm_projector.bin")
    write_tensors(language, parts[""])
    of_tower = parts[TOWER_PREFIX].items()
    write_tensors(tower, {"vision_model." + k.removeprefix(TOWER_PREFIX): t for k, t in of_tower})
    return folder


FAMILIES = ["mixtral_clip_stc_8f", "qwen2_siglip_stcv35_16f"]


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_has_a_base_form(tmp_path, case):
    folder = take_apart(case, tmp_path)
    checkpoint = open_checkpoint(str(folder), Source(tmp_path / "hub", offline=True))
    assert [len(layer.files) for layer in checkpoint.layers] == [1, 1, 1]
    model = load_model(checkpoint, dtype=None).state_dict()
    whole = load_model(open_golden(case), dtype=None).state_dict()
    assert model.keys() == whole.keys()
    assert all(torch.equal(model[name], whole[name]) for name in whole)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's way to write
@pytest.mark.parametrize("case", FAMILIES)
def test_adapter_that_peft_wrote_is_merged_as_peft_merges_it(tmp_path, case):
    from peft import LoraConfig, get_peft_model

    folder = take_apart(case, tmp_path)
    source = Source(tmp_path / "hub", offline=True)
    model = load_model(open_checkpoint(str(folder), source))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model.language_model, config)
    (folder / "mm_projector.bin").rename(folder / "non_lora_trainables.bin")
    adapted.save_pretrained(folder, save_embedding_layers=False)  # else it looks on the hub
    assert (folder / "adapter_model.safetensors").exists()
    expected = adapted.merge_and_unload().state_dict()
    found = load_model(open_checkpoint(str(folder), source))
    for name, tensor in found.language_model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
