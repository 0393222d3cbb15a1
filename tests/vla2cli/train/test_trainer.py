import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.vla2cli.train.students import COLLATOR, QUIET, Clips, configured, run, student_of
from vla2cli.console import format_rate
from vla2cli.errors import UsageError, Vla2Error
from vla2cli.train import log as log_module
from vla2cli.train.log import RunLog, append_lines, read_lines, take_back
from vla2cli.train.trainer import (
    find_checkpoint,
    group_parameters,
    make_arguments,
    named_trained,
    remove_unfinished,
    run_training,
)

ADAPTER = {"lora": {"r": 4, "alpha": 8, "dropout": 0.5}}  # which draws from the generator
MUON = {"muon_learning_rate": 0.01}


def same_state(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("more", [{}, ADAPTER, MUON], ids=["full", "adapter with dropout", "muon"])
def test_a_run_that_goes_on_ends_with_the_same_bytes(more, tmp_path):
    settings = {"max_steps": 6, "save_steps": 2, **more}
    whole = configured(tmp_path / "hub", tmp_path / "whole", **settings)
    _, undisturbed = run(whole, tmp_path / "hub")
    halves = configured(tmp_path / "hub", tmp_path / "halves", **settings)
    asked = iter([False, False, False])  # the fourth time it is asked it stops, between checkpoints
    _, first = run(halves, tmp_path / "hub", should_stop=lambda: next(asked, True))
    assert (first.step, first.is_finished) == (4, False)
    (tmp_path / "halves/checkpoint-4/complete").unlink()  # as if killed while it was written
    _, second = run(halves, tmp_path / "hub")
    assert (second.step, second.is_finished) == (6, True)
    assert same_state(undisturbed.state, second.state)
    logs = [list(read_lines(tmp_path / name / "log.jsonl")) for name in ("whole", "halves")]
    for line in (*logs[0], *logs[1]):
        del line["seconds"]
    assert logs[0] == logs[1]


def test_a_run_that_is_done_gives_its_weights_again(tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out", max_steps=2)
    _, first = run(config, tmp_path / "hub")
    _, again = run(config, tmp_path / "hub")
    assert (again.step, again.is_finished) == (2, True)
    assert same_state(first.state, again.state)


def test_bad_samples_are_counted_and_named(tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out", max_steps=2)
    # the second step is of bad samples alone
    _, trained = run(config, tmp_path / "hub", Clips(4, bad=(1, 2, 3)))
    lines = list(read_lines(tmp_path / "out/log.jsonl"))
    assert [(line["samples"], line["skipped"]) for line in lines] == [(1, 1), (1, 3)]
    skipped = list(read_lines(tmp_path / "out/skipped.jsonl"))
    assert [(line["step"], line["id"]) for line in skipped] == [
        (1, "clip 1"),
        (2, "clip 2"),
        (2, "clip 3"),
    ]
    assert all(torch.isfinite(weight).all() for weight in trained.state.values())
    assert (tmp_path / "out/loss.png").stat().st_size > 0


def test_the_rate_is_a_cosine_with_a_warm_up(tmp_path):
    settings = {"max_steps": 4, "warmup_ratio": 0.25, "learning_rate": 1.0, "log_steps": 1}
    config = configured(tmp_path / "hub", tmp_path / "out", "audio-pretrain", **settings)
    run(config, tmp_path / "hub")
    rates = [line["learning_rate"] for line in read_lines(tmp_path / "out/log.jsonl")]
    wanted = [0.0, *(0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3))]
    torch.testing.assert_close(rates, wanted)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("joint", MUON), ("video-finetune", {"projector_learning_rate": 0.5})],
    ids=["muon", "projector"],
)
def test_the_rate_that_is_logged_is_learning_rate_s(stage, settings, tmp_path):
    settings = {"max_steps": 1, "learning_rate": 2e-3, **settings}
    run(configured(tmp_path / "hub", tmp_path / "out", stage, **settings), tmp_path / "hub")
    (line,) = read_lines(tmp_path / "out/log.jsonl")
    assert line["learning_rate"] == 2e-3


def test_lines_are_taken_back_whole_whatever_breaks_are_in_them(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "id": "a\u2028b\x85c"} for step in (1, 2, 3)]
    append_lines(path, lines)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "i')  # as if killed
    assert list(read_lines(path)) == lines
    take_back(path, 2)
    assert list(read_lines(path)) == lines[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_log_is_there_while_lines_are_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append_lines(path, [{"step": 1}, {"step": 2}])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        take_back(path, 1)
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2}]


