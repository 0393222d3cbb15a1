"""Spoiled checkpoints at the command line: one line that names the culprit, exit 1."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.goldens import golden, golden_audio
from tests.tiny import change_json, write_json, write_shards, write_tensors
from vla2cli.cli import main

CLIP = str(Path(__file__).parents[2] / "examples/01.mp4")
QWEN2, MIXTRAL = "qwen2_siglip_stcv35_16f", "mixtral_clip_stc_8f"
EARS = "VideoLLaMA2.1-tiny-AV"
BASE, LORA = "mistral_clip_stc_8f_Base", "mistral_clip_stc_8f_lora"
WEIGHTS = "model.safetensors"
BIAS = "model.audio_tower.encoder.layers.{}.self_attn.relative_attention_bias.weight"
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
    tower = golden_audio("siglip-tiny-patch14-70/config.json").parent
    shutil.copytree(tower, tmp_path / "hub" / tower.name, copy_function=shutil.copyfile)
    for folder in (tmp_path / "hub").rglob("*/"):
        folder.chmod(0o755)
    return tmp_path / "hub"


@pytest.fixture
def said(capsys, tmp_path, hub):
    """Spoil a copy of a golden checkpoint; give exit code, stdout and stderr of a command."""

    def run(case, spoil, *command):
        folder = tmp_path / "ckpt"
        find = golden_audio if case == EARS else golden
        source = find(f"{'' if case == EARS else 'checkpoints/'}{case}/config.json").parent
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


def of_ears(change):
    """Change the tensors of the golden checkpoint with ears, whose shards become one file."""

    def spoil(folder):
        shards = sorted(folder.glob("model-*.safetensors"))
        tensors = {key: tensor for path in shards for key, tensor in load_file(path).items()}
        for path in (*shards, folder / "model.safetensors.index.json"):
            path.unlink()
        change(tensors)
        write_tensors(folder, tensors)

    return spoil


def lose_ears(tensors):
    for key in [key for key in tensors if ".audio_tower." in key]:
        del tensors[key]


def bend_copy(tensors):
    tensors[BIAS.format(2)][300, 3] += 1


def cut_copy(tensors):
    tensors[BIAS.format(2)] = tensors[BIAS.format(2)][:-1].clone()


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


def to_integers(tensors):
    tensors[LM_HEAD] = tensors[LM_HEAD].to(torch.int64)


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


def set_field(name, **fields):
    def spoil(folder):
        write_json(folder / name, json.loads((folder / name).read_text()) | fields)

    return spoil


def change_adapter(value):
    def spoil(folder):
        tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
        next(iter(tensors.values())).fill_(value)
        torch.save(tensors, folder / "adapter_model.bin")

    return spoil


def nest(folder):
    (folder / "config.json").write_text("[" * 200_000)


def put_pipe(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


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
    "NaN in an adapter": (LORA, change_adapter(float("nan")), "lora_A.weight holds NaN"),
    "integers": (QWEN2, lambda f: change_tensors(f, to_integers), "holds torch.int64, expected fl"),
    "nested": (QWEN2, nest, "config.json' cannot be read"),
    "pipe": (QWEN2, put_pipe, "model.safetensors' cannot be read: it is no plain file"),
    **{
        f"{field} {value}": (MIXTRAL, set_field("config.json", **{field: value}), field)
        for field, value in [
            ("hidden_size", -96),
            ("hidden_size", 10**12),
            ("vocab_size", 10**15),
            ("num_hidden_layers", 10**9),
            ("num_attention_heads", 0),
            ("num_key_value_heads", "two"),
            ("num_local_experts", 10**7),
            ("num_experts_per_tok", 9),
            ("num_experts_per_tok", 0),
            ("max_position_embeddings", 0),
            ("sliding_window", -3),
            ("rope_theta", -5),
            ("rope_theta", "high"),
            ("rms_norm_eps", -1.0),
            ("num_frames", 33),
            ("num_frames", True),
            ("mm_vision_select_layer", True),
            ("mm_hidden_size", "64"),
        ]
    },
    "activation": (MIXTRAL, set_field("config.json", hidden_act="nope"), "nope"),
    "end id": (MIXTRAL, set_field("generation_config.json", eos_token_id="x"), "eos_token_id"),
    "penalty": (
        MIXTRAL,
        set_field("generation_config.json", repetition_penalty=-1),
        "repetition_penalty to -1, expected a number above 0",
    ),
    "end token": (MIXTRAL, set_field("tokenizer_config.json", eos_token="<no>"), "'<no>'"),
    "template": (
        MIXTRAL,
        set_field("tokenizer_config.json", chat_template="{% if %}"),
        "chat template refuses the prompt",
    ),
    "another language model": (MIXTRAL, claim_mistral, "has no place in a videollama2_mistral"),
    "lost ears": (EARS, of_ears(lose_ears), "no weight file holds a tensor model.audio_tower.*"),
    "bent copy": (
        EARS,
        of_ears(bend_copy),
        f"tensor {BIAS.format(2)} differs from model.audio_tower.",
    ),
    "cut copy": (EARS, of_ears(cut_copy), f"tensor {BIAS.format(2)} is [319, 4], this config's au"),
    "unnamed ears": (
        EARS,
        set_field("config.json", mm_audio_tower=None),
        "has no place in a video",
    ),
    **{
        f"{field} {value}": (EARS, set_field("config.json", **{field: value}), field)
        for field, value in [
            ("mm_audio_tower", True),
            ("hidden_size_a", 4096),
            ("mm_hidden_size_a", 768),
            ("mm_projector_a_type", "qformer"),
            ("mm_projector_a_type", "identity"),
            ("mm_audio_window_s", 0),
            ("mm_audio_window_s", 1e300),
            ("mm_audio_num_clips", "many"),
            ("mm_audio_clip_s", -2),
        ]
    },
}
COMMANDS = {
    "caption": ["caption", CLIP, "-m", "{folder}", "-q", "--max-new-tokens", "1"],
    "models": ["models", "{folder}"],
    "convert": ["models", "convert", "{folder}", "-o", "{folder}-out"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoint_is_one_line_and_exit_1(said, tmp_path, name, command):
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
@pytest.mark.parametrize("case", [QWEN2, MIXTRAL, BASE, LORA, EARS])
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


def test_one_bad_folder_does_not_end_the_list(said, hub):
    source = golden(f"checkpoints/{MIXTRAL}/config.json").parent
    for name in ("good", "bad"):
        shutil.copytree(source, hub / "vla2" / name, copy_function=shutil.copyfile)
    (hub / "vla2/bad").chmod(0o755)
    nest(hub / "vla2/bad")
    code, out, err = said(MIXTRAL, lambda folder: None, "models", "--json")
    assert code == 0, err
    found = {facts["id"]: facts for facts in map(json.loads, out.splitlines())}
    assert found["vla2/good"]["usable"] is True
    assert found["vla2/bad"]["usable"] is False
    assert "cannot be read" in found["vla2/bad"]["why"]
    assert found["DAMO-NLP-SG/VideoLLaMA2-72B"]["on_disk"] is False
    assert found["DAMO-NLP-SG/VideoLLaMA2-72B"]["memory_gb"]["4bit"] == 45.7


@pytest.mark.parametrize("form", ["file", "full", "left", "dangling", "below a file", "long"])
def test_output_that_cannot_be_is_refused_before_a_weight_is_read(said, tmp_path, form):
    out = tmp_path / "out"
    if form == "file":
        out.write_text("mine")
    elif form == "dangling":
        out.symlink_to("nowhere")
    elif form == "below a file":
        out.write_text("mine")
        out = out / "it"
    elif form == "long":
        out = tmp_path / ("x" * 300)
    else:
        out.mkdir()
        (out / (".unfinished-1" if form == "left" else "mine")).mkdir()
    # were it read, the line would be about that
    code, _, err = said(QWEN2, truncate, "models", "convert", "{folder}", "-o", str(out))
    assert code == 1
    assert f"'{out}'" in err
    assert ("exists already" in err) == (form in ("file", "full", "left", "dangling"))
    assert ("an interrupted run left" in err) == (form == "left")
    assert err.count("\n") == 1
