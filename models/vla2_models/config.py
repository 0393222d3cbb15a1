"""What a checkpoint's own files say about it: config.json and those of its vision tower.

Nothing is inferred from a checkpoint's name. Source of the fields: upstream VideoLLaMA2@c0bb03a,
train.py and model/videollama2_arch.py, `initialize_vision_modules`; of those of the ears its branch
audio_visual at 8cedfbd, `initialize_audio_modules`. They hold no word about the audio tower itself,
whose design is told by the shapes of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from .beats import is_audio_projector_type
from .beats_design import BEATsDesign
from .connectors import PROJECTOR_TYPES
from .errors import CheckpointError, one_line
from .files import is_positive, read_json
from .sound import SoundWindow
from .stc import ConnectorDesign

DEFAULT_NUM_FRAMES = 8  # upstream constants.py, where config.json has no `num_frames`
DEMO_KEY = "vla2_demo_model"  # set in config.json of models whose words are no evidence
PADDING_KEY = "mm_projector_padding"  # of the downsampler, where the projector's type is doubted

LanguageConfig = MistralConfig | MixtralConfig | Qwen2Config
TowerConfig = CLIPVisionConfig | SiglipVisionConfig

# what a checkpoint does not decide: the class, which is chosen here, and how it is run
NOT_OURS = (
    "model_type",
    "attn_implementation",
    "_attn_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
)

# what a number may be; far beyond any real model, so that a slip is met before it fills the memory
_WIDTH, _COUNT = range(1, 2**20), range(1, 2**10)
LANGUAGE_NUMBERS: Mapping[str, range] = {
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "vocab_size": range(1, 2**24),
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT,
    "head_dim": _WIDTH,
    "num_local_experts": _COUNT,
    "max_position_embeddings": range(1, 2**31),
    "sliding_window": range(1, 2**31),
}
TOWER_NUMBERS: Mapping[str, range] = {
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "image_size": range(1, 2**14),
    "patch_size": range(1, 2**14),
}

# `model_type` in config.json -> the language model inside
LANGUAGE_CONFIGS: Mapping[str, type[LanguageConfig]] = {
    "videollama2": MistralConfig,
    "videollama2_mistral": MistralConfig,
    "videollama2_mixtral": MixtralConfig,
    "videollama2_qwen2": Qwen2Config,
}
# `model_type` in the tower's config.json, of the whole model or of its vision part
TOWER_CONFIGS: Mapping[str, type[TowerConfig]] = {
    "clip": CLIPVisionConfig,
    "clip_vision_model": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
}

# keys of config.json -> fields of `SoundWindow`, and the most they may be; the public checkpoints
# have none of them and hear as their authors' code does
WINDOW_KEYS: Mapping[str, tuple[str, int]] = {
    "mm_audio_window_s": ("duration_s", 600),
    "mm_audio_num_clips": ("num_clips", 1000),
    "mm_audio_clip_s": ("clip_s", 600),
}


@dataclass(frozen=True)
class AudioConfig:
    """What a checkpoint with ears has beside the eyes."""

    mm_audio_tower: str  # as in config.json: a path where it was trained, which leads nowhere here
    projector_type: str  # mm_projector_a_type
    design: BEATsDesign  # of the audio tower
    window: SoundWindow  # what is heard of a recording

    @property
    def audio_tokens(self) -> int:
        """Audio tokens of any recording: the window is filled up with silence."""
        return self.design.count_tokens(self.window.num_frames)


@dataclass(frozen=True)
class CheckpointConfig:
    """The facts about one checkpoint that the networks and the prompt need."""

    folder: Path  # with config.json
    model_type: str  # as in config.json
    language: LanguageConfig
    vision: TowerConfig
    preprocessor: Mapping[str, Any]  # the tower's preprocessor_config.json
    projector_type: str
    connector: ConnectorDesign  # what the projector's type stands for
    mm_vision_tower: str  # the tower's name, as config.json has it
    num_frames: int  # frames of a video, where the user asks for no other number
    num_tower_blocks: int  # blocks that run before the selected hidden state
    is_demo: bool  # a demonstration model: its words mean nothing for real videos
    audio: AudioConfig | None = None  # None: the checkpoint does not hear

    @property
    def mm_hidden_size(self) -> int:
        """Width of the tower's features."""
        size: int = self.vision.hidden_size
        return size

    @property
    def num_patches(self) -> int:
        """Patch features of one frame."""
        # both may be pairs for transformers; they were checked to be numbers
        image_size, patch_size = self.vision.image_size, self.vision.patch_size
        assert isinstance(image_size, int)
        assert isinstance(patch_size, int)
        return (image_size // patch_size) ** 2

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a clip of `num_frames` frames, or of an image."""
        return self.connector.count_tokens(self.num_frames, self.num_patches)


def read_config(folder: Path, tower_folder: Path) -> CheckpointConfig:
    """Read what `folder` and its tower's folder say; see `read_audio` for the ears.

    Raises:
        CheckpointError: a file is absent, or names something that is not supported.
    """
    raw = read_json(folder / "config.json")
    projector_type = raw.get("mm_projector_type", "linear")
    _refuse_unsupported(folder, raw)
    tower = _tower_config(tower_folder)
    config = CheckpointConfig(
        folder=folder,
        model_type=raw["model_type"],
        language=_language_config(folder, raw),
        vision=tower,
        preprocessor=read_json(tower_folder / "preprocessor_config.json"),
        projector_type=projector_type,
        connector=_connector(folder, raw, projector_type, tower),
        mm_vision_tower=tower_name(folder, raw),
        num_frames=_positive(folder, raw, "num_frames", DEFAULT_NUM_FRAMES),
        num_tower_blocks=_tower_blocks(folder, raw, tower.num_hidden_layers),
        is_demo=bool(raw.get(DEMO_KEY, False)),
    )
    if config.num_frames < config.connector.min_frames:
        raise CheckpointError(
            f"'{folder}/config.json': num_frames is {config.num_frames}, but its {projector_type} "
            f"needs at least {config.connector.min_frames}"
        )
    wanted = raw.get("mm_hidden_size") or config.mm_hidden_size
    if wanted != config.mm_hidden_size:
        raise CheckpointError(
            f"'{folder}': mm_hidden_size is {wanted!r}, but its tower '{config.mm_vision_tower}' "
            f"in '{tower_folder}' is {config.mm_hidden_size} wide; the folder mixes two models"
        )
    return config


def read_audio(config: CheckpointConfig, design: BEATsDesign) -> AudioConfig | None:
    """Read what config.json says about the ears of a checkpoint.

    Args:
        config: from `read_config`.
        design: of the audio tower, from the shapes of its weights.

    Returns:
        None for a checkpoint without ears.

    Raises:
        CheckpointError: it names something that is not supported, or that does not fit `design`.
    """
    folder, raw = config.folder, read_json(config.folder / "config.json")
    name = audio_tower_name(folder, raw)
    if name is None:
        return None
    widths = {
        "hidden_size_a": (config.language.hidden_size, "language model"),
        "mm_hidden_size_a": (design.hidden_size, "audio tower"),
    }
    for key, (width, part) in widths.items():
        if raw.get(key) not in (None, width):
            raise CheckpointError(
                f"'{folder}/config.json': {key} is {raw[key]!r}, but its {part} is {width} wide; "
                "the folder mixes two models"
            )
    window = _sound_window(folder, raw)
    if window.num_frames < design.patch_size:
        raise CheckpointError(
            f"'{folder}/config.json': mm_audio_window_s is {window.duration_s:g}, which is "
            f"{window.num_frames} frames of sound; its audio tower needs at least "
            f"{design.patch_size}"
        )
    projector_type = _audio_projector(folder, raw, design, config.language.hidden_size)
    return AudioConfig(name, projector_type, design, window)


def audio_tower_name(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """Return the name of the audio tower in a config.json; None for a checkpoint without ears."""
    name = raw.get("mm_audio_tower")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(
            f"'{folder}/config.json': mm_audio_tower is {name!r}, expected a path, or null"
        )
    return name or None


def tower_name(folder: Path, raw: Mapping[str, Any]) -> str:
    """Return the name of the vision tower in a config.json, under its present or older key."""
    name = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"'{folder}/config.json' names no mm_vision_tower; it is not a VideoLLaMA 2 checkpoint"
        )
    return name


def _language_config(folder: Path, raw: Mapping[str, Any]) -> LanguageConfig:
    # "videollama2_mistral" is unknown to transformers, whose class is chosen here instead; a wrong
    # one would leave Mixtral's experts random without a word
    fields = {key: value for key, value in raw.items() if key not in NOT_OURS}
    config: LanguageConfig = _parse(LANGUAGE_CONFIGS[raw["model_type"]], fields, folder)
    _check_numbers(folder, config, LANGUAGE_NUMBERS)
    if isinstance(config, MixtralConfig):
        at_most = {"num_experts_per_tok": range(1, config.num_local_experts + 1)}
        _check_numbers(folder, config, at_most)
    rope = config.rope_parameters or {}
    numbers = {
        "rope_theta": rope.get("rope_theta"),
        "factor of rope_scaling": rope.get("factor", 1),
        "rms_norm_eps": config.rms_norm_eps,
    }
    for name, value in numbers.items():
        if not is_positive(value):
            raise CheckpointError(
                f"'{folder}/config.json': {name} is {value!r}, expected a number above 0"
            )
    return config


def _tower_config(folder: Path) -> TowerConfig:
    raw = read_json(folder / "config.json")
    vision = raw.get("vision_config", raw)
    model_type = str(raw.get("model_type"))
    if model_type not in TOWER_CONFIGS or not isinstance(vision, dict):
        raise CheckpointError(
            f"'{folder}' holds a model of type {model_type!r}, expected a vision tower: "
            "CLIP or SigLIP"
        )
    fields = {key: value for key, value in vision.items() if key not in NOT_OURS}
    config: TowerConfig = _parse(TOWER_CONFIGS[model_type], fields, folder)
    _check_numbers(folder, config, TOWER_NUMBERS)
    return config


def _connector(
    folder: Path, raw: Mapping[str, Any], projector_type: str, tower: TowerConfig
) -> ConnectorDesign:
    if str(projector_type) not in PROJECTOR_TYPES:
        raise CheckpointError(
            f"'{folder}/config.json': mm_projector_type {json.dumps(projector_type)} is unknown, "
            f"expected one of {', '.join(PROJECTOR_TYPES)}"
        )
    design = PROJECTOR_TYPES[projector_type]
    padding = raw.get(PADDING_KEY)
    if padding is not None:
        if type(padding) is not int or padding not in (0, 1) or not design.is_convolution:
            raise CheckpointError(
                f"'{folder}/config.json': {PADDING_KEY} is {padding!r}, expected 0 or 1, for a "
                "projector with a convolution"
            )
        return replace(design, padding=padding)
    # the two have tensors of the same names and shapes, and the wrong one gives wrong tokens
    if projector_type == "stc_connector" and isinstance(tower, SiglipVisionConfig):
        raise CheckpointError(
            f"'{folder}/config.json': mm_projector_type \"stc_connector\" beside a SigLIP tower, "
            'where the public scripts have "stc_connector_v35" with tensors of the same shapes; '
            f'name that, or, if it was trained so, add "{PADDING_KEY}": 1'
        )
    return design


def _audio_projector(
    folder: Path, raw: Mapping[str, Any], design: BEATsDesign, hidden_size: int
) -> str:
    projector_type = raw.get("mm_projector_a_type", "linear")
    if not isinstance(projector_type, str) or not is_audio_projector_type(projector_type):
        raise CheckpointError(
            f"'{folder}/config.json': mm_projector_a_type {json.dumps(projector_type)} is unknown, "
            "expected linear, identity or mlpNx_gelu"
        )
    if projector_type == "identity" and design.hidden_size != hidden_size:
        raise CheckpointError(
            f"'{folder}/config.json': mm_projector_a_type is identity, but its audio tower is "
            f"{design.hidden_size} wide and its language model {hidden_size}"
        )
    return projector_type


def _sound_window(folder: Path, raw: Mapping[str, Any]) -> SoundWindow:
    fields: dict[str, Any] = {}
    for key, (field, most) in WINDOW_KEYS.items():
        value = raw.get(key)
        if value is None:
            continue
        is_whole = field == "num_clips"
        if not is_positive(value) or value > most or (is_whole and type(value) is not int):
            kind = "a whole number" if is_whole else "a number"
            raise CheckpointError(
                f"'{folder}/config.json': {key} is {value!r}, expected {kind} above 0, at most "
                f"{most}"
            )
        fields[field] = value if is_whole else float(value)
    try:
        return SoundWindow(**fields)
    except ValueError as error:
        line = str(error)
        for key, (field, _) in WINDOW_KEYS.items():
            line = line.replace(f"'{field}'", key)
        raise CheckpointError(f"'{folder}/config.json': {line}") from error


def _check_numbers(folder: Path, config: Any, fields: Mapping[str, range]) -> None:
    for name, allowed in fields.items():
        value = getattr(config, name, None)
        if value is not None and (type(value) is not int or value not in allowed):
            raise CheckpointError(
                f"'{folder}/config.json': {name} is {value!r}, expected {allowed.start} to "
                f"{allowed.stop - 1:,}"
            )


def _parse(config_class: Any, fields: Mapping[str, Any], folder: Path) -> Any:
    try:
        return config_class.from_dict(dict(fields))
    except Exception as error:
        # the classes of transformers check their fields in many ways, and some by failing
        reason = one_line(error) or type(error).__name__
        raise CheckpointError(f"'{folder}/config.json' is not understood: {reason}") from error


def _refuse_unsupported(folder: Path, raw: Mapping[str, Any]) -> None:
    expected = {
        "model_type": (raw.get("model_type"), tuple(LANGUAGE_CONFIGS)),
        "mm_vision_select_feature": (raw.get("mm_vision_select_feature") or "patch", ("patch",)),
        "tie_word_embeddings": (raw.get("tie_word_embeddings") or False, (False,)),
    }
    for field, (found, supported) in expected.items():
        if found not in supported:
            raise CheckpointError(
                f"'{folder}/config.json': {field} {json.dumps(found)} is not supported, expected "
                f"{' or '.join(map(json.dumps, supported))}"
            )


def _positive(folder: Path, raw: Mapping[str, Any], field: str, default: int) -> int:
    value = raw.get(field)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise CheckpointError(f"'{folder}/config.json': {field} is {value!r}, expected 1 or more")
    return value


def _tower_blocks(folder: Path, raw: Mapping[str, Any], num_layers: int) -> int:
    select_layer = raw.get("mm_vision_select_layer", -1)
    num_states = num_layers + 1  # the embeddings count as state 0
    if type(select_layer) is not int or not -num_states <= select_layer < num_states:
        raise CheckpointError(
            f"'{folder}/config.json': mm_vision_select_layer is {select_layer!r}, "
            f"but the tower has {num_layers} layers"
        )
    return select_layer % num_states
