from dataclasses import replace

import pytest
from transformers import CLIPVisionConfig, MixtralConfig, Qwen2Config, SiglipVisionConfig

from tests.tiny import change_json, tower_of, write_json, write_tiny
from vla2_models.config import read_audio, read_config
from vla2_models.connectors import PROJECTOR_TYPES
from vla2_models.errors import CheckpointError
from vla2_models.files import read_json
from vla2_models.loading import build_empty
from vla2_models.miniature import AUDIO_TOWER
from vla2_models.sound import SoundWindow


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path)


def read(folder):
    return read_config(folder, tower_of(folder))


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("model_type", ["videollama2_mistral", "videollama2"])
def test_both_names_of_the_mistral_type_are_read(folder, model_type):
    change_json(folder / "config.json", model_type=model_type)
    config = read(folder)
    assert config.model_type == model_type
    assert config.language.hidden_size == 32
    assert config.language.rope_parameters["rope_theta"] == 1e6
    assert (config.mm_hidden_size, config.num_patches) == (48, 16)
    assert config.visual_tokens == 45


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "videollama2_phi3", 'model_type "videollama2_phi3" is not supported'),
        ("model_type", ["videollama2"], 'model_type ["videollama2"] is not supported'),
        ("mm_vision_select_feature", "cls_patch", '"cls_patch" is not supported, expected "patch"'),
        ("mm_projector_type", "stc_v35", 'mm_projector_type "stc_v35" is unknown, expected one of'),
        ("mm_projector_type", "mlp3x_gelu", '"mlp3x_gelu" is unknown'),
        ("mm_projector_type", "identity", '"identity" is unknown'),
        ("mm_projector_type", ["linear"], '["linear"] is unknown'),
        ("mm_projector_padding", 2, "mm_projector_padding is 2, expected 0 or 1"),
        ("mm_projector_padding", True, "mm_projector_padding is True, expected 0 or 1"),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_can(folder, field, value, said):
    change_json(folder / "config.json", **{field: value})
    line = refusal(folder)
    assert said in line
    assert f"'{folder}" in line


def test_missing_projector_type_is_linear(folder):
    # the reference's own default
    change_json(folder / "config.json", mm_projector_type=None)
    assert read(folder).visual_tokens == 16


@pytest.mark.parametrize("name", PROJECTOR_TYPES)
def test_every_public_projector_is_read(folder, name):
    change_json(folder / "config.json", mm_projector_type=name)
    config = read(folder)
    assert config.connector == PROJECTOR_TYPES[name]
    assert config.visual_tokens == PROJECTOR_TYPES[name].count_tokens(8, 16)


@pytest.mark.parametrize(
    ("model_type", "language"),
    [("videollama2_mixtral", MixtralConfig), ("videollama2_qwen2", Qwen2Config)],
)
def test_language_model_is_that_of_the_model_type(folder, model_type, language):
    change_json(folder / "config.json", model_type=model_type, mm_projector_type="stc_connector")
    config = read(folder)
    assert type(config.language) is language
    assert config.language.hidden_size == 32


def to_siglip(folder):
    tower = read_json(tower_of(folder) / "config.json")
    write_json(
        tower_of(folder) / "config.json",
        {"model_type": "siglip", "vision_config": tower | {"model_type": "siglip_vision_model"}},
    )


def test_towers_class_is_that_of_its_own_config_not_of_its_name(folder):
    assert type(read(folder).vision) is CLIPVisionConfig
    to_siglip(folder)
    change_json(folder / "config.json", mm_projector_type="stc_connector_v35")
    config = read(folder)
    assert "clip" in config.mm_vision_tower
    assert type(config.vision) is SiglipVisionConfig


@pytest.mark.parametrize("model_type", [None, "dinov2", ["clip"]], ids=str)
def test_tower_of_an_unknown_kind_is_refused(folder, model_type):
    change_json(tower_of(folder) / "config.json", model_type=model_type)
    line = refusal(folder)
    assert f"'{tower_of(folder)}' holds a model of type" in line
    assert line.endswith("expected a vision tower: CLIP or SigLIP")


