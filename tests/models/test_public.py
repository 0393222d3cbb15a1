import dataclasses
import json
import re
import tomllib
from importlib import resources
from math import prod
from pathlib import Path, PurePath

import pytest
import yaml

from tests.goldens import spec
from vla2_models.public import (
    WITH_EARS,
    PublicCheckpoint,
    find_public,
    public_checkpoints,
    suggest,
)

ROOT = Path(__file__).parents[2]
OWNER = "DAMO-NLP-SG/"
WHOLE = [
    "DAMO-NLP-SG/VideoLLaMA2-7B",
    "DAMO-NLP-SG/VideoLLaMA2-7B-16F",
    "DAMO-NLP-SG/VideoLLaMA2-8x7B",
    "DAMO-NLP-SG/VideoLLaMA2-72B",
    "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F",
]

# total, tower and connector, as the reference counts them
MISTRAL = ("8.034", "303.5", "489.2")
COUNTS = {
    "VideoLLaMA2-7B": MISTRAL,
    "VideoLLaMA2-7B-16F": MISTRAL,
    "VideoLLaMA2-8x7B": ("47.495", "303.5", "489.2"),
    "VideoLLaMA2-72B": ("74.944", "303.5", "1934.7"),
    "VideoLLaMA2.1-7B-16F": ("8.421", "428.2", "376.9"),
    "VideoLLaMA2.1-7B-AV": ("8.527", "428.2", "376.9"),
}

# config.json of the language models: width, ffn, width of k and v, layers, experts
LANGUAGE_MODELS = {
    "mistralai/Mistral-7B-Instruct-v0.2": (4096, 14336, 1024, 32, 1),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (4096, 14336, 1024, 32, 8),
    "Qwen/Qwen2-72B-Instruct": (8192, 29568, 1024, 80, 1),
    "Qwen/Qwen2-7B-Instruct": (3584, 18944, 512, 28, 1),
}

every = pytest.mark.parametrize("public", public_checkpoints(), ids=lambda p: p.id.split("/")[1])


def spec_files():
    return sorted((resources.files("vla2_models") / "specs").iterdir())


