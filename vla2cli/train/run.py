"""`vla2 train` without its flags: from a configuration to a checkpoint for `vla2 --model`."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla2_models.checkpoint import Checkpoint
from vla2_models.config import CheckpointConfig
from vla2_models.files import read_json, write_json
from vla2_models.hub import Source
from vla2_models.loading import build_empty, load_model
from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.console import Console
from vla2cli.engine import DTYPES
from vla2cli.errors import NoInputError, UsageError
from vla2cli.layout import Layout
from vla2cli.train.config import FREE_KEYS, TrainConfig, complete_record
from vla2cli.train.exam import Exam
from vla2cli.train.lesson import Lesson, open_lesson
from vla2cli.train.lock import hold_folder
from vla2cli.train.log import SKIPPED, read_totals
from vla2cli.train.lora import add_adapter, find_targets
from vla2cli.train.network import TrainedNetwork
from vla2cli.train.save import check_form, form_of, save_trained
from vla2cli.train.stages import LANGUAGE_MODEL, TOWERS, freeze_all_but
from vla2cli.train.start import open_start
from vla2cli.train.towers import TowerTask
from vla2cli.train.trainer import (
    Trained,
    count_steps,
    make_arguments,
    named_trained,
    run_training,
    uses_bfloat16,
)

RECORD = "train.json"  # in the run's folder: the configuration that it was begun with


@dataclass(frozen=True)
class Student:
    """A network that is ready to be trained, and what it began from."""

    config: TrainConfig
    checkpoint: Checkpoint
    network: TrainedNetwork | TowerTask
    targets: list[str]  # kinds of layers that an adapter is on

    def save(self, trained: Trained) -> None:
        """Write what training came to, as `save_trained`."""
        prefix = "model."  # in the network's names; what has none is of use in training alone
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in trained.state.items()
            if name.startswith(prefix)
        }
        state |= self._frozen(prefix)
        save_trained(self.config, self.checkpoint, state, _saved_dtype(self.config), self.targets)

    def _frozen(self, prefix: str) -> dict[str, Tensor]:
        """Read what was not trained as it was: it may have been held in half its precision."""
        if self.config.quantize is not None:
            return {}
        stored = load_model(self.checkpoint, dtype=None).state_dict()
        frozen = {
            name.removeprefix(prefix)
            for name, parameter in self.network.named_parameters()
            if name.startswith(prefix) and not parameter.requires_grad
        }
        # below an adapter a layer is called otherwise
        return {name: stored[name.replace(".base_layer.", ".")] for name in frozen}


def train(
    config: TrainConfig,
    source: Source,
    console: Console,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train on files of samples, and save; a run that was ended goes on from its checkpoint.

    Raises:
        UsageError: the configuration does not fit the model, the data, or the run in its folder.
        NoInputError: no sample could be used; nothing is saved.
        RunBusyError: another process trains in the folder.
        CheckpointError: the model cannot be read, or the folder not be written.
    """
    check_record(config)
    with hold_folder(Path(config.output)):
        return _train(config, source, console, should_stop)


def _train(
    config: TrainConfig, source: Source, console: Console, should_stop: Callable[[], bool]
) -> Trained:
    # one of several processes writes what all of them read
    with make_arguments(config).main_process_first(local=False):
        checkpoint = open_start(config, source)
        check_form(config, checkpoint)
        lesson = open_lesson(config, checkpoint)
        write_record(config)
    student = make_student(config, checkpoint)
    trained = run_training(
        config,
        student.network,
        lesson.dataset,
        lesson.collator,
        console,
        on_step=lesson.on_step,
        callbacks=_exams(config, student, lesson),
        should_stop=should_stop,
    )
    if trained.is_finished and trained.is_first:
        _check_learned(Path(config.output))
        student.save(trained)
    return trained


def _check_learned(folder: Path) -> None:
    totals = read_totals(folder)
    if not totals.samples:
        raise NoInputError(
            f"nothing was learned: all {totals.skipped:,} samples were skipped, for the reasons "
            f"in '{folder / SKIPPED}'"
        )


def _exams(config: TrainConfig, student: Student, lesson: Lesson) -> list[Exam]:
    world, network = config.world, student.network
    if world is None or world.exam_steps is None or lesson.reader is None:
        return []
    assert isinstance(network, TrainedNetwork), "exams are about answers"
    return [
        Exam(
            Path(config.output),
            network,
            lesson.reader,
            world.medium or "av",
            world.exam_steps,
            is_half=uses_bfloat16(config),
        )
    ]