def test_the_rate_of_samples_is_of_the_whole_run(tmp_path, monkeypatch):
    noted = []
    console = SimpleNamespace(note=noted.append)
    log = RunLog(tmp_path, console)
    append_lines(
        tmp_path / "log.jsonl",
        [{"step": 5, "tokens": 9, "samples": 50, "skipped": 0, "seconds": 10.0}],
    )
    now = iter([1000.0, 1010.0, 1010.0])
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(now))
    state = SimpleNamespace(global_step=5, max_steps=10, is_world_process_zero=True)
    log.on_train_begin(None, state, None)
    log.totals.add(9, 50, 0)
    log.on_log(None, state, None, {"loss": 1.0, "learning_rate": 1.0})
    # 100 samples in 20 s, of which 10 s before
    assert format_rate(5.0) in noted[0]


def test_an_accumulated_step_is_one_large_batch(tmp_path):
    losses = {}
    for per_device in (2, 4):
        output = tmp_path / str(per_device)
        settings = {"batch": 4, "per_device_batch": per_device, "max_steps": 2}
        config = configured(tmp_path / "hub", output, **settings)
        run(config, tmp_path / "hub")
        losses[per_device] = [line["loss"] for line in read_lines(output / "log.jsonl")]
    # answers differ in length, so that a mean of means would be another
    torch.testing.assert_close(losses[2], losses[4])


def test_a_hook_adds_arguments_that_follow_the_step(tmp_path):
    class Weighed(nn.Module):
        accepts_loss_kwargs = True

        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(()))
            self.weights = []

        def forward(self, labels, word_weight, num_items_in_batch):
            self.weights.append(word_weight)
            return {"loss": (self.bias - 1) ** 2 * len(labels) / num_items_in_batch}

    def collate(items):
        return {"labels": torch.tensor([[-100, item] for item in items])}

    config = configured(tmp_path / "hub", tmp_path / "out", max_steps=4)
    network = Weighed()
    trained = run_training(
        config,
        network,
        list(range(8)),
        collate,
        QUIET,
        on_step=lambda step, max_steps: {"word_weight": 1 - step / max_steps},
    )
    assert network.weights == [1.0, 0.75, 0.5, 0.25]
    assert trained.state["bias"] > 0


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out", max_steps=4)
    student = student_of(config, tmp_path / "hub")
    student.network.model.mm_projector.readout[0].bias.data.fill_(math.nan)
    with pytest.raises(Vla2Error, match="the loss is nan at step 1"):
        run_training(config, student.network, Clips(8), COLLATOR, QUIET)


def test_projectors_have_a_rate_of_their_own_and_norms_no_decay(tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out")
    network = student_of(config, tmp_path / "hub").network
    decayed = {name for name, p in named_trained(network) if p.ndim > 1}
    groups = group_parameters(network, decayed, 0.1, 5e-4)
    names = {id(p): name for name, p in network.named_parameters()}
    by_kind = {
        (group.get("lr"), group["weight_decay"]): {names[id(p)] for p in group["params"]}
        for group in groups
    }
    trained = {name for name, _ in named_trained(network)}
    projectors = {name for name in trained if "mm_projector" in name}
    assert by_kind == {
        (5e-4, 0.1): projectors & decayed,
        (5e-4, 0.0): projectors - decayed,
        (None, 0.1): (trained - projectors) & decayed,
        (None, 0.0): trained - projectors - decayed,
    }


def test_norms_and_biases_do_not_decay(tmp_path):
    config = configured(tmp_path / "hub", tmp_path / "out", max_steps=1, weight_decay=0.1)
    student, _ = run(config, tmp_path / "hub")
    saved = torch.load(tmp_path / "out/checkpoint-1/optimizer.pt", weights_only=True)
    groups = {group["weight_decay"]: len(group["params"]) for group in saved["param_groups"]}
    is_matrix = [p.ndim > 1 for _, p in named_trained(student.network)]
    assert groups == {0.1: sum(is_matrix), 0.0: len(is_matrix) - sum(is_matrix)}


def test_a_checkpoint_of_other_parts_is_refused(tmp_path):
    run(configured(tmp_path / "hub", tmp_path / "out", max_steps=1), tmp_path / "hub")
    other = configured(tmp_path / "hub", tmp_path / "out", "audio-pretrain", max_steps=2)
    with pytest.raises(UsageError, match="is of another run"):
        run(other, tmp_path / "hub")


def test_a_batch_that_the_processes_do_not_divide_is_refused(tmp_path, monkeypatch):
    config = configured(tmp_path / "hub", tmp_path / "out", batch=4, per_device_batch=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="no multiple of per_device_batch 2 on 3 processes"):
        make_arguments(config)


def test_only_whole_checkpoints_are_gone_on_from(tmp_path):
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({}))
    assert find_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}/complete").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-10"}
