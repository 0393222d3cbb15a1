"""The built-in model's architecture as data, and a checkpoint of it that knows nothing yet.

VideoLLaMA 2 in miniature: eight frames of 112 x 112 pixels become 64 visual tokens, five seconds of
sound 60 audio tokens. What differs from the public checkpoints beside the sizes: the tower's last
block counts (it is trained here, for this), the ears hear the whole of a short clip once, and
rotary positions turn faster, as prompts of 200 tokens want it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .beats import BEATs
from .beats_design import BEATsDesign
from .config import DEMO_KEY, read_audio, read_config
from .files import write_json
from .saving import save_weights
from .tokenizer_files import write_tokenizer
from .videollama2 import VideoLLaMA2

TOWER_FOLDER = "clip-tower"  # inside the checkpoint's own folder
INITIAL_STD = 0.02  # of linear layers, as transformers has it for both models around the connector

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 112,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 112},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 112, "width": 112},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
AUDIO_TOWER = BEATsDesign(
    patch_size=32,
    embed_dim=192,
    hidden_size=192,
    intermediate_size=768,
    num_layers=4,
    num_heads=6,
    num_buckets=320,
    conv_pos=16,
    conv_pos_groups=8,
    num_classes=None,
)
MODEL = {
    "model_type": "videollama2_mistral",
    "architectures": ["Videollama2MistralForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "sliding_window": None,
    "initializer_range": INITIAL_STD,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "mm_vision_tower": f"./{TOWER_FOLDER}",
    "mm_hidden_size": TOWER["hidden_size"],
    "mm_projector_type": "stc_connector_v35",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "num_frames": 8,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    "mm_audio_tower": "./audio_tower.bin",
    "mm_hidden_size_a": AUDIO_TOWER.hidden_size,
    "mm_projector_a_type": "mlp2x_gelu",
    "mm_audio_window_s": 5,
    "mm_audio_num_clips": 1,
    "mm_audio_clip_s": 5,
    DEMO_KEY: True,
}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}


class BuiltinConfig(NamedTuple):
    """What the files of a built-in checkpoint say; the ears are told by their weights."""

    model: dict[str, Any]  # config.json
    tower: dict[str, Any]  # config.json of the vision tower
    preprocessor: dict[str, Any]  # preprocessor_config.json of the vision tower
    audio_tower: BEATsDesign


def builtin_config() -> BuiltinConfig:
    """Describe the built-in model; the dicts are the caller's own."""
    return BuiltinConfig({**MODEL}, {**TOWER}, {**PREPROCESSOR}, AUDIO_TOWER)


def write_untrained(folder: Path, tokenizer_texts: Iterable[str], seed: int = 0) -> None:
    """Write a checkpoint to train from: initial weights in float32, and a tokenizer of its own.

    Args:
        folder: may hold a checkpoint already, which is replaced.
        tokenizer_texts: whose words get pieces, the frequent ones whole; questions and answers one
            by one, since what begins an answer has no space before it.
        seed: of the weights.
    """
    design = builtin_config()
    write_json(folder / "config.json", design.model)
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / TOWER_FOLDER / "config.json", design.tower)
    write_json(folder / TOWER_FOLDER / "preprocessor_config.json", design.preprocessor)
    write_tokenizer(folder, _with_openings(tokenizer_texts), design.model["vocab_size"])
    config = read_config(folder, folder / TOWER_FOLDER)
    config = replace(config, audio=read_audio(config, design.audio_tower))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = VideoLLaMA2(config)  # tower and language model draw their weights themselves
        initialise_joints(model)
    save_weights(model.state_dict(), folder)


def initialise_joints(model: VideoLLaMA2) -> None:
    """Draw the weights of what stands between the three transformers, and of the ears, in place.

    The tokens that come out are then about as large as the embeddings of words. The stages keep
    the weights they were built with: their norms undo any scale, and a last norm of 0, usual
    elsewhere, would leave eight SiLUs in a row, each of which halves what is small.
    """
    for part in (model.mm_projector.sampler, model.mm_projector.readout, model.mm_projector_a):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, nn.Linear | nn.Conv3d):
                _draw(module)
    if model.audio_tower is not None:
        _initialise_ears(model.audio_tower)


def _initialise_ears(ears: BEATs) -> None:
    """Begin as BEATs did: DeepNorm shrinks what a layer adds, the more the deeper the encoder is.

    Source: DeepNet, arXiv:2203.00555, figure 2, encoder alone: gain (8N)^(-1/4).
    """
    gain = (8 * ears.design.num_layers) ** -0.25
    shrunk = ("v_proj", "out_proj", "fc1", "fc2")
    for name, module in ears.named_modules():
        if isinstance(module, nn.Linear):
            _draw(module)
            if not name.endswith("grep_linear"):
                nn.init.xavier_normal_(module.weight, gain if name.endswith(shrunk) else 1.0)
        elif isinstance(module, nn.Embedding):
            nn.init.xavier_normal_(module.weight)


def _draw(module: nn.Linear | nn.Conv3d) -> None:
    nn.init.normal_(module.weight, std=INITIAL_STD)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _with_openings(texts: Iterable[str]) -> Iterator[str]:
    """Add the first word of each text as it stands in a prompt: behind [/INST], without a space."""
    for text in texts:
        yield text
        yield f"[/INST]{text.split(' ', 1)[0]}"