def test_siglip_with_the_older_connectors_name_is_doubted(folder):
    # tensors of the same shapes: nothing else would notice
    to_siglip(folder)
    line = refusal(folder)
    assert 'mm_projector_type "stc_connector" beside a SigLIP tower' in line
    assert '"stc_connector_v35"' in line


@pytest.mark.parametrize(("padding", "tokens"), [(0, 4 * 2 * 2), (1, 5 * 3 * 3)])
def test_padding_that_is_written_out_is_believed(folder, padding, tokens):
    to_siglip(folder)
    change_json(folder / "config.json", mm_projector_padding=padding)
    assert read(folder).visual_tokens == tokens


def test_missing_tower_is_refused(folder):
    change_json(folder / "config.json", mm_vision_tower=None)
    assert "names no mm_vision_tower" in refusal(folder)


def test_older_key_of_the_tower_is_read(folder):
    name = read(folder).mm_vision_tower
    config = read_json(folder / "config.json") | {"mm_vision_tower": None, "vision_tower": name}
    write_json(folder / "config.json", config)
    assert read(folder).mm_vision_tower == name


def test_tower_of_another_width_is_refused(folder):
    change_json(folder / "config.json", mm_hidden_size=1024)
    line = refusal(folder)
    assert "mm_hidden_size is 1024" in line
    assert "is 48 wide" in line


@pytest.mark.parametrize("num_frames", [0, -8, "8", 8.5, True], ids=repr)
def test_number_of_frames_that_is_none_is_refused(folder, num_frames):
    change_json(folder / "config.json", num_frames=num_frames)
    assert f"num_frames is {num_frames!r}, expected 1 or more" in refusal(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "flash_attention_2", "attn_implementation": "eager"},
        {"return_dict": False, "output_attentions": True, "torchscript": True},
        {"num_experts_per_tok": 2, "num_local_experts": 8},
        {"mm_hidden_size": None, "mm_vision_select_feature": None, "num_frames": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_that_decide_nothing_change_nothing(folder, fields):
    build = build_empty(read(folder))
    write_json(folder / "config.json", read_json(folder / "config.json") | fields)
    config = read(folder)
    other = build_empty(config)
    assert {n: t.shape for n, t in build.state_dict().items()} == {
        n: t.shape for n, t in other.state_dict().items()
    }
    of_model = other.language_model.config
    assert of_model._attn_implementation == build.language_model.config._attn_implementation
    assert of_model.return_dict is True
    assert config.num_frames == 8


def test_tied_embeddings_are_refused(folder):
    change_json(folder / "config.json", tie_word_embeddings=True)
    assert "tie_word_embeddings true is not supported, expected false" in refusal(folder)


@pytest.mark.parametrize("factor", [-1.0, 0, True, "4"])
def test_scaling_of_positions_that_means_nothing_is_refused(folder, factor):
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 1e6}
    change_json(folder / "config.json", rope_theta=None, rope_parameters=rope)
    assert "factor" in refusal(folder)


def test_fewer_frames_than_the_connector_joins_are_refused(folder):
    change_json(folder / "config.json", num_frames=1, mm_projector_type="stc_connector_v35")
    line = refusal(folder)
    assert "num_frames is 1, but its stc_connector_v35 needs at least 2" in line


def test_missing_number_of_frames_is_eight(folder):
    change_json(folder / "config.json", num_frames=None)
    assert read(folder).num_frames == 8


@pytest.mark.parametrize(
    ("select_layer", "blocks"), [(-1, 3), (-2, 2), (-4, 0), (0, 0), (3, 3)], ids=str
)
def test_selected_layer_counts_the_blocks_before_it(folder, select_layer, blocks):
    change_json(folder / "config.json", mm_vision_select_layer=select_layer)
    assert read(folder).num_tower_blocks == blocks


def test_missing_selected_layer_is_the_last(folder):
    change_json(folder / "config.json", mm_vision_select_layer=None)
    assert read(folder).num_tower_blocks == 3


