import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.goldens import (
    RUNS,
    golden,
    golden_audio,
    golden_engine,
    golden_source,
    runs_of,
    tensors_of,
)
from tests.tiny import change_json, load_tiny, open_tiny, read_tensors, write_tiny
from vla2_models.checkpoint import open_checkpoint
from vla2_models.errors import CheckpointError
from vla2_models.hub import Source
from vla2_models.loading import load_model
from vla2_models.saving import save_checkpoint
from vla2cli.config import GenerationChoice
from vla2cli.engine import Ask, Engine, MediaTokens

CASES = dict.fromkeys(case for case, _ in RUNS)
WHOLE_CASES = [case for case in CASES if not case.endswith(("_Base", "_lora"))]


def convert(case, folder, dtype=None, **kwargs):
    """Write a golden checkpoint anew, tensors as they are stored; return it and what was saved."""
    first = open_checkpoint(str(golden(f"checkpoints/{case}/config.json").parent), golden_source())
    model = load_model(first, dtype=dtype)
    save_checkpoint(model, first, folder, **kwargs)
    return first, open_checkpoint(str(folder), golden_source()), model


def same_bytes(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("case", CASES)
def test_load_save_load_gives_the_same_bytes(case, tmp_path):
    _, again, model = convert(case, tmp_path / "out")
    first, second = model.state_dict(), load_model(again, dtype=None).state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not same_bytes(first[name], second[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_saved_checkpoint_says_the_same_ids(case, tmp_path):
    # an adapter that is merged in the base's float16 is rounded once more
    dtype = torch.float32 if case.endswith("_lora") else None
    _, again, _ = convert(case, tmp_path / "out", dtype)
    engine = Engine(again, device="cpu", dtype="float32")
    about, expected = runs_of(case)["cap"], tensors_of(case, "cap")
    ask = Ask(about["instruct"], "video", MediaTokens(expected["projector_tokens"][0]))
    settings = engine.settings(GenerationChoice(max_new_tokens=about["max_new_tokens"]))
    said = [e.answer([ask], settings)[0].generation.ids for e in (golden_engine(case), engine)]
    assert said[0] == said[1] == tuple(expected["generated_ids"].tolist())


@pytest.mark.parametrize("case", WHOLE_CASES)
def test_names_tensors_and_settings_are_those_of_the_public_file(case, tmp_path):
    first, again, _ = convert(case, tmp_path / "out")
    stored = {k: t for path in first.weight_files() for k, t in load_file(path).items()}
    (path,) = again.weight_files()
    saved = load_file(path)
    assert saved.keys() == stored.keys()
    assert all(same_bytes(saved[key], stored[key]) for key in stored)
    before = json.loads((first.folder / "config.json").read_text())
    assert json.loads((again.folder / "config.json").read_text()) == before
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes()


@pytest.mark.parametrize("case", ["mistral_clip_stc_8f_Base", "mistral_clip_stc_8f_lora"])
def test_small_forms_become_whole(case, tmp_path):
    first, again, _ = convert(case, tmp_path / "out")
    assert len(first.layers) == 3
    assert again.text_folder == tmp_path / "out"
    assert [path.name for path in again.weight_files()] == ["model.safetensors"]
    public = golden("checkpoints/mistral_clip_stc_8f/model.safetensors")
    assert load_file(again.weight_files()[0]).keys() == load_file(public).keys()
    config = json.loads((again.folder / "config.json").read_text())
    assert (config["tune_mm_mlp_adapter"], config["torch_dtype"]) == (False, "float16")


def test_weights_are_cut_into_shards_of_the_size_asked_for(tmp_path):
    _, again, model = convert("mixtral_clip_stc_8f", tmp_path / "out", max_shard_bytes=10**6)
    files = again.weight_files()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert len(files) == -(-size // 10**6)
    assert [path.name for path in files][:1] == [f"model-00001-of-{len(files):05}.safetensors"]
    assert all(path.stat().st_size < 1.05e6 for path in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    for key, name in index["weight_map"].items():
        assert key in load_file(tmp_path / "out" / name)
    second = load_model(again, dtype=None).state_dict()
    assert all(same_bytes(t, second[name]) for name, t in model.state_dict().items())


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path / "hub")


@pytest.mark.parametrize("has_copies", [True, False])
def test_checkpoint_with_ears_is_written_as_the_public_one_is(tmp_path, has_copies):
    golden = golden_audio("VideoLLaMA2.1-tiny-AV/config.json").parent
    source = Source(golden.parent, offline=True)
    stored = {k: t for path in golden.glob("*.safetensors") for k, t in load_file(path).items()}
    given = tmp_path / "given"
    shutil.copytree(golden, given, copy_function=shutil.copyfile)
    given.chmod(0o755)
    if not has_copies:  # as audio_tower.bin holds them
        for path in given.glob("*.safetensors*"):
            path.unlink()
        copies = [f"layers.{i}.self_attn.relative_attention_bias.weight" for i in (1, 2)]
        fewer = {k: t for k, t in stored.items() if not k.endswith(tuple(copies))}
        assert len(fewer) == len(stored) - 2
        save_file(fewer, given / "model.safetensors", metadata={"format": "pt"})
    first = open_checkpoint(str(given), source)
    model = load_model(first, dtype=None)
    save_checkpoint(model, first, tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(same_bytes(saved[key], stored[key]) for key in stored)
    before = json.loads((golden / "config.json").read_text())
    assert json.loads((tmp_path / "out/config.json").read_text()) == before
    assert not list((tmp_path / "out").glob("*.bin"))
    again = open_checkpoint(str(tmp_path / "out"), source)
    assert again.config.audio == first.config.audio
    second = load_model(again, dtype=None).state_dict()
    assert all(same_bytes(t, second[name]) for name, t in model.state_dict().items())


def test_copies_may_lie_in_two_shards(tmp_path):
    folder = write_tiny(tmp_path / "hub", has_ears=True)
    checkpoint = open_tiny(folder)
    save_checkpoint(load_model(checkpoint), checkpoint, tmp_path / "out", max_shard_bytes=10**4)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {f for k, f in index["weight_map"].items() if k.endswith("attention_bias.weight")}
    assert len(files) == 2
    assert load_tiny_again(tmp_path / "out", folder)


def save(folder, out, dtype=None):
    checkpoint = open_tiny(folder)
    save_checkpoint(load_model(checkpoint, dtype=dtype), checkpoint, out)


def test_dtype_of_the_weights_is_written_down(folder, tmp_path):
    save(folder, tmp_path / "out", torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = read_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_settings_of_newer_configs_are_written_as_the_public_code_reads_them(folder, tmp_path):
    # as transformers 5 writes them: the public code would take rope_theta 10000 and float32
    rope = {"rope_type": "default", "rope_theta": 5e5}
    change_json(
        folder / "config.json",
        rope_theta=None,
        torch_dtype=None,
        rope_parameters=rope,
        dtype="bfloat16",
    )
    save(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5e5, "float32")
    assert not {"rope_parameters", "dtype"} & config.keys()


def test_scaled_positions_are_written_in_the_older_form(folder, tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    change_json(folder / "config.json", rope_theta=None, rope_parameters=rope)
    save(folder, tmp_path / "out")
    shutil.copytree(tmp_path / "out", folder.parent / "again")
    found = open_tiny(folder.parent / "again").config.language.rope_parameters
    # "type" is the older name of "rope_type"
    assert found == open_tiny(folder).config.language.rope_parameters | {"type": "linear"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["type"] == "linear"


def test_folder_that_is_not_empty_is_left_alone(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"'.*out' exists already; give a new folder"):
        save(folder, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("kind", ["folder", "link", "here"])
def test_empty_folder_is_filled(folder, tmp_path, monkeypatch, kind):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "empty"
    if kind == "link":
        out = tmp_path / "out"
        out.symlink_to(tmp_path / "empty")
    if kind == "here":
        monkeypatch.chdir(tmp_path / "empty")
        out = Path()
    save(folder, out)
    assert load_tiny_again(tmp_path / "empty", folder)
    assert not [path for path in (tmp_path / "empty").iterdir() if path.name.startswith(".")]


def load_tiny_again(out, folder):
    place = folder.parent / "again"
    shutil.copytree(out, place)
    first, second = load_tiny(folder).state_dict(), load_tiny(place).state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_saving_that_is_ended_while_files_are_moved_leaves_nothing(folder, tmp_path, monkeypatch):
    replace = Path.replace

    def end(path, target):
        if path.name == "model.safetensors":
            raise SystemExit(143)
        return replace(path, target)

    checkpoint = open_tiny(folder)
    model = load_model(checkpoint)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(Path, "replace", end)
    for out in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(SystemExit):
            save_checkpoint(model, checkpoint, out)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_folder_that_cannot_be_written_is_named_and_nothing_is_left(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"'.*file/out' cannot be written: "):
        save(folder, tmp_path / "file/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hub"]
