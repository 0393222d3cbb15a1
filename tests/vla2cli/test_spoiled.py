"""Spoiled checkpoints at the command line: one line that names the culprit, exit 1."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.goldens import golden
from tests.tiny import change_json, write_json, write_shards, write_tensors
from vla2cli.cli import main

CLIP = str(Path(__file__).parents[2] / "examples/01.mp4")
QWEN2, MIXTRAL = "qwen2_siglip_stcv35_16f", "mixtral_clip_stc_8f"
BASE, LORA = "mistral_clip_stc_8f_Base", "mistral_clip_stc_8f_lora"
WEIGHTS = "model.safetensors"
LM_HEAD = "lm_head.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("VLA2_MODEL", "VLA2_DEBUG", "VLA2_HUB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(tmp_path):
    """A hub folder of one's own with the golden towers and language models."""
    towers = golden("towers/google").parent
    shutil.copytree(towers, tmp_path / "hub", copy_function=shutil.copyfile)
    for folder in (tmp_path / "hub").rglob("*/"):
        folder.chmod(0o755)
    return tmp_path / "hub"


@pytest.fixture
def said(capsys, tmp_path, hub):
    """Spoil a copy of a golden checkpoint; give exit code, stdout and stderr of a command."""

    def run(case, spoil, *command):
        folder = tmp_path / "ckpt"
        source = golden(f"checkpoints/{case}/config.json").parent
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        spoil(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*(part.format(folder=folder) for part in command), "--hub-dir", str(hub)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    write_tensors(folder, tensors)


def lose_shard(folder):
    tensors = load_file(folder / WEIGHTS)
    keys = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": keys[i::2] for i in (0, 1)}
    write_shards(folder, {name: {k: tensors[k] for k in keys} for name, keys in shards.items()})
    (folder / "model-00002-of-00002.safetensors").unlink()


def reshape(folder):
    change_tensors(folder, lambda t: t.update({LM_HEAD: t[LM_HEAD][:-1].clone()}))


def add_tensor(folder):
    change_tensors(folder, lambda t: t.update({"model.audio_tower.weight": torch.ones(2)}))


def lose_expert(folder):
    change_tensors(folder, lambda t: t.pop(EXPERT))


def name_other_tower(folder):
    change_json(folder / "config.json", mm_vision_tower="google/siglip-tiny-patch14-384")


def truncate(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def fill_with_nan(folder):
    change_tensors(folder, lambda t: t["model.norm.weight"].fill_(float("nan")))


def fill_with_infinity(folder):
    change_tensors(folder, lambda t: t[EXPERT].view(-1)[7:8].fill_(float("inf")))


def name_older_connector(folder):
    change_json(folder / "config.json", mm_projector_type="stc_connector")


def name_no_connector(folder):
    change_json(folder / "config.json", mm_projector_type="stc_connector_v3.5")


class Hostile:
    """Runs when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def put_hostile_pickle(name):
    def spoil(folder):
        torch.save({"model.mm_projector.x": Hostile(folder / "it_ran")}, folder / name)

    return spoil


def lose_tokenizer(folder):
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink()


def lose_settings(folder):
    (folder / "tokenizer_config.json").unlink()


def shrink_vocabulary(folder):
    change_json(folder / "config.json", vocab_size=600)


def grow_tokenizer(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["9000"] = {"content": "<far>", "special": True}
    write_json(folder / "tokenizer_config.json", config)


def claim_mistral(folder):
    change_json(folder / "config.json", model_type="videollama2_mistral")


# what is done to a checkpoint -> what the line says beside the folder
SPOILED = {
    "missing shard": (QWEN2, lose_shard, "lacks 'model-00002-of-00002.safetensors'"),
    "wrong shape": (QWEN2, reshape, f"tensor {LM_HEAD} is [655, 112]"),
    "extra tensor": (QWEN2, add_tensor, "tensor model.audio_tower.weight [2] in 'model.safetens"),
    "missing expert": (MIXTRAL, lose_expert, f"tensor {EXPERT} missing"),
    "other tower": (QWEN2, name_other_tower, "mm_hidden_size is 64, but its tower 'google/siglip"),
    "truncated file": (QWEN2, truncate, "model.safetensors' is not a whole safetensors file"),
    "NaN": (QWEN2, fill_with_nan, "tensor model.norm.weight holds NaN"),
    "infinity": (MIXTRAL, fill_with_infinity, f"tensor {EXPERT} holds infinite values"),
    "v35 by its older name": (QWEN2, name_older_connector, '"stc_connector" beside a SigLIP tower'),
    "unknown connector": (QWEN2, name_no_connector, '"stc_connector_v3.5" is unknown'),
    "hostile projector": (BASE, put_hostile_pickle("mm_projector.bin"), "more than tensors"),
    "hostile adapter": (LORA, put_hostile_pickle("adapter_model.bin"), "more than tensors"),
    "hostile rest": (LORA, put_hostile_pickle("non_lora_trainables.bin"), "more than tensors"),
    "missing tokenizer": (QWEN2, lose_tokenizer, "vocab.json"),
    "missing settings": (QWEN2, lose_settings, "has no tokenizer_config.json"),
    "smaller vocabulary": (QWEN2, shrink_vocabulary, "600"),
    "larger tokenizer": (QWEN2, grow_tokenizer, "the tokenizer has 9001 tokens"),
    "another language model": (MIXTRAL, claim_mistral, "has no place in a videollama2_mistral"),
}
COMMANDS = {
    "caption": ["caption", CLIP, "-m", "{folder}", "-q", "--max-new-tokens", "1"],
    "models": ["models", "{folder}"],
    "convert": ["models", "convert", "{folder}", "-o", "{folder}-out"],
}
# a checkpoint is written anew whatever its tokenizer is
NOT_CONVERT = ("missing tokenizer", "missing settings", "larger tokenizer")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoint_is_one_line_and_exit_1(said, tmp_path, name, command):
    if command == "convert" and name in NOT_CONVERT:
        pytest.skip("no tokenizer is read")
    case, spoil, line = SPOILED[name]
    code, out, err = said(case, spoil, *COMMANDS[command])
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith("vla2: '")
    assert str(tmp_path / "ckpt") in err
    assert line in err
    assert not (tmp_path / "ckpt/it_ran").exists()
    assert not (tmp_path / "ckpt-out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", [QWEN2, MIXTRAL, BASE, LORA])
def test_sound_checkpoint_is_taken(said, case, command):
    code, _, err = said(case, lambda folder: None, *COMMANDS[command])
    assert code == 0, err


def test_hostile_pickle_would_have_run(tmp_path):
    # without which the test above shows nothing
    pickle.loads(pickle.dumps(Hostile(tmp_path / "it_ran")))
    assert (tmp_path / "it_ran").exists()


def test_value_that_the_dtype_cannot_hold_is_named(said):
    def enlarge(folder):
        change_tensors(folder, lambda t: t[EXPERT].view(-1)[:1].fill_(1e6))

    command = [*COMMANDS["caption"], "--dtype", "float16"]
    code, _, err = said(MIXTRAL, enlarge, *command)
    assert code == 1
    assert f"tensor {EXPERT} holds values up to 1e+06, beyond what float16 can; use bfloat16" in err