def make_student(config: TrainConfig, checkpoint: Checkpoint) -> Student:
    """Load a network, freeze what the configuration does not train, and add an adapter.

    What is trained is float32. What is frozen is bfloat16 where products are, unless FSDP or
    DeepSpeed holds all together in one dtype.
    """
    is_half = uses_bfloat16(config)
    model = _load(config, checkpoint, is_half)
    targets = find_targets(model.language_model)
    _choose_trained(config, model)
    is_sharded = config.fsdp is not None or config.deepspeed is not None
    frozen = torch.bfloat16 if is_half and not is_sharded else torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # of the heads that the towers' stage begins with
        is_towers = config.stage == TOWERS
        network = TowerTask(model) if is_towers else TrainedNetwork(model, config.num_frames)
    if config.gradient_checkpointing and isinstance(network, TrainedNetwork):
        network.enable_checkpointing()
    return Student(config, checkpoint, network, targets)


def _choose_trained(config: TrainConfig, model: VideoLLaMA2) -> None:
    if config.lora is None:
        freeze_all_but(model, config.train)
        return
    # weights of 4 bits take no gradients, not even for a moment
    freeze_all_but(model, [part for part in config.train if part != LANGUAGE_MODEL])
    add_adapter(model.language_model, config.lora, config.seed)


def _saved_dtype(config: TrainConfig) -> torch.dtype:
    if config.save_dtype != "auto":
        return DTYPES[config.save_dtype]
    return torch.bfloat16 if uses_bfloat16(config) else torch.float32


def _load(config: TrainConfig, checkpoint: Checkpoint, is_half: bool) -> VideoLLaMA2:
    if config.quantize is not None:
        device = make_arguments(config).device
        layout = Layout(load_in=config.quantize)
        layout.check(checkpoint.config.language, device)
        return layout.load(checkpoint, torch.bfloat16 if is_half else torch.float32, device)
    # an adapter is merged in float32; otherwise nothing is copied that is cast next
    return load_model(checkpoint, dtype=torch.float32 if checkpoint.adapter else None)


def describe(config: TrainConfig, source: Source) -> dict[str, Any]:
    """Tell what a run would train, on what, and for how long; nothing is written or trained.

    Raises:
        UsageError, CheckpointError: as `train`.
    """
    check_record(config)
    # new parts are written to be loaded, and here to be thrown away
    with tempfile.TemporaryDirectory(prefix="vla2-train-") as aside:
        checkpoint = open_start(replace(config, output=aside), source)
        check_form(config, checkpoint)
        parts = _count_parameters(config, checkpoint.config)
        is_given = bool(config.data) or config.world is not None
        lesson = open_lesson(config, checkpoint) if is_given else None
    steps = None if lesson is None else count_steps(config, lesson.num_samples)
    return {
        "stage": config.stage,
        "train": list(config.train),
        "form": config.form,
        "parameters": parts,
        "samples": {} if lesson is None else dict(lesson.counts),
        "samples_per_epoch": None if lesson is None else lesson.num_samples,
        "steps": steps,
        "save": form_of(config),
        "config": config.as_dict(),
    }


def _count_parameters(
    config: TrainConfig, checkpoint_config: CheckpointConfig
) -> dict[str, dict[str, int]]:
    model = build_empty(checkpoint_config)
    _choose_trained(config, model)
    trained = _count(dict(named_trained(model)))
    return {
        part: {"trained": trained[part], "all": total}
        for part, total in _count(dict(model.named_parameters())).items()
    }


def _count(parameters: Mapping[str, nn.Parameter]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, parameter in parameters.items():
        counts[name.partition(".")[0]] += parameter.numel()
    return counts


def is_done(config: TrainConfig) -> bool:
    """Tell whether a run with these settings has come to its end, and is saved.

    Raises:
        UsageError: its folder holds something else.
    """
    check_record(config)
    return (Path(config.output) / "config.json").exists()


def check_record(config: TrainConfig) -> None:
    """Refuse to go on with a run that was begun with other settings.

    Raises:
        UsageError: naming the first that differs.
        CheckpointError: the record is no JSON.
    """
    folder = Path(config.output)
    path = folder / RECORD
    if not path.exists():
        if (folder / "config.json").exists():
            raise UsageError(f"output '{folder}' holds a model already; give a new folder")
        return
    wanted = config.as_dict()
    try:
        begun = complete_record(read_json(path))
    except UsageError as error:
        raise UsageError(f"output '{folder}' was begun with {error}; give a new folder") from error
    for key in wanted:
        if key not in FREE_KEYS and begun.get(key) != wanted[key]:
            name, before, now = _difference(key, begun.get(key), wanted[key])
            raise UsageError(
                f"output '{folder}' was begun with {name} {json.dumps(before)}, not "
                f"{json.dumps(now)}; give a new folder"
            )


def _difference(name: str, begun: Any, wanted: Any) -> tuple[str, Any, Any]:
    """Name what differs, as deep as both have keys."""
    if isinstance(begun, dict) and isinstance(wanted, dict):
        for key in wanted:
            if begun.get(key) != wanted[key]:
                return _difference(f"{name}.{key}", begun.get(key), wanted[key])
    return name, begun, wanted


def write_record(config: TrainConfig) -> None:
    """Write down the settings of a run, where that is not done yet."""
    path = Path(config.output) / RECORD
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, config.as_dict())
