import pytest
import torch

from tests.vla2cli.train.students import configured, run, student_of
from vla2cli.train.stages import STAGES, TOWERS, freeze_all_but

TRAINED = {  # VideoLLaMA 2, arXiv:2406.07476, sections 3.1.1, 3.1.2, 3.2.1, 3.2.2 and 3.3
    "towers": {"vision_tower", "audio_tower"},  # before them
    "video-pretrain": {"mm_projector"},
    "video-finetune": {"mm_projector", "language_model"},
    "audio-pretrain": {"mm_projector_a"},
    "audio-finetune": {"mm_projector_a", "audio_tower"},
    "joint": {"mm_projector", "mm_projector_a", "language_model"},
}


def test_every_stage_names_its_parts():
    assert {name: set(stage.trained) for name, stage in STAGES.items()} == TRAINED


# that of the towers has a task of its own, see test_towers.py
@pytest.mark.parametrize("stage", [stage for stage in TRAINED if stage != TOWERS])
def test_one_step_changes_exactly_what_the_stage_trains(stage, tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out", stage, max_steps=1)
    before = student_of(config, tmp_path / "hub").network.model.state_dict()
    _, trained = run(config, tmp_path / "hub")
    after = {name.removeprefix("model."): weight for name, weight in trained.state.items()}
    assert before.keys() == after.keys()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    # of the layers that a step reaches: the miniature's towers have none behind the selected one
    # but in the vision tower, which none of these trains
    expected = {name for name in before if name.partition(".")[0] in TRAINED[stage]}
    assert changed == expected


def test_a_configuration_may_name_other_parts(tmp_path):
    train = ["mm_projector_a", "audio_tower", "language_model"]
    config = configured(tmp_path / "hub", tmp_path / "out", max_steps=1, train=train)
    network = student_of(config, tmp_path / "hub").network
    names = {name.split(".")[1] for name, p in network.named_parameters() if p.requires_grad}
    assert names == set(train)


def test_blocks_behind_the_selected_one_are_never_trained(tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out")
    model = student_of(config, tmp_path / "hub").network.model
    freeze_all_but(model, ["vision_tower"])
    tower = model.vision_tower
    is_trained = [layer.mlp.fc1.weight.requires_grad for layer in tower.encoder.layers]
    assert is_trained == [True, True, False]
    assert not tower.post_layernorm.weight.requires_grad


def test_a_part_that_the_model_lacks_is_refused(tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out")
    model = student_of(config, tmp_path / "hub").network.model
    model.audio_tower = None
    with pytest.raises(ValueError, match="the model has no audio_tower"):
        freeze_all_but(model, ["audio_tower"])