def linear_shapes(public):
    """(out, in) of each linear layer of the decoder's blocks."""
    hidden, ffn, kv, num_layers, num_experts = LANGUAGE_MODELS[public.language_model]
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    mlp = [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
    return num_layers * (attention + num_experts * mlp)


def shapes_of(public):
    """Name -> shape of every parameter, as the reference builds them."""
    if public.id == WITH_EARS:
        lines = spec("state_dict_keys_av.tsv").read_text(encoding="utf-8").splitlines()
        shapes = {name: json.loads(shape) for name, shape in (line.split("\t") for line in lines)}
        # eleven names are of one parameter that has a twelfth
        copy = re.compile(r"\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.")
        return {name: shape for name, shape in shapes.items() if not copy.search(name)}
    shapes = json.loads(spec("state_dict_keys.json").read_text(encoding="utf-8"))
    size = public.id.removeprefix(OWNER).removesuffix("-Base")
    return shapes[size if size in shapes else "VideoLLaMA2-7B"]


def test_ids_are_the_eleven_public_ones_in_order():
    ids = [public.id for public in public_checkpoints()]
    assert ids == [*(id + end for id in WHOLE for end in ("", "-Base")), WITH_EARS]


def test_each_file_is_named_like_its_id():
    names = {f"{public.id.removeprefix(OWNER)}.yaml" for public in public_checkpoints()}
    assert {path.name for path in spec_files()} == names


def test_the_wheel_takes_every_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["vla2_models"]
    assert len(spec_files()) == 11
    for path in spec_files():
        assert any(PurePath("specs", path.name).match(pattern) for pattern in patterns)


def test_file_without_a_field_is_refused():
    assert "audio_tokens" not in spec_files()[0].read_text(encoding="utf-8")
    facts = yaml.safe_load(spec_files()[0].read_text(encoding="utf-8"))
    for field in list(facts):
        fewer = {name: value for name, value in facts.items() if name != field}
        with pytest.raises(TypeError, match=f"'{field}'"):
            PublicCheckpoint(**fewer)


def test_file_with_an_unknown_field_is_refused():
    facts = yaml.safe_load(spec_files()[0].read_text(encoding="utf-8"))
    with pytest.raises(TypeError, match="'licence'"):
        PublicCheckpoint(**facts, licence="apache-2.0")


@every
def test_facts_have_their_kinds(public):
    for field in dataclasses.fields(public):
        value = getattr(public, field.name)
        kinds = {"int": (int,), "float": (float,), "float | None": (float, type(None))}
        assert isinstance(value, kinds.get(field.type, (str,))), field.name


@every
def test_projector_differs_from_its_whole_model_in_id_form_and_disk(public):
    whole = find_public(public.id.removesuffix("-Base"))
    is_base = public.id.endswith("-Base")
    assert (whole.form, public.form) == ("whole", "projector" if is_base else "whole")
    same = dataclasses.replace(public, id=whole.id, form=whole.form, disk_gb=whole.disk_gb)
    assert same == whole


@every
def test_counts_are_those_of_the_reference(public):
    total, tower, connector = COUNTS[public.id.removeprefix(OWNER).removesuffix("-Base")]
    assert f"{public.num_parameters / 1e9:.3f}" == total
    assert f"{public.num_tower_parameters / 1e6:.1f}" == tower
    assert f"{public.num_connector_parameters / 1e6:.1f}" == connector
    parts = public.num_tower_parameters + public.num_connector_parameters
    parts += public.num_audio_parameters
    assert public.num_parameters == public.num_language_parameters + parts


@every
def test_counts_are_those_of_the_key_list(public):
    sizes = {name: prod(shape) for name, shape in shapes_of(public).items()}
    tower = sum(n for name, n in sizes.items() if name.startswith("model.vision_tower."))
    connector = sum(n for name, n in sizes.items() if name.startswith("model.mm_projector."))
    ears = ("model.audio_tower.", "model.mm_projector_a.")
    audio = sum(n for name, n in sizes.items() if name.startswith(ears))
    total = sum(sizes.values())
    assert public.num_parameters == total
    assert public.num_tower_parameters == tower
    assert public.num_connector_parameters == connector
    assert public.num_audio_parameters == audio
    assert public.num_language_parameters == total - tower - connector - audio


@every
def test_grid_and_tokens_follow_from_the_tower_and_the_connector(public):
    assert public.grid_size == public.image_size // 14
    assert f"patch14-{public.image_size}" in public.tower
    # padding adds a place on each axis
    extra = {"stc_connector": 1, "stc_connector_v35": 0}[public.connector]
    slots, side = public.num_frames // 2 + extra, public.grid_size // 2 + extra
    assert public.visual_tokens == slots * side**2


@every
def test_audio_tokens_are_those_of_30_seconds_of_patches(public):
    # frames of 25 ms each 10 ms, then squares of 16 frames and 16 of 128 mels
    num_frames = 1 + (30 * 16000 - 400) // 160
    wanted = num_frames // 16 * (128 // 16) if public.id == WITH_EARS else 0
    assert public.audio_tokens == wanted
    assert (public.num_audio_parameters > 0) == (wanted > 0)


@every
def test_memory_and_disk_follow_from_the_counts(public):
    assert public.memory_float32_gb == round(public.num_parameters * 4e-9, 1)
    assert public.memory_bfloat16_gb == round(public.num_parameters * 2e-9, 1)
    if public.form == "whole":
        assert public.disk_gb == public.memory_bfloat16_gb
    else:
        assert public.disk_gb == round(public.num_connector_parameters * 2e-9, 2)


@every
def test_quantised_memory_spares_all_but_the_linear_layers(public):
    weights = sum(prod(shape) for shape in linear_shapes(public))
    num_rows = sum(shape[0] for shape in linear_shapes(public))
    spared = 2 * (public.num_parameters - weights)
    # a number for each 64 weights in a byte, and one for each 256 of these in float32
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert public.memory_4bit_gb == round((weights * bits / 8 + spared) * 1e-9, 1)
    if "mixtral" in public.model_type:
        assert public.memory_8bit_gb is None
    else:
        assert public.memory_8bit_gb == round((weights + 4 * num_rows + spared) * 1e-9, 1)


def test_public_checkpoint_is_found_by_its_very_id():
    assert find_public("DAMO-NLP-SG/VideoLLaMA2-72B").num_parameters == 74_944_389_376
    assert find_public("damo-nlp-sg/videollama2-72b") is None
    assert find_public("VideoLLaMA2-72B") is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("VideoLLaMA2-7B", "DAMO-NLP-SG/VideoLLaMA2-7B"),
        ("DAMO-NLP-SG/VideoLLaMA-2-7B", "DAMO-NLP-SG/VideoLLaMA2-7B"),
        ("damo-nlp-sg/videollama2-7b-16f", "DAMO-NLP-SG/VideoLLaMA2-7B-16F"),
        ("VideoLLaMA2.1-7B-16f", "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F"),
        ("VideoLLaMA2.1-7B", "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F"),
        ("VideoLLaMA2.1-7B-A", WITH_EARS),
        ("VideoLLaMA2.1-7B-av", WITH_EARS),
        ("VideoLLaMA-2.1-7B-AV", WITH_EARS),
        ("VideoLLaMA2-7B-AV", WITH_EARS),
        ("videollama2_8x7b_base", "DAMO-NLP-SG/VideoLLaMA2-8x7B-Base"),
        ("DAMO/VideoLLaMA2-72B/", "DAMO-NLP-SG/VideoLLaMA2-72B"),
    ],
    ids=lambda value: value,
)
def test_mistyped_id_is_suggested(name, meant):
    assert suggest(name) == meant


@pytest.mark.parametrize("name", ["bert-base", "meta-llama/Llama-2-7b", "models", "/", ""])
def test_name_of_something_else_suggests_nothing(name):
    assert suggest(name) is None


def test_right_id_suggests_nothing():
    assert suggest("DAMO-NLP-SG/VideoLLaMA2-7B") is None
    assert suggest(WITH_EARS) is None
    assert suggest("owner/mine", known=["owner/mine"]) is None


def test_ids_of_this_disk_are_suggested_too():
    known = ("owner/my-tuned-model", "owner/VideoLLaMA2-7B")
    assert suggest("my-tuned-modell", known) == "owner/my-tuned-model"
    assert suggest("my-tuned-modell") is None
    assert suggest("ownr/VideoLLaMA2-7B", known) == "owner/VideoLLaMA2-7B"
    assert suggest("DAMO/VideoLLaMA2-7B", known) == "DAMO-NLP-SG/VideoLLaMA2-7B"
