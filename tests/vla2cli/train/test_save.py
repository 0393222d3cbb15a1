import json

import pytest
import torch

from tests.tiny import SHORT_WINDOW, write_tiny, write_with_tower
from tests.vla2cli.train.students import (
    NUM_FRAMES,
    SETTINGS,
    configured,
    loaded,
    logits_of,
    run,
    student_of,
    write_student,
)
from vla2_models.checkpoint import open_checkpoint
from vla2_models.files import UNFINISHED
from vla2_models.hub import Source
from vla2_models.loading import load_model
from vla2cli.engine import Engine
from vla2cli.errors import UsageError
from vla2cli.train.config import make_config
from vla2cli.train.lora import merge_state
from vla2cli.train.save import check_form

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}
FILES = {  # as upstream VideoLLaMA2@c0bb03a and its branch audio_visual at 8cedfbd write them
    "full": {"model.safetensors", "tokenizer.model", "tokenizer_config.json"},
    "projector": {"mm_projector.bin"},
    "audio": {"mm_projector_a.bin", "audio_tower.bin"},
    "adapter": {"adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"},
}


def trained_folder(tmp_path, stage, **settings):
    """Train two steps and save; return the folder and the student."""
    config = configured(tmp_path / "hub", tmp_path / "out", stage, max_steps=2, **settings)
    student, trained = run(config, tmp_path / "hub")
    student.save(trained)
    student.network.eval()
    return tmp_path / "out", student


@pytest.mark.parametrize(
    ("stage", "settings", "files", "form"),
    [
        ("video-pretrain", {}, FILES["projector"], "projector"),
        ("video-pretrain", {"save": "full"}, FILES["full"], "whole"),
        ("audio-pretrain", {}, {"mm_projector_a.bin"}, "projector"),
        ("audio-finetune", {}, FILES["audio"], "projector"),
        ("joint", {}, FILES["full"], "whole"),
    ],
    ids=["Base", "Base, full", "audio projector", "what hears", "joint"],
)
def test_what_is_saved_loads_with_the_same_logits(stage, settings, files, form, tmp_path):
    folder, student = trained_folder(tmp_path, stage, **settings)
    assert files <= {path.name for path in folder.iterdir()}
    assert open_checkpoint(str(folder), Source(tmp_path / "hub")).form == form
    expected = logits_of(student.network.model)
    assert torch.equal(logits_of(loaded(folder, tmp_path / "hub")), expected)
    first = loaded(student.checkpoint.folder, tmp_path / "hub")
    assert not torch.equal(logits_of(first), expected)


def test_an_adapter_loads_with_the_logits_of_its_sum(tmp_path):
    folder, student = trained_folder(tmp_path, "video-finetune", lora=LORA)
    assert FILES["adapter"] <= {path.name for path in folder.iterdir()}
    model = student.network.model
    apart = logits_of(model)
    again = loaded(folder, tmp_path / "hub")
    # a product of sums is rounded in another order than a sum of products
    torch.testing.assert_close(logits_of(again), apart, rtol=1e-4, atol=1e-4)
    merged = merge_state(model.state_dict(), student.config.lora)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in merged.items())
    assert not torch.equal(logits_of(loaded(student.checkpoint.folder, tmp_path / "hub")), apart)


def test_an_adapter_may_be_saved_whole(tmp_path):
    folder, student = trained_folder(tmp_path, "joint", lora=LORA, save="full")
    assert open_checkpoint(str(folder), Source(tmp_path / "hub")).form == "whole"
    again = logits_of(loaded(folder, tmp_path / "hub"))
    torch.testing.assert_close(again, logits_of(student.network.model), rtol=1e-4, atol=1e-4)


def test_an_adapter_is_on_all_linear_layers_of_the_language_model_but_the_head(tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out", lora=LORA)
    student = student_of(config, tmp_path / "hub")
    assert student.targets == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    trained = {n for n, p in student.network.named_parameters() if p.requires_grad}
    of_language = {name for name in trained if ".language_model." in name}
    assert all(".lora_" in name for name in of_language)
    assert any(".mm_projector." in name for name in trained)


def test_an_adapter_below_4_bits_loads_on_the_whole_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = {"lora": LORA, "quantize": "4bit", "max_steps": 1}
    hub = tmp_path / "hub"
    model = write_student(hub, hidden_size=64, intermediate_size=128)
    config = configured(hub, tmp_path / "out", "video-finetune", model=model, **settings)
    student, trained = run(config, hub)
    student.save(trained)
    base = loaded(student.checkpoint.folder, hub)
    again = loaded(tmp_path / "out", hub)
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(base.state_dict()[name], again.state_dict()[name])
    kept = "language_model.lm_head.weight"
    assert torch.equal(base.state_dict()[kept], again.state_dict()[kept])


@pytest.mark.parametrize("stage", ["video-pretrain", "joint"])
def test_bfloat16_is_saved_where_products_are_made_in_it(stage, tmp_path):
    folder, student = trained_folder(tmp_path, stage, precision="bfloat16")
    model = student.network.model
    assert model.mm_projector.readout[0].weight.dtype == torch.float32  # what is trained
    assert model.vision_tower.post_layernorm.weight.dtype == torch.bfloat16  # what is not
    checkpoint = open_checkpoint(str(folder), Source(tmp_path / "hub"))
    stored = load_model(checkpoint, dtype=None).mm_projector.readout[0].weight
    assert torch.equal(stored, model.mm_projector.readout[0].weight.bfloat16())


def test_one_stage_goes_on_from_the_files_of_another(tmp_path):
    hub = tmp_path / "hub"
    folder, student = trained_folder(tmp_path, "video-pretrain")
    content = {**SETTINGS, "model": str(folder), "output": str(tmp_path / "next"), "max_steps": 1}
    config = make_config({**content, "stage": "audio-pretrain"})
    before = student_of(config, hub).network.model.state_dict()
    pretrained = student.network.model.state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in pretrained.items())
    second, trained = run(config, hub)
    second.save(trained)
    # both small parts are there, and the language model is still the first one's
    assert {"mm_projector.bin", "mm_projector_a.bin"} <= {
        path.name for path in (tmp_path / "next").iterdir()
    }
    expected = logits_of(second.network.eval().model)
    assert torch.equal(logits_of(loaded(tmp_path / "next", hub)), expected)


