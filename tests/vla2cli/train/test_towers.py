"""The towers' stage: what is asked of their patches, and what learns from it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.vla2cli.train.students import FOR_WORLD, QUIET, configured, loaded, write_student
from vla2_models.checkpoint import open_checkpoint
from vla2_models.hub import Source
from vla2cli.engine import read_geometry
from vla2cli.errors import UsageError
from vla2cli.train.lesson import open_lesson
from vla2cli.train.run import make_student
from vla2cli.train.towers import TowerSamples, collate_towers
from vla2cli.train.trainer import run_training
from vla2cli.world.clip import WorldClip
from vla2cli.world.crowd import UNNAMED, draw_crowd
from vla2cli.world.vocabulary import SOUNDS

SEED = 3
WEIGHTS = {"kinds": 1, "shapes": 0.5, "colours": 0.5, "centres": 0.3, "scenes": 0.1, "sounds": 1}


@pytest.fixture(scope="module")
def hub_dir(tmp_path_factory):
    hub_dir = tmp_path_factory.mktemp("hub")
    write_student(hub_dir, **FOR_WORLD)
    return hub_dir


def config_of(hub_dir, output, **settings):
    model = next(path.parent for path in hub_dir.glob("*/*/model.safetensors"))
    name = model.relative_to(hub_dir).as_posix()
    world = {"clips": 8, "seed": SEED}
    given = {"model": name, "world": world, "batch": 4, "max_steps": 1, **settings}
    return configured(hub_dir, output, "towers", **given)


@pytest.fixture(scope="module")
def checkpoint(hub_dir):
    folder = next(path.parent for path in hub_dir.glob("*/*/model.safetensors"))
    return open_checkpoint(str(folder), Source(hub_dir))


@pytest.fixture(scope="module")
def samples(checkpoint):
    return TowerSamples(checkpoint.config, read_geometry(checkpoint), SEED, 100)


@pytest.fixture
def task(hub_dir, checkpoint, tmp_path):
    torch.manual_seed(0)
    return make_student(config_of(hub_dir, tmp_path), checkpoint).network


def batch_of(samples, *indices):
    batch = collate_towers([samples[i] for i in indices])
    assert batch.pop("skipped") == []
    return batch


def test_a_sample_is_a_crowd_a_little_damaged(samples):
    geometry = samples.geometry
    std, mean = (torch.tensor(v)[:, None, None] for v in (geometry.image_std, geometry.image_mean))
    errors = []
    for index in range(12):
        sample, crowd = samples[index], draw_crowd(SEED, index, geometry.height, samples.grid)
        picture = (sample.pixel_values * std + mean).permute(1, 2, 0) * 255
        errors.append(np.abs(picture.numpy() - crowd.frame).mean())
        for name in ("kinds", "shapes", "colours", "centres"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(crowd, name).ravel())
        assert set(sample.scenes.tolist()) == {crowd.scene}
    assert 0 < max(errors) < 15
    assert samples[5].pixel_values.equal(samples[5].pixel_values)


def test_a_sound_is_named_within_its_span_alone(samples):
    row_s = samples.patch_rows / 100
    heard = 0
    for index in range(0, 100, 4):
        sample, clip = samples[index], WorldClip(SEED, index, "train")
        assert len(sample.sounds) == len(sample.fbank) // samples.patch_rows
        for row, label in enumerate(sample.sounds.tolist()):
            start, end = row * row_s, (row + 1) * row_s
            if clip.span is None or end <= clip.span[0] or start >= clip.span[1]:
                assert label == 0
            elif clip.span[0] <= start and end <= clip.span[1]:
                assert list(SOUNDS)[label - 1] == clip.facts.sound
                heard += label > 0
    assert heard > 100


def test_one_picture_in_four_comes_with_a_sound(samples):
    assert [samples[i].fbank is not None for i in range(8)] == [True, False, False, False] * 2
    batch = batch_of(samples, 3, 4, 5)
    assert (len(batch["pixel_values"]), len(batch["fbank"]), len(batch["sounds"])) == (3, 1, 1)
    assert batch["labels"].equal(batch["kinds"])


def test_each_epoch_has_pictures_of_its_own(checkpoint):
    short, long = (
        TowerSamples(checkpoint.config, read_geometry(checkpoint), SEED, count) for count in (4, 8)
    )
    short.set_epoch(1)
    for index in range(4):
        assert short[index].pixel_values.equal(long[4 + index].pixel_values)
        assert not short[index].pixel_values.equal(long[index].pixel_values)


def test_a_batch_without_a_shape_to_tell_has_a_loss(samples, task):
    batch = batch_of(samples, 0, 1)
    batch["shapes"].fill_(UNNAMED)
    assert task(**batch)["loss"].isfinite()


def test_an_image_that_patches_do_not_fill_is_refused(checkpoint):
    geometry = replace(read_geometry(checkpoint), height=58)
    with pytest.raises(UsageError, match="58 pixels is no multiple of 4 patches"):
        TowerSamples(checkpoint.config, geometry, SEED, 1)


def test_the_loss_is_the_sum_of_the_heads_cross_entropies(task, samples):
    batch = batch_of(samples, 0, 1, 4)
    with torch.no_grad():
        found = task.eval()(**batch)
        features = task.norm(task.model.encode_frames(batch["pixel_values"]))
        logits = {name: head(features) for name, head in task.heads.items()}
        logits["sounds"] = task.sound_head(task.model.encode_sound(batch["fbank"]))
    assert found.keys() == {"loss", *WEIGHTS}
    assert all((batch[name] == UNNAMED).any() for name in ("shapes", "colours"))
    # the tokens of a sound are time by time, and of each time one band after the other
    num_bands = 128 // samples.patch_rows
    truths = {**batch, "sounds": torch.stack([batch["sounds"]] * num_bands, -1).flatten(1)}
    expected = 0
    for name, weight in WEIGHTS.items():
        log_probs = functional.log_softmax(logits[name], -1)
        is_told = truths[name] != UNNAMED
        named = log_probs[is_told].gather(-1, truths[name][is_told][:, None])
        expected -= weight * named.mean()
        torch.testing.assert_close(found[name], logits[name])
    torch.testing.assert_close(found["loss"], expected)
    labels = batch["labels"][:, 1:].numel()
    with torch.no_grad():
        half = task(**batch, num_items_in_batch=2 * labels)["loss"]
    torch.testing.assert_close(half, expected / 2)


def test_a_batch_without_sound_teaches_the_eyes_alone(task, samples):
    batch = batch_of(samples, 1, 2)
    assert "fbank" not in batch
    task.train()(**batch)["loss"].backward()
    ears = [p for p in task.model.audio_tower.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in (*ears, task.sound_head.weight))
    assert task.model.vision_tower.embeddings.patch_embedding.weight.grad.any()


def test_a_step_changes_the_used_parts_of_both_towers_and_the_heads(hub_dir, checkpoint, tmp_path):
    config = config_of(hub_dir, tmp_path / "out", muon_learning_rate=0.01)
    student = make_student(config, checkpoint)
    network = student.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    lesson = open_lesson(config, checkpoint)
    trained = run_training(config, network, lesson.dataset, lesson.collator, QUIET)
    changed = {name for name, p in network.named_parameters() if not p.equal(before[name])}
    blocks = range(checkpoint.config.num_tower_blocks)
    learning = (
        *("norm.", "heads.", "sound_head.", "model.audio_tower."),
        *("model.vision_tower.embeddings.", "model.vision_tower.pre_layrnorm."),
        *(f"model.vision_tower.encoder.layers.{i}." for i in blocks),
    )
    expected = {name for name in before if name.startswith(learning)}
    # a bias of all keys alike changes no softmax
    assert expected - changed <= {name for name in expected if name.endswith("k_proj.bias")}
    assert changed <= expected
    student.save(trained)
    saved = loaded(tmp_path / "out", hub_dir).state_dict()
    assert saved.keys() == network.model.state_dict().keys()
    assert all(tensor.equal(network.model.state_dict()[name]) for name, tensor in saved.items())
