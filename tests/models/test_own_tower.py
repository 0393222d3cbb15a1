"""Checkpoints whose tower lies inside their own folder, and the one that ships with the package."""

import json

import pytest
import torch

from tests.tiny import read_tensors, write_tensors, write_tiny, write_with_tower
from vla2_models import hub
from vla2_models.builtin_design import write_untrained
from vla2_models.checkpoint import open_checkpoint
from vla2_models.errors import CheckpointError
from vla2_models.hub import BUILTIN, Source, has_builtin, own_tower
from vla2_models.loading import check_weights, load_model
from vla2_models.names import TOWER_PREFIX
from vla2_models.saving import save_checkpoint
from vla2cli.engine import Engine

ALONE = Source(offline=True)


@pytest.fixture
def folder(tmp_path):
    return write_with_tower(tmp_path / "model")


@pytest.fixture
def no_builtin(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BUILTIN_FOLDER", tmp_path / "builtin")


def test_a_folder_with_its_own_tower_opens_from_anywhere(folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_checkpoint("../model", ALONE).config.mm_vision_tower == "./clip-tower"


def test_its_own_tower_goes_before_one_of_that_name_in_the_current_folder(
    folder, tmp_path, monkeypatch
):
    (tmp_path / "clip-tower").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("model", ALONE).config.num_patches == 16


def test_weights_of_its_own_tower_are_read_where_the_checkpoint_lacks_them(folder):
    whole = load_model(open_checkpoint(str(folder), ALONE)).state_dict()
    tensors = read_tensors(folder)
    tower = {name: tensors.pop(name) for name in list(tensors) if name.startswith(TOWER_PREFIX)}
    write_tensors(folder, tensors)
    of_tower = {f"vision_model.{k.removeprefix(TOWER_PREFIX)}": t for k, t in tower.items()}
    write_tensors(folder / "clip-tower", of_tower)
    apart = load_model(open_checkpoint(str(folder), ALONE)).state_dict()
    assert all(torch.equal(tensor, apart[name]) for name, tensor in whole.items())


def test_a_copy_takes_its_own_tower_with_it(folder, tmp_path):
    first = open_checkpoint(str(folder), ALONE)
    save_checkpoint(load_model(first), first, tmp_path / "copy")
    again = open_checkpoint(str(tmp_path / "copy"), ALONE)
    assert again.config.vision.to_dict() == first.config.vision.to_dict()
    assert again.config.preprocessor == first.config.preprocessor
    assert check_weights(again, values=True) == check_weights(first)


def test_nothing_is_left_of_a_copy_that_fails_after_its_tower(folder, tmp_path, monkeypatch):
    first = open_checkpoint(str(folder), ALONE)
    replace = type(tmp_path).replace

    def fail_at_last(path, target):
        if path.name == "config.json":
            raise OSError("the disk is full")
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", fail_at_last)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_checkpoint(load_model(first), first, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "name",
    ["clip-tower", "./../clip-tower", "./nowhere", "/clip-tower", "./a\0b", "./" + "x" * 999],
)
def test_other_towers_are_looked_for_elsewhere(tmp_path, name):
    (tmp_path / "model/clip-tower").mkdir(parents=True)
    (tmp_path / "clip-tower").mkdir()
    assert own_tower(name, tmp_path / "model") is None


def test_an_untrained_model_of_the_built_in_design_loads_and_answers_its_checks(tmp_path):
    write_untrained(tmp_path / "new", ["A red car moves to the right."] * 8)
    checkpoint = open_checkpoint(str(tmp_path / "new"), ALONE)
    assert Engine(checkpoint, device="cpu").check() == sum(
        tensor.numel() for tensor in load_model(checkpoint).state_dict().values()
    )


def test_builtin_names_the_model_of_the_package(tmp_path, monkeypatch, no_builtin):
    write_with_tower(tmp_path / "builtin")
    monkeypatch.chdir(tmp_path / "builtin")
    (tmp_path / "builtin/builtin").mkdir()  # a folder of that name is ./builtin
    found = open_checkpoint(BUILTIN, ALONE)
    assert (found.located.id, found.located.revision) == ("builtin", None)
    assert found.folder == tmp_path / "builtin"


def test_a_model_may_build_on_the_builtin_one(tmp_path, no_builtin):
    write_with_tower(tmp_path / "builtin")
    small = write_with_tower(tmp_path / "small", tune_mm_mlp_adapter=True, _name_or_path=BUILTIN)
    tensors = {k: t for k, t in read_tensors(small).items() if k.startswith("model.mm_projector")}
    write_tensors(small, tensors, "mm_projector.safetensors")
    (small / "model.safetensors").unlink()
    assert open_checkpoint(str(small), ALONE).text_folder == tmp_path / "builtin"


@pytest.mark.usefixtures("no_builtin")
def test_an_installation_without_a_model_says_so_and_lists_none():
    assert not has_builtin()
    with pytest.raises(CheckpointError, match=r"^'builtin' is the model that ships with vla2, and"):
        open_checkpoint(BUILTIN, ALONE)
    assert BUILTIN not in hub.folders_on_disk(None)


def test_a_revision_of_the_builtin_model_is_refused(tmp_path, no_builtin):
    write_with_tower(tmp_path / "builtin")
    with pytest.raises(CheckpointError, match="--revision is for models from the hub"):
        open_checkpoint(BUILTIN, ALONE, revision="main")


def test_what_ships_is_a_sound_demonstration_model_or_nothing():
    if not has_builtin():
        assert not (hub.BUILTIN_FOLDER / "config.json").exists()
        return
    checkpoint = open_checkpoint(BUILTIN, ALONE)
    check_weights(checkpoint, values=True)
    assert checkpoint.config.is_demo
    assert checkpoint.size_bytes < 30e6
    stored = json.loads((checkpoint.folder / "config.json").read_text())
    assert stored["torch_dtype"] == "float16"


def test_a_near_name_suggests_the_builtin_model(tmp_path, no_builtin):
    write_tiny(tmp_path / "hub")
    write_with_tower(tmp_path / "builtin")
    with pytest.raises(CheckpointError, match="did you mean 'builtin'"):
        open_checkpoint("bultin", ALONE)
