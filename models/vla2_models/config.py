"""What a checkpoint's own files say about it: config.json and those of its vision tower.

Nothing is inferred from a checkpoint's name. Source of the fields: upstream VideoLLaMA2@c0bb03a,
train.py and model/videollama2_arch.py, `initialize_vision_modules`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, MistralConfig

from .errors import CheckpointError
from .files import read_json

DEFAULT_NUM_FRAMES = 8  # upstream constants.py, where config.json has no `num_frames`
DEMO_KEY = "vla2_demo_model"  # set in config.json of models whose words are no evidence
MISTRAL_TYPES = ("videollama2_mistral", "videollama2")


@dataclass(frozen=True)
class CheckpointConfig:
    """The facts about one checkpoint that the networks and the prompt need."""

    model_type: str  # as in config.json
    language: MistralConfig
    vision: CLIPVisionConfig
    preprocessor: Mapping[str, Any]  # the tower's preprocessor_config.json
    projector_type: str
    mm_vision_tower: str  # the tower's name, as config.json has it
    num_frames: int  # frames of a video, where the user asks for no other number
    num_tower_blocks: int  # blocks that run before the selected hidden state
    is_demo: bool  # a demonstration model: its words mean nothing for real videos

    @property
    def mm_hidden_size(self) -> int:
        """Width of the tower's features."""
        size: int = self.vision.hidden_size
        return size

    @property
    def num_patches(self) -> int:
        """Patch features of one frame."""
        # both may be pairs for transformers; a tower of this model has numbers
        image_size, patch_size = self.vision.image_size, self.vision.patch_size
        assert isinstance(image_size, int)
        assert isinstance(patch_size, int)
        return (image_size // patch_size) ** 2


def read_config(folder: Path, tower_folder: Path) -> CheckpointConfig:
    """Read what `folder` and its tower's folder say.

    Raises:
        CheckpointError: a file is absent, or names something that is not supported.
    """
    raw = read_json(folder / "config.json")
    vision = read_json(tower_folder / "config.json")
    vision = vision.get("vision_config", vision)
    projector_type = raw.get("mm_projector_type", "linear")
    _refuse_unsupported(folder, raw, projector_type)
    tower = _parse(CLIPVisionConfig, vision, tower_folder)
    config = CheckpointConfig(
        model_type=raw["model_type"],
        language=_language_config(folder, raw),
        vision=tower,
        preprocessor=read_json(tower_folder / "preprocessor_config.json"),
        projector_type=projector_type,
        mm_vision_tower=tower_name(folder, raw),
        num_frames=_positive(folder, raw, "num_frames", DEFAULT_NUM_FRAMES),
        num_tower_blocks=_tower_blocks(folder, raw, tower.num_hidden_layers),
        is_demo=bool(raw.get(DEMO_KEY, False)),
    )
    wanted = raw.get("mm_hidden_size", config.mm_hidden_size)
    if wanted != config.mm_hidden_size:
        raise CheckpointError(
            f"'{folder}': mm_hidden_size is {wanted}, but its tower '{config.mm_vision_tower}' "
            f"in '{tower_folder}' is {config.mm_hidden_size} wide; the folder mixes two models"
        )
    return config


def tower_name(folder: Path, raw: Mapping[str, Any]) -> str:
    """Return the name of the vision tower in a config.json, under its present or older key."""
    name = raw.get("mm_vision_tower", raw.get("vision_tower"))
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"'{folder}/config.json' names no mm_vision_tower; it is not a VideoLLaMA 2 checkpoint"
        )
    return name


def _language_config(folder: Path, raw: Mapping[str, Any]) -> MistralConfig:
    # "videollama2_mistral" is unknown to transformers, whose class is chosen here instead
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    config: MistralConfig = _parse(MistralConfig, fields, folder)
    return config


def _parse(config_class: Any, fields: Mapping[str, Any], folder: Path) -> Any:
    try:
        return config_class.from_dict(dict(fields))
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"'{folder}/config.json' is not understood: {reason}") from error


def _refuse_unsupported(folder: Path, raw: Mapping[str, Any], projector_type: str) -> None:
    found = {
        "model_type": raw.get("model_type"),
        "mm_projector_type": projector_type,
        "mm_vision_tower": tower_name(folder, raw),
        "mm_vision_select_feature": raw.get("mm_vision_select_feature", "patch"),
        "tune_mm_mlp_adapter": bool(raw.get("tune_mm_mlp_adapter", False)),
    }
    supported = {
        "model_type": found["model_type"] in MISTRAL_TYPES,
        "mm_projector_type": projector_type == "stc_connector",
        # upstream chooses the tower's class by this very substring
        "mm_vision_tower": "clip" in found["mm_vision_tower"].lower(),
        "mm_vision_select_feature": found["mm_vision_select_feature"] == "patch",
        "tune_mm_mlp_adapter": not found["tune_mm_mlp_adapter"],
    }
    for field, is_supported in supported.items():
        if not is_supported:
            raise CheckpointError(
                f"'{folder}': {field} {json.dumps(found[field])} is not supported by this version; "
                "it runs VideoLLaMA2-7B and -7B-16F (Mistral, CLIP, stc_connector)"
            )


def _positive(folder: Path, raw: Mapping[str, Any], field: str, default: int) -> int:
    value = raw.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"'{folder}/config.json': {field} is {value!r}, expected 1 or more")
    return value


def _tower_blocks(folder: Path, raw: Mapping[str, Any], num_layers: int) -> int:
    select_layer = raw.get("mm_vision_select_layer", -1)
    num_states = num_layers + 1  # the embeddings count as state 0
    if not isinstance(select_layer, int) or not -num_states <= select_layer < num_states:
        raise CheckpointError(
            f"'{folder}/config.json': mm_vision_select_layer is {select_layer!r}, "
            f"but the tower has {num_layers} layers"
        )
    return select_layer % num_states
