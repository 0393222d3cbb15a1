"""The full sizes of the public checkpoints, without a file of theirs: config for random weights.

`specs/` says which parts a checkpoint is made of; here is what the config.json of each part says,
as far as it decides shapes and speed. With it the networks can be built where the weights are not.

Source: config.json of the named repositories, as the key list of upstream VideoLLaMA2@c0bb03a
confirms by its shapes; of the ears upstream VideoLLaMA2@8cedfbd (branch audio_visual), model/beats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .beats_design import BEATsDesign
from .config import LANGUAGE_CONFIGS, AudioConfig, CheckpointConfig, LanguageConfig, TowerConfig
from .config import TOWER_CONFIGS as TOWER_CLASSES
from .connectors import PROJECTOR_TYPES
from .public import PublicCheckpoint
from .sound import SoundWindow


@dataclass(frozen=True)
class TowerSize:
    """What a vision tower's config.json and preprocessor_config.json say."""

    model_type: str
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]


TOWERS: Mapping[str, TowerSize] = {
    "openai/clip-vit-large-patch14-336": TowerSize(
        "clip",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
        },
    ),
    "google/siglip-so400m-patch14-384": TowerSize(
        "siglip",
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
        },
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 384, "width": 384},
        },
    ),
}

_MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
_QWEN2 = {
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
LANGUAGE_MODELS: Mapping[str, Mapping[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        **_MISTRAL,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen/Qwen2-7B-Instruct": {
        **_QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen/Qwen2-72B-Instruct": {
        **_QWEN2,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}

# BEATs iter3+, fine-tuned on AudioSet-2M: the head is there and never used
BEATS = BEATsDesign(
    patch_size=16,
    embed_dim=512,
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_heads=12,
    num_buckets=320,
    conv_pos=128,
    conv_pos_groups=16,
    num_classes=527,
)


def full_size_config(public: PublicCheckpoint) -> CheckpointConfig:
    """Describe a public checkpoint at its full size; no file is read but its facts.

    The tower's last block is counted and not run, as `mm_vision_select_layer` -2 has it in all of
    upstream's scripts.
    """
    tower = TOWERS[public.tower]
    vision: TowerConfig = TOWER_CLASSES[tower.model_type](**tower.config)
    language: LanguageConfig = LANGUAGE_CONFIGS[public.model_type](
        **LANGUAGE_MODELS[public.language_model], tie_word_embeddings=False
    )
    return CheckpointConfig(
        folder=Path(public.id),
        model_type=public.model_type,
        language=language,
        vision=vision,
        preprocessor=tower.preprocessor,
        projector_type=public.connector,
        connector=PROJECTOR_TYPES[public.connector],
        mm_vision_tower=public.tower,
        num_frames=public.num_frames,
        num_tower_blocks=vision.num_hidden_layers - 1,
        is_demo=True,
        audio=_ears() if public.num_audio_parameters else None,
    )


def _ears() -> AudioConfig:
    return AudioConfig("BEATs", "mlp2x_gelu", BEATS, SoundWindow())
