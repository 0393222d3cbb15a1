"""The public names: every tensor of the five sizes, claimed once."""

import json
from dataclasses import replace

import pytest
import torch

from tests.goldens import spec
from tests.tiny import tiny_engine, write_json
from vla2_models.beats_design import read_design
from vla2_models.config import read_audio, read_config
from vla2_models.loading import build_empty, load_model
from vla2_models.names import AUDIO_TOWER_PREFIX, find_places, public_name

# the numbers of the language models and towers that the public checkpoints are made of
MISTRAL = {
    "model_type": "videollama2_mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}
MIXTRAL = {
    **MISTRAL,
    "model_type": "videollama2_mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN2_72B = {
    "model_type": "videollama2_qwen2",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
QWEN2_7B = {
    **QWEN2_72B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
# language model, tower, connector, frames; then what the spec counts: tensors, 1e9 parameters of
# the whole, 1e6 of the connector, visual tokens
MODELS = {
    "VideoLLaMA2-7B": (MISTRAL, CLIP, "stc_connector", 8, 795, 8.034, 489.2, 845),
    "VideoLLaMA2.1-7B-16F": (QWEN2_7B, SIGLIP, "stc_connector_v35", 16, 900, 8.421, 376.9, 1352),
    "VideoLLaMA2-8x7B": (MIXTRAL, CLIP, "stc_connector", 8, 1499, 47.495, 489.2, 845),
    "VideoLLaMA2-72B": (QWEN2_72B, CLIP, "stc_connector", 8, 1467, 74.944, 1934.7, 845),
}
EARS = {
    "mm_audio_tower": "audio_tower.bin",
    "mm_projector_a_type": "mlp2x_gelu",
    "mm_hidden_size_a": 768,
    "hidden_size_a": 3584,
}
# of the position biases that the layers of the audio tower share
COPIES = [
    f"model.audio_tower.encoder.layers.{i}.self_attn.relative_attention_bias.weight"
    for i in range(1, 12)
]


def describe_public(name, folder, **more):
    """Write the config.json of a public checkpoint, and read it."""
    language, tower, connector, num_frames = MODELS[name][:4]
    mm = {
        "mm_vision_tower": "tower",
        "mm_projector_type": connector,
        "mm_hidden_size": tower["hidden_size"],
        "mm_vision_select_layer": -2,
        "num_frames": num_frames,
        "tie_word_embeddings": False,
        **more,
    }
    (folder / "tower").mkdir()
    write_json(folder / "config.json", language | mm)
    write_json(folder / "tower/config.json", tower)
    write_json(folder / "tower/preprocessor_config.json", {})
    return read_config(folder, folder / "tower")


def build_public(name, folder):
    """Build a public checkpoint at its full size on the meta device."""
    return build_empty(describe_public(name, folder))


@pytest.fixture
def shapes_with_ears():
    """Name -> shape of every tensor of VideoLLaMA2.1-7B-AV."""
    lines = spec("state_dict_keys_av.tsv").read_text(encoding="utf-8").splitlines()
    return {name: json.loads(shape) for name, shape in (line.split("\t") for line in lines)}


def build_with_ears(shapes, folder):
    """Build VideoLLaMA2.1-7B-AV on the meta device, its ears as the shapes are."""
    config = describe_public("VideoLLaMA2.1-7B-16F", folder, **EARS)
    of_tower = {
        name.removeprefix(AUDIO_TOWER_PREFIX): tuple(shape)
        for name, shape in shapes.items()
        if name.startswith(AUDIO_TOWER_PREFIX)
    }
    return build_empty(replace(config, audio=read_audio(config, read_design(of_tower))))


@pytest.mark.parametrize("name", MODELS)
def test_every_public_tensor_has_one_place_of_its_shape(name, tmp_path):
    wanted = json.loads(spec("state_dict_keys.json").read_text())[name]
    state = build_public(name, tmp_path).state_dict()
    places = find_places(state)
    shapes = {public: list(place.of(state).shape) for public, place in places.items()}
    assert len(shapes) == MODELS[name][4]
    assert shapes == wanted


@pytest.mark.parametrize("name", MODELS)
def test_places_cover_every_parameter_once(name, tmp_path):
    # so that a wrong layout of the fused experts, or two names for one part, cannot pass
    model = build_public(name, tmp_path)
    state = model.state_dict()
    places = find_places(state)
    assert len(set(map(str, places.values()))) == len(places)
    covered = dict.fromkeys(state, 0)
    for place in places.values():
        covered[place.parameter] += place.of(state).numel()
    assert covered == {name: tensor.numel() for name, tensor in state.items()}


@pytest.mark.parametrize("name", MODELS)
def test_public_sizes_are_those_of_the_spec(name, tmp_path):
    model = build_public(name, tmp_path)
    _, _, _, _, _, billions, connector_millions, tokens = MODELS[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions
    connector = sum(p.numel() for p in model.mm_projector.parameters())
    assert round(connector / 1e6, 1) == connector_millions
    assert model.config.visual_tokens == tokens


@pytest.mark.parametrize("has_copies", [True, False])
def test_every_tensor_of_the_checkpoint_with_ears_has_one_place(
    shapes_with_ears, tmp_path, has_copies
):
    held = {n: s for n, s in shapes_with_ears.items() if has_copies or n not in COPIES}
    state = build_with_ears(held, tmp_path).state_dict()
    places = find_places(state)
    shapes = {public: list(place.of(state).shape) for public, place in places.items()}
    assert len(shapes) == 1156
    assert shapes == shapes_with_ears
    assert [public for public, place in places.items() if place.is_copy] == COPIES


def test_places_with_ears_cover_every_parameter_once(shapes_with_ears, tmp_path):
    model = build_with_ears(shapes_with_ears, tmp_path)
    state = model.state_dict()
    places = find_places(state)
    owned = [place.parameter for place in places.values() if not place.is_copy]
    assert sorted(owned) == sorted(state)
    (shared,) = {place.parameter for place in places.values() if place.is_copy}
    assert places[COPIES[0].replace(".1.", ".0.")].parameter == shared
    assert sum(tensor.numel() for tensor in state.values()) == 8_527_053_151


def test_full_size_ears_are_those_of_the_spec(shapes_with_ears, tmp_path):
    model = build_with_ears(shapes_with_ears, tmp_path)
    sizes = [
        sum(p.numel() for p in part.parameters())
        for part in (model.audio_tower, model.mm_projector_a)
    ]
    assert sizes == [90_717_055, 15_604_736]
    assert model.config.audio.audio_tokens == 1496


def test_parts_of_fused_experts_do_not_overlap():
    fused = "language_model.model.layers.0.mlp.experts."
    state = {
        f"{fused}gate_up_proj": torch.zeros(3, 10, 4),
        f"{fused}down_proj": torch.zeros(3, 4, 5),
    }
    for i, place in enumerate(find_places(state).values()):
        place.of(state).fill_(i + 1)
    # expert 1: five rows of w1 above five of w3; w2 for itself
    assert state[f"{fused}gate_up_proj"][1, :, 0].tolist() == [3] * 5 + [4] * 5
    assert state[f"{fused}down_proj"][:, 0, 0].tolist() == [7, 8, 9]
    assert all(tensor.all() for tensor in state.values())


def test_a_name_of_no_part_is_refused():
    with pytest.raises(ValueError, match=r"'ears\.weight' belongs to no part"):
        public_name("ears.weight")


def test_names_of_a_loaded_model_begin_as_the_public_ones():
    places = find_places(load_model(tiny_engine().checkpoint).state_dict())
    tower = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"
    for name in (tower, "model.mm_projector.sampler.0.bias", "model.norm.weight", "lm_head.weight"):
        assert name in places
