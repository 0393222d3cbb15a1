"""Real processes that train: saved and asked, killed and gone on with, two instead of one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla2_models.checkpoint import open_checkpoint
from vla2_models.hub import Source
from vla2_models.loading import load_model
from vla2_models.miniature import MODEL_ID, write_miniature
from vla2cli.api import ask, features
from vla2cli.config import GenerationChoice
from vla2cli.engine import Engine

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
LIMIT_S = 300.0  # a run takes some 7 s, nearly all of it imports
SETTINGS = {
    "model": MODEL_ID,
    "stage": "video-finetune",
    "batch": 2,
    "warmup_ratio": 0,
    "learning_rate": 1e-3,
    "num_frames": 2,
    "workers": 1,
    "precision": "float32",
    "lora": None,
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_miniature(folder, num_frames=2, num_hidden_layers=1, hidden_size=32)
    return folder


@pytest.fixture
def training(tmp_path, hub):
    """Say how a run is started: its name, its settings, the number of processes -> command."""
    samples = [
        {
            "id": f"{i}",
            "video": f"0{i}.mp4",
            "conversations": [
                {"from": "human", "value": "<video>\nWhat moves?"},
                {"from": "gpt", "value": "a red car " * i},
            ],
        }
        for i in range(1, 5)
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(samples))

    def command(name, processes=1, **settings):
        content = {**SETTINGS, "output": str(tmp_path / name), **settings}
        content["data"] = [{"file": str(data), "folder": str(EXAMPLES)}]
        config = tmp_path / f"{name}.yaml"
        config.write_text(json.dumps(content))  # JSON is YAML
        launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
        modules = [*(launcher if processes > 1 else []), "vla2cli", "train", str(config)]
        return [sys.executable, "-m", *modules, "--hub-dir", str(hub)]

    return command


def variables():
    path = os.pathsep.join(str(REPOSITORY / name) for name in (".", "models", "kernels"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def finish(command):
    return subprocess.run(
        command, env=variables(), capture_output=True, text=True, timeout=LIMIT_S, check=True
    )


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def first_logits(engine, folder):
    """What a model in memory says first of the first example."""
    asking = {"tensors": "first_logits", "question": "What moves?"}
    (_,) = features(EXAMPLES / "01.mp4", engine, folder, **asking)
    (path,) = folder.glob("*.safetensors")
    return load_file(path)["first_logits"]


def test_a_killed_run_goes_on_to_the_same_bytes_and_answers(training, tmp_path, hub):
    settings = {"max_steps": 6, "save_steps": 1}
    finish(training("whole", **settings))
    killed = subprocess.Popen(
        training("killed", **settings), env=variables(), stderr=subprocess.DEVNULL
    )
    in_midst = tmp_path / "killed/checkpoint-3/complete"  # of the second epoch
    ends = time.monotonic() + LIMIT_S
    while not in_midst.exists():
        assert killed.poll() is None, "it ended by itself"
        assert time.monotonic() < ends, "no checkpoint in time"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/config.json").exists()
    assert "going on from step" in finish(training("killed", **settings)).stderr
    whole, gone_on = (weights_of(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(gone_on[name], weight) for name, weight in whole.items())
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "killed")
    asked = finish(
        [
            *(sys.executable, "-m", "vla2cli", "ask", str(EXAMPLES / "01.mp4"), "What moves?"),
            *("--model", str(tmp_path / "killed"), "--hub-dir", str(hub), "--json"),
            *("--max-new-tokens", "4", "--dtype", "float32"),
        ]
    )
    (record,) = map(json.loads, asked.stdout.splitlines())
    finish(
        [
            *(sys.executable, "-m", "vla2cli", "features", str(EXAMPLES / "01.mp4")),
            *("--tensors", "first_logits", "--question", "What moves?"),
            *("--model", str(tmp_path / "killed"), "--hub-dir", str(hub), "--dtype", "float32"),
            *("-o", str(tmp_path / "saved")),
        ]
    )
    # weights are packed at their first use: an engine for each
    checkpoint = open_checkpoint(MODEL_ID, Source(hub))
    engine, begun = (Engine(checkpoint, device="cpu", dtype="float32") for _ in range(2))
    untrained = first_logits(begun, tmp_path / "untrained")
    # what the run itself held at its end
    trained = load_file(tmp_path / "killed/checkpoint-6/model.safetensors")
    state = {name.removeprefix("model."): weight for name, weight in trained.items()}
    engine.model = load_model(checkpoint)  # as it is stored: not packed yet
    assert engine.model.load_state_dict(state, strict=False, assign=True).unexpected_keys == []
    expected = first_logits(engine, tmp_path / "trained")
    (saved,) = (tmp_path / "saved").glob("*.safetensors")
    torch.testing.assert_close(load_file(saved)["first_logits"], expected, rtol=1e-4, atol=1e-4)
    assert (expected - untrained).abs().max() > 0.01
    generation = GenerationChoice(max_new_tokens=4)
    (asked_in_memory,) = ask(EXAMPLES / "01.mp4", "What moves?", engine, generation=generation)
    assert record["text"] == asked_in_memory["text"]


def test_two_processes_have_the_loss_of_one(training, tmp_path):
    settings = {"max_steps": 2, "batch": 4, "per_device_batch": 1, "connector": "linear"}
    for name, processes in (("one", 1), ("two", 2)):
        finish(training(name, processes, **settings))
    one, two = (losses_of(tmp_path / name) for name in ("one", "two"))
    # answers differ in length: a mean of two processes' means would be another
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    found, wanted = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
