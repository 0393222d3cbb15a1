"""A miniature checkpoint with random weights in the public format, for demonstrations and tests.

It goes through every stage that a public checkpoint goes through, and its words mean nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import builtin_design
from .beats_design import BEATsDesign
from .config import DEMO_KEY, read_audio, read_config
from .files import write_json
from .loading import build_empty
from .random_weights import initial_weight
from .saving import save_weights
from .tokenizer_files import NUM_UNSPEAKABLE, write_tokenizer
from .videollama2 import VideoLLaMA2

MODEL_ID = "vla2/miniature-7B"
WITH_EARS_ID = "vla2/miniature-7B-AV"
TOWER_ID = "openai/clip-vit-miniature-patch14-56"

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
PREPROCESSOR = {
    **builtin_design.PREPROCESSOR,
    "size": {"shortest_edge": TOWER["image_size"]},
    "crop_size": {"height": TOWER["image_size"], "width": TOWER["image_size"]},
}
MODEL = {
    "model_type": "videollama2_mistral",
    "architectures": ["Videollama2MistralForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "mm_vision_tower": TOWER_ID,
    "mm_hidden_size": TOWER["hidden_size"],
    "mm_projector_type": "stc_connector",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "num_frames": 8,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
AUDIO_TOWER = BEATsDesign(
    patch_size=16,
    embed_dim=16,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_buckets=320,
    conv_pos=16,
    conv_pos_groups=4,
    num_classes=None,
)
EARS = {
    "mm_audio_tower": "./audio_tower.bin",
    "mm_hidden_size_a": AUDIO_TOWER.hidden_size,
    "mm_projector_a_type": "mlp2x_gelu",
}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True}
WORDS = (
    "a red car moves to the right on the green meadow while the sun sets behind the hills",
    "the ball bounces, the rocket rises into the night sky and the rain falls on the road",
    "please describe the video in detail. what happens in this image? a person walks away",
    "first one bell rings, then two shapes pass each other slowly in front of the blue wall",
)


def write_miniature(
    hub_dir: Path,
    *,
    model_id: str | None = None,
    seed: int = 0,
    has_ears: bool = False,
    **changes: Any,
) -> Path:
    """Write a checkpoint and its tower's folder under a local hub folder.

    Args:
        hub_dir: where `vla2 --hub-dir` looks.
        model_id: the checkpoint's name, owner/name; by default `MODEL_ID` or `WITH_EARS_ID`.
        seed: of the random weights.
        has_ears: whether it has an audio tower.
        changes: fields of config.json that differ from the miniature's.

    Returns:
        The checkpoint's folder.
    """
    folder = hub_dir / (model_id or (WITH_EARS_ID if has_ears else MODEL_ID))
    tower = hub_dir / TOWER_ID
    config = {**MODEL, **(EARS if has_ears else {}), DEMO_KEY: True, **changes}
    write_json(tower / "config.json", TOWER)
    write_json(tower / "preprocessor_config.json", PREPROCESSOR)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", GENERATION)
    write_tokenizer(folder, WORDS * 8, vocab_size=config["vocab_size"])
    described = read_config(folder, tower)
    model = build_empty(replace(described, audio=read_audio(described, AUDIO_TOWER)))
    _fill(model, torch.Generator().manual_seed(seed))
    save_weights(model.state_dict(), folder)
    return folder


def _fill(model: VideoLLaMA2, generator: torch.Generator) -> None:
    """Draw weights that keep the size of what passes through them, so that clips tell apart."""

    def draw(meta: Tensor, scale: float) -> Tensor:
        return torch.randn(meta.shape, generator=generator) * scale

    state = {name: initial_weight(name, meta, draw) for name, meta in model.state_dict().items()}
    # a likely word has a logit well above 0
    state["language_model.lm_head.weight"][:NUM_UNSPEAKABLE] = 0
    model.load_state_dict(state, assign=True)


if __name__ == "__main__":
    for has_ears in (False, True):
        write_miniature(Path(sys.argv[1]), has_ears=has_ears)
