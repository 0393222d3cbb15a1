import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.tiny import load_tiny, read_tensors, tower_of, write_json, write_tensors, write_tiny
from tests.vla2cli.train.students import SETTINGS, Clips, loaded, run, student_of
from vla2_models.hub import BUILTIN
from vla2_models.names import CONNECTOR_PREFIX, TOWER_PREFIX
from vla2cli.errors import UsageError
from vla2cli.train.config import make_config
from vla2cli.train.start import START, base_name


class Silent(Clips):
    """Clips without sound."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return replace(sample, media=replace(sample.media, fbank=None))


def starting(tmp_path, model, stage="video-pretrain", **settings):
    content = {"model": str(model), "stage": stage, "output": str(tmp_path / "out")}
    return make_config({**content, **SETTINGS, "num_frames": 2, "max_steps": 1, **settings})


def write_parts(hub, folder):
    """Write a checkpoint's language model and vision tower as folders of their own."""
    tensors = read_tensors(folder)
    language_model = hub / "acme/language"
    language_model.mkdir(parents=True)
    write_tensors(
        language_model,
        {k: t for k, t in tensors.items() if not k.startswith((CONNECTOR_PREFIX, "model.vision_"))},
    )
    write_tensors(
        tower_of(folder),
        {
            "vision_model." + key.removeprefix(TOWER_PREFIX): tensor
            for key, tensor in tensors.items()
            if key.startswith(TOWER_PREFIX)
        },
    )
    fields = json.loads((folder / "config.json").read_text())
    own = {key: value for key, value in fields.items() if not key.startswith(("mm_", "num_frames"))}
    write_json(language_model / "config.json", {**own, "model_type": "mistral"})
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder / name, language_model / name)
    return language_model


@pytest.mark.parametrize(
    "connector", ["spatial_pool", "stc_connector_v35", "stp_connector", "linear", "mlp2x_gelu"]
)
def test_another_connector_begins_anew_and_is_saved_with_its_type(connector, tmp_path):
    folder = write_tiny(tmp_path / "hub")
    config = starting(tmp_path, folder, connector=connector)
    student, trained = run(config, tmp_path / "hub", Silent(4))
    student.save(trained)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert (raw["mm_projector_type"], raw["_name_or_path"]) == (connector, str(folder))
    saved = loaded(tmp_path / "out", tmp_path / "hub").state_dict()
    assert all(
        torch.equal(saved[name], weight)
        for name, weight in student.network.model.state_dict().items()
    )
    first = load_tiny(folder).state_dict()
    kept = [name for name in first if not name.startswith("mm_projector.")]
    assert all(torch.equal(saved[name], first[name]) for name in kept)


def test_new_parts_are_drawn_by_the_seed(tmp_path):
    folder = write_tiny(tmp_path / "hub")
    drawn = []
    for seed in (1, 1, 2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        config = starting(tmp_path, folder, connector="linear", seed=seed)
        model = student_of(config, tmp_path / "hub").network.model
        drawn.append(model.mm_projector.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_run_can_begin_from_a_language_model_and_a_tower(tmp_path):
    hub = tmp_path / "hub"
    folder = write_tiny(hub)
    language_model = write_parts(hub, folder)
    tower = tower_of(folder).relative_to(hub).as_posix()
    config = starting(tmp_path, language_model, vision_tower=tower, connector="stc_connector")
    student, trained = run(config, hub, Silent(4))
    student.save(trained)
    first, again = load_tiny(folder).state_dict(), loaded(tmp_path / "out", hub).state_dict()
    assert first.keys() == again.keys()
    kept = [name for name in first if not name.startswith("mm_projector.")]
    assert all(torch.equal(first[name], again[name]) for name in kept)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert (raw["model_type"], raw["_name_or_path"]) == ("videollama2_mistral", str(language_model))


def test_ears_can_be_added_from_a_file_of_beats(tmp_path):
    hub = tmp_path / "hub"
    folder, with_ears = write_tiny(hub), write_tiny(hub, has_ears=True)
    towers = {k: t for k, t in read_tensors(with_ears).items() if ".audio_tower." in k}
    torch.save(towers, tmp_path / "audio_tower.bin")
    audio_tower = str(tmp_path / "audio_tower.bin")
    config = starting(tmp_path, folder, "audio-pretrain", audio_tower=audio_tower)
    student = student_of(config, hub)
    assert (tmp_path / "out" / START / "mm_projector_a.bin").exists()
    expected = load_tiny(with_ears).audio_tower.state_dict()
    found = student.network.model.audio_tower.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"stage": "joint"}, "mm_projector_a is trained, but model '.*' has no audio tower"),
        ({"va": True}, "va is true, but model"),
        ({"vision_tower": "a/b"}, "vision_tower is given, but model '.*' has one"),
        ({"connector": "q_former"}, "connector is 'q_former', expected one of stc_connector"),
        ({"num_frames": 1, "connector": "stc_connector_v35"}, "num_frames is 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_the_model_cannot_be_is_refused(settings, line, tmp_path):
    config = starting(tmp_path, write_tiny(tmp_path / "hub"), **settings)
    with pytest.raises(UsageError, match=line):
        student_of(config, tmp_path / "hub")


def test_a_language_model_alone_needs_a_tower(tmp_path):
    language_model = write_parts(tmp_path / "hub", write_tiny(tmp_path / "hub"))
    config = starting(tmp_path, language_model)
    with pytest.raises(UsageError, match="to begin from it give vision_tower as well"):
        student_of(config, tmp_path / "hub")


def test_the_model_of_the_package_is_named_and_not_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / BUILTIN).mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_name(BUILTIN) == BUILTIN
    assert base_name(f"./{BUILTIN}") == str(tmp_path / BUILTIN)