def test_the_number_of_frames_that_it_was_trained_on_is_saved(tmp_path):
    folder, _ = trained_folder(tmp_path, "joint", num_frames=4)
    assert json.loads((folder / "config.json").read_text())["num_frames"] == 4
    engine = Engine.load(str(folder), hub_dir=tmp_path / "hub", device="cpu", dtype="float32")
    assert engine.checkpoint.config.num_frames == 4


def test_an_adapter_upon_an_adapter_is_refused(tmp_path):
    folder, _ = trained_folder(tmp_path, "video-finetune", lora=LORA)
    content = {"model": str(folder), "stage": "joint", "output": str(tmp_path / "b"), "lora": LORA}
    checkpoint = open_checkpoint(str(folder), Source(tmp_path / "hub"))
    with pytest.raises(UsageError, match="write it whole first: vla2 models convert"):
        check_form(make_config(content), checkpoint)


def test_a_tower_that_is_trained_needs_the_whole_form(tmp_path):
    folder = write_tiny(tmp_path / "hub")
    train = ["vision_tower", "mm_projector"]
    content = {"model": str(folder), "stage": "video-pretrain", "output": "o", "train": train}
    checkpoint = open_checkpoint(str(folder), Source(tmp_path / "hub"))
    check_form(make_config(content), checkpoint)  # which it then has
    with pytest.raises(UsageError, match="vision_tower is trained, which only 'save: full' keeps"):
        check_form(make_config({**content, "save": "projector"}), checkpoint)


@pytest.mark.parametrize(
    ("stage", "settings", "form"),
    [
        ("video-pretrain", {}, "projector"),
        ("video-pretrain", {"connector": "stp_connector"}, "projector"),
        ("video-finetune", {"lora": LORA}, "adapter"),
        ("joint", {}, "whole"),
    ],
    ids=["projector", "new connector", "adapter", "whole"],
)
def test_a_tower_inside_the_model_s_folder_is_saved_with_what_was_trained(
    stage, settings, form, tmp_path
):
    model = write_with_tower(
        tmp_path / "model", has_ears=True, num_frames=NUM_FRAMES, **SHORT_WINDOW
    )
    folder, student = trained_folder(tmp_path, stage, model=str(model), **settings)
    assert open_checkpoint(str(folder), Source(offline=True)).form == form
    again = logits_of(loaded(folder, tmp_path / "hub"))
    torch.testing.assert_close(again, logits_of(student.network.model), rtol=1e-4, atol=1e-4)


def test_a_save_takes_the_place_of_one_that_was_killed_before_its_last_file(tmp_path):
    model = write_with_tower(
        tmp_path / "model", has_ears=True, num_frames=NUM_FRAMES, **SHORT_WINDOW
    )
    folder, student = trained_folder(tmp_path, "video-pretrain", model=str(model))
    (folder / "config.json").unlink()
    (folder / "clip-tower/config.json").write_text("old")
    (folder / f"{UNFINISHED}abc").mkdir()
    (folder / f"{UNFINISHED}abc/mm_projector.bin").write_text("half")
    again, trained = run(student.config, tmp_path / "hub")
    again.save(trained)
    expected = logits_of(student.network.model)
    assert torch.equal(logits_of(loaded(folder, tmp_path / "hub")), expected)
    assert not list(folder.glob(f"{UNFINISHED}*"))


@pytest.mark.parametrize("settings", [{}, {"lora": LORA, "save": "full"}], ids=["joint", "LoRA"])
def test_what_is_frozen_is_saved_as_it_was_though_held_in_bfloat16(settings, tmp_path):
    settings = {"precision": "bfloat16", "save_dtype": "float32", **settings}
    folder, student = trained_folder(tmp_path, "joint", **settings)
    assert student.network.model.vision_tower.post_layernorm.weight.dtype == torch.bfloat16
    before = load_model(student.checkpoint).state_dict()
    after = load_model(open_checkpoint(str(folder), Source(tmp_path / "hub"))).state_dict()
    frozen = [name for name in before if name.startswith(("vision_tower.", "audio_tower."))]
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert any(not torch.equal(before[n], before[n].bfloat16().float()) for n in frozen)
