"""Tiny random checkpoints in the public format; nothing here depends on a run of another test."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MixtralConfig, Qwen2Config

from vla2_models.checkpoint import open_checkpoint
from vla2_models.hub import Source
from vla2_models.loading import load_model
from vla2_models.miniature import TOWER_ID, write_miniature
from vla2_models.videollama2 import LANGUAGE_MODELS
from vla2cli.config import GenerationSettings
from vla2cli.engine import Engine
from vla2cli.engines.base import Request, run
from vla2cli.engines.hf import HFEngine

FAMILIES = {"mistral": MistralConfig, "mixtral": MixtralConfig, "qwen2": Qwen2Config}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "sliding_window": None,
}

# four seconds of sound, heard in one piece: 24 x 8 patches instead of 187 x 8
SHORT_WINDOW = {"mm_audio_window_s": 4, "mm_audio_num_clips": 1, "mm_audio_clip_s": 4}

# networks this small lose by more: on two busy cores six times the time
torch.set_num_threads(1)


@functools.cache
def tiny_hub():
    """A hub folder with one tiny checkpoint, for the whole session; not to be changed."""
    folder = tempfile.TemporaryDirectory(prefix="vla2-tiny-")
    atexit.register(folder.cleanup)
    write_miniature(Path(folder.name))
    return Path(folder.name)


@functools.cache
def tiny_engine():
    """An engine on that checkpoint; not to be changed."""
    folder = next(path.parent for path in tiny_hub().glob("*/*/model.safetensors"))
    return Engine.load(str(folder), hub_dir=tiny_hub(), device="cpu", dtype="float32")


@functools.cache
def tiny_av_engine():
    """An engine on a tiny checkpoint with ears; not to be changed."""
    hub_dir = tempfile.TemporaryDirectory(prefix="vla2-tiny-av-")
    atexit.register(hub_dir.cleanup)
    folder = write_miniature(Path(hub_dir.name), has_ears=True, **SHORT_WINDOW)
    return Engine.load(str(folder), hub_dir=hub_dir.name, device="cpu", dtype="float32")


def tiny_language_model(family, dtype=torch.float32, **changes):
    """A random language model of transformers, the same each time, frozen."""
    config = FAMILIES[family](**(SIZES | changes))
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[type(config)](config)
    return model.to(dtype).eval().requires_grad_(False)


def generate(model, inputs_embeds, settings, seeds=None, num_rows=None):
    """What the engine says after each prompt, by default all of them at a time."""
    seeds = seeds or [0] * len(inputs_embeds)
    requests = [Request(row, settings, seed) for row, seed in zip(inputs_embeds, seeds)]
    engine = HFEngine(model, num_rows or len(requests), device=inputs_embeds[0].device)
    return run(engine, requests)


def score(model, inputs_embeds, options, num_rows=None):
    """What the engine makes of the options behind each prompt."""
    settings = GenerationSettings(eos_token_ids=(2,))
    requests = [
        Request(row, settings, options=tuple(map(tuple, of_row)))
        for row, of_row in zip(inputs_embeds, options)
    ]
    engine = HFEngine(model, num_rows or len(requests), device=inputs_embeds[0].device)
    return run(engine, requests)


def write_tiny(hub_dir, **changes):
    """Write a checkpoint of one's own under `hub_dir`; return its folder."""
    return write_miniature(hub_dir, **({"num_hidden_layers": 1, "hidden_size": 32} | changes))


def write_with_tower(folder, **changes):
    """Write a checkpoint whose tower lies inside its own folder, so that nothing else is needed."""
    with tempfile.TemporaryDirectory() as hub_dir:
        written = write_tiny(Path(hub_dir), mm_vision_tower="./clip-tower", **changes)
        shutil.copytree(written, folder, dirs_exist_ok=True)
        shutil.copytree(tower_of(written), folder / "clip-tower")
    return folder


def open_tiny(folder):
    """Open a checkpoint that `write_tiny` wrote, perhaps damaged since."""
    return open_checkpoint(str(folder), Source(folder.parents[1]))


def load_tiny(folder, dtype=torch.float32):
    return load_model(open_tiny(folder), dtype=dtype, device="cpu")


def tower_of(folder):
    """The folder of the tower that belongs to a checkpoint of `write_tiny`."""
    return folder.parents[1] / TOWER_ID


def read_tensors(folder):
    return load_file(folder / "model.safetensors")


def write_tensors(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name, metadata={"format": "pt"})


def write_shards(folder, shards):
    """Replace the one weight file by several and an index; `shards` is name -> tensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, tensors in shards.items():
        write_tensors(folder, tensors, name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def change_json(path, **changes):
    """Change fields of a JSON file; None takes a field away."""
    fields = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in fields.items() if value is not None})


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