@pytest.mark.parametrize("select_layer", [-5, 4, "-2"], ids=repr)
def test_selected_layer_that_the_tower_lacks_is_refused(folder, select_layer):
    change_json(folder / "config.json", mm_vision_select_layer=select_layer)
    line = refusal(folder)
    assert f"mm_vision_select_layer is {select_layer!r}" in line
    assert "3 layers" in line


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_missing_file_of_the_tower_is_refused(folder, name):
    (tower_of(folder) / name).unlink()
    assert refusal(folder) == f"'{tower_of(folder)}' has no {name}"


def test_vision_part_of_a_whole_clip_config_is_read(folder):
    tower = read_json(tower_of(folder) / "config.json")
    write_json(tower_of(folder) / "config.json", {"model_type": "clip", "vision_config": tower})
    assert read(folder).mm_hidden_size == 48


def test_tower_config_without_layers_has_those_of_its_class(folder):
    change_json(tower_of(folder) / "config.json", num_hidden_layers=None)
    assert read(folder).num_tower_blocks == 11  # the last but one state of CLIP's 12 layers


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers"])
def test_tower_field_of_the_wrong_kind_is_refused(folder, field):
    change_json(tower_of(folder) / "config.json", **{field: "many"})
    assert f"'{tower_of(folder)}/config.json' is not understood" in refusal(folder)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_language_field_of_the_wrong_kind_is_refused(folder, field):
    change_json(folder / "config.json", **{field: "many"})
    assert f"'{folder}/config.json' is not understood" in refusal(folder)


def test_missing_sliding_window_means_4096(folder):
    # the reference's own habit: the key must be written, with null, to have none
    assert read(folder).language.sliding_window is None
    fields = read_json(folder / "config.json")
    del fields["sliding_window"]
    write_json(folder / "config.json", fields)
    assert read(folder).language.sliding_window == 4096


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1]", "holds a list, expected an object"),
        ("\xff", "cannot be read"),
    ],
    ids=["empty", "cut", "list", "latin1"],
)
def test_file_that_is_no_json_object_is_refused(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(CheckpointError, match=said):
        read_json(path)


@pytest.fixture
def ears(tmp_path):
    """A checkpoint whose config.json names an audio tower; the tower is 32 wide, as the rest."""
    return write_tiny(tmp_path, has_ears=True)


def hear(folder, design=AUDIO_TOWER):
    return read_audio(read(folder), design)


def deafness(folder, design=AUDIO_TOWER):
    with pytest.raises(CheckpointError) as caught:
        hear(folder, design)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"'{folder}/config.json': ")
    return line


def test_ears_hear_half_a_minute_as_the_public_ones(ears):
    audio = hear(ears)
    assert audio.window == SoundWindow(30.0, 8, 2.0)
    assert audio.projector_type == "mlp2x_gelu"
    assert audio.audio_tokens == 1496
    assert read(ears).audio is None  # until the shapes of the tower are known


@pytest.mark.parametrize("name", [None, ""], ids=repr)
def test_checkpoint_that_names_no_audio_tower_has_no_ears(ears, name):
    change_json(ears / "config.json", mm_audio_tower=name)
    assert hear(ears) is None


