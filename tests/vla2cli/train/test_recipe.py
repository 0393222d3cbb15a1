"""The recipe of the built-in model: files for `vla2 train`, each beginning where one ended."""

import pytest
import torch

from tests.tiny import read_tensors
from tests.vla2cli.train.students import FOR_WORLD, QUIET, write_student
from vla2_models.hub import Source
from vla2cli.config import GenerationSettings
from vla2cli.engine import Ask, Engine, MediaTokens
from vla2cli.train import exam as exam_module
from vla2cli.train.builtin import RECIPE, WORK
from vla2cli.train.config import EXAM_SEED, read_config
from vla2cli.train.exam import EXAM
from vla2cli.train.log import read_lines
from vla2cli.train.run import train
from vla2cli.train.stages import STAGES

FILES = sorted(RECIPE.glob("*.yaml"))
TINY = ("batch=2", "per_device_batch=2", "world.clips=8", "max_steps=2", "workers=0")


def test_the_stages_are_the_paper_s_behind_the_towers_own():
    configs = [read_config(path) for path in FILES]
    stages = [config.stage for config in configs]
    num_towers = stages.count("towers")
    assert num_towers > 0
    # VideoLLaMA 2, arXiv:2406.07476, section 3.1 to 3.3
    assert stages == [
        *["towers"] * num_towers,
        "video-pretrain",
        "video-finetune",
        "audio-pretrain",
        "audio-finetune",
        "joint",
    ]
    for path, config in zip(FILES, configs, strict=True):
        assert config.train == STAGES[config.stage].trained
        assert config.stage in path.stem


def test_each_stage_begins_from_the_folder_of_the_one_before():
    configs = [read_config(path) for path in FILES]
    assert [config.output for config in configs] == [str(WORK / path.stem) for path in FILES]
    assert [config.model for config in configs] == [
        str(WORK / "0-untrained"),
        *(config.output for config in configs[:-1]),
    ]


def test_no_stage_learns_from_clips_of_another_or_of_an_exam():
    seeds = [read_config(path).world.seed for path in FILES]
    assert len({*seeds, EXAM_SEED}) == len(FILES) + 1


def test_what_a_stage_hears_or_sees_is_what_it_trains():
    for config in map(read_config, FILES):
        if config.stage.startswith(("video", "audio")):
            assert config.world.medium == config.stage.partition("-")[0]
        assert (config.save, config.save_dtype) == ("full", "float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A hub folder with a tiny model that went through the whole recipe, two steps a stage."""
    hub_dir = tmp_path_factory.mktemp("hub")
    model = write_student(hub_dir, **FOR_WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam_module, "NUM_CLIPS", 1)
        for path in FILES:
            output = hub_dir / path.stem
            chained = (f"model={model}", f"output={output}")
            assert train(read_config(path, [*TINY, *chained]), Source(hub_dir), QUIET).is_finished
            model = str(output)
    return hub_dir


def test_the_recipe_ends_in_a_checkpoint_that_answers(trained):
    folder = trained / FILES[-1].stem
    engine = Engine.load(str(folder), hub_dir=trained, device="cpu", dtype="float32")
    pixel_values = torch.zeros(8, 3, 56, 56)
    tokens = engine.model.project(engine.model.encode_frames(pixel_values)[None])[0]
    ask = Ask("What is in the video?", "video", MediaTokens(visual=tokens.detach()))
    settings = GenerationSettings(eos_token_ids=(2,), max_new_tokens=3)
    (answer,) = engine.answer([ask], settings)
    assert answer.generation.is_finite
    assert engine.has_ears


def test_each_stage_changes_its_own_parts_alone(trained):
    public = {  # names in the public checkpoints
        "vision_tower": "model.vision_tower.",
        "mm_projector": "model.mm_projector.",
        "audio_tower": "model.audio_tower.",
        "mm_projector_a": "model.mm_projector_a.",
        "language_model": ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."),
    }
    weights = [read_tensors(trained / path.stem) for path in FILES]
    for path, before, after in zip(FILES[1:], weights, weights[1:]):
        changed = {
            part
            for part, prefix in public.items()
            for name in after
            if name.startswith(prefix) and not after[name].equal(before[name])
        }
        assert changed == set(STAGES[read_config(path).stage].trained), path.stem
        assert all(tensor.dtype == torch.float32 for tensor in after.values())


def test_exams_are_held_where_the_recipe_has_them(trained):
    for path in FILES:
        lines = list(read_lines(trained / path.stem / EXAM))
        has_exams = read_config(path).world.exam_steps is not None
        assert {line["step"] for line in lines} == ({2} if has_exams else set())
