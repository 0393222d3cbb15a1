import pytest

from tests.tiny import change_json, tower_of, write_json, write_tiny
from vla2_models.config import read_config
from vla2_models.errors import CheckpointError
from vla2_models.files import read_json
from vla2_models.stc import count_tokens


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
    assert count_tokens(config.num_frames, config.num_patches) == 45


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("model_type", "videollama2_qwen2", '"videollama2_qwen2"'),
        ("model_type", "videollama2_mixtral", '"videollama2_mixtral"'),
        ("mm_projector_type", "stc_connector_v35", '"stc_connector_v35"'),
        ("mm_projector_type", None, '"linear"'),
        ("mm_vision_tower", "google/siglip-so400m", '"google/siglip-so400m"'),
        ("mm_vision_select_feature", "cls_patch", '"cls_patch"'),
        ("tune_mm_mlp_adapter", True, "true"),
    ],
)
def test_what_this_version_does_not_run_is_refused(folder, field, value, shown):
    change_json(folder / "config.json", **{field: value})
    assert f"{field} {shown} is not supported by this version" in refusal(folder)


def test_missing_tower_is_refused(folder):
    change_json(folder / "config.json", mm_vision_tower=None)
    assert "names no mm_vision_tower" in refusal(folder)


def test_older_key_of_the_tower_is_read(folder):
    name = read(folder).mm_vision_tower
    change_json(folder / "config.json", mm_vision_tower=None, vision_tower=name)
    assert read(folder).mm_vision_tower == name


def test_tower_of_another_width_is_refused(folder):
    change_json(folder / "config.json", mm_hidden_size=1024)
    line = refusal(folder)
    assert "mm_hidden_size is 1024" in line
    assert "is 48 wide" in line


@pytest.mark.parametrize("num_frames", [0, -8, "8", 8.5], ids=repr)
def test_number_of_frames_that_is_none_is_refused(folder, num_frames):
    change_json(folder / "config.json", num_frames=num_frames)
    assert f"num_frames is {num_frames!r}, expected 1 or more" in refusal(folder)


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