@pytest.mark.parametrize(
    ("fields", "num_tokens"),
    [
        ({"mm_audio_window_s": 20}, 124 * 8),  # 1998 frames
        ({"mm_audio_window_s": 2.5, "mm_audio_num_clips": 2, "mm_audio_clip_s": 1.25}, 15 * 8),
        ({"mm_audio_num_clips": 15}, 1496),
        ({"mm_audio_clip_s": 0.5}, 1496),
    ],
    ids=str,
)
def test_window_that_is_written_down_is_heard(ears, fields, num_tokens):
    change_json(ears / "config.json", **fields)
    audio = hear(ears)
    assert audio.audio_tokens == num_tokens
    found = (audio.window.duration_s, audio.window.num_clips, audio.window.clip_s)
    keys = ("mm_audio_window_s", "mm_audio_num_clips", "mm_audio_clip_s")
    assert found == tuple(fields.get(key, usual) for key, usual in zip(keys, (30, 8, 2)))
    assert [type(value) for value in found] == [float, int, float]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("mm_audio_tower", 7, "mm_audio_tower is 7, expected a path, or null"),
        ("mm_audio_tower", ["x"], "mm_audio_tower is ['x'], expected a path, or null"),
        ("mm_audio_tower", False, "mm_audio_tower is False, expected a path, or null"),
        ("hidden_size_a", 4096, "hidden_size_a is 4096, but its language model is 32 wide"),
        ("hidden_size_a", "32", "hidden_size_a is '32', but its language model is 32 wide"),
        ("mm_hidden_size_a", 768, "mm_hidden_size_a is 768, but its audio tower is 32 wide; the"),
        ("mm_projector_a_type", "mlp", '"mlp" is unknown, expected linear, identity or mlpNx_gelu'),
        ("mm_projector_a_type", "mlp0x_gelu", '"mlp0x_gelu" is unknown'),
        ("mm_projector_a_type", ["linear"], 'mm_projector_a_type ["linear"] is unknown'),
        ("mm_projector_a_type", "qformer", 'mm_projector_a_type "qformer" is unknown'),
        ("mm_audio_window_s", "30", "mm_audio_window_s is '30', expected a number above 0"),
        ("mm_audio_window_s", True, "mm_audio_window_s is True, expected a number above 0"),
        ("mm_audio_window_s", float("nan"), "mm_audio_window_s is nan, expected a number"),
        ("mm_audio_window_s", -1, "mm_audio_window_s is -1, expected a number above 0"),
        ("mm_audio_window_s", 10**400, "000, expected a number above 0, at most 600"),
        ("mm_audio_window_s", 0.01, "mm_audio_window_s is 0.01, expected at least 0.175"),
        ("mm_audio_window_s", 15, "8 clips of 2 s do not fit into mm_audio_window_s 15"),
        ("mm_audio_num_clips", 8.0, "mm_audio_num_clips is 8.0, expected a whole number above 0"),
        ("mm_audio_num_clips", 0, "mm_audio_num_clips is 0, expected a whole number above 0"),
        ("mm_audio_num_clips", 10**9, "mm_audio_num_clips is 1000000000, expected a whole number"),
        ("mm_audio_clip_s", [2], "mm_audio_clip_s is [2], expected a number above 0"),
        ("mm_audio_clip_s", 4, "8 clips of 4 s do not fit into mm_audio_window_s 30"),
    ],
)
def test_ears_that_cannot_hear_are_refused_with_what_can(ears, field, value, said):
    change_json(ears / "config.json", **{field: value})
    assert said in deafness(ears)


def test_window_shorter_than_a_patch_is_refused(ears):
    window = {"mm_audio_window_s": 0.3, "mm_audio_num_clips": 1, "mm_audio_clip_s": 0.3}
    change_json(ears / "config.json", **window)
    assert hear(ears).audio_tokens == 8
    line = deafness(ears, replace(AUDIO_TOWER, patch_size=32))
    assert "mm_audio_window_s is 0.3, which is 28 frames of sound; its audio tower needs" in line


def test_missing_type_of_the_audio_projector_is_linear(ears):
    # the reference's own default
    change_json(ears / "config.json", mm_projector_a_type=None)
    assert hear(ears).projector_type == "linear"


def test_missing_widths_of_the_ears_are_those_of_the_networks(ears):
    change_json(ears / "config.json", mm_hidden_size_a=None, hidden_size_a=None)
    model = build_empty(replace(read(ears), audio=hear(ears)))
    assert model.mm_projector_a[0].in_features == AUDIO_TOWER.hidden_size == 32


def test_identity_between_two_widths_is_refused(ears):
    fields = {"mm_projector_a_type": "identity", "mm_hidden_size_a": None}
    change_json(ears / "config.json", **fields)
    assert hear(ears).projector_type == "identity"
    line = deafness(ears, replace(AUDIO_TOWER, hidden_size=48))
    assert "is identity, but its audio tower is 48 wide and its language model 32" in line
