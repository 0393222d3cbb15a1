"""The loop: `transformers.Trainer` with the reference's parameter groups, and a log of its own.

Processes are started by `accelerate launch` or `torchrun`; FSDP and DeepSpeed are settings of the
configuration. Whatever their number, the loss of a step is the mean over all its tokens.

It knows nothing of files of samples or of checkpoints for inference: a network, a dataset and a
collator go in, the weights come out.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from vla2cli.console import Console
from vla2cli.errors import UsageError
from vla2cli.train.config import TrainConfig
from vla2cli.train.conversation import IGNORED
from vla2cli.train.hf import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from vla2cli.train.log import RunLog, plot_loss
from vla2cli.train.optimiser import with_muon

PROJECTOR = "mm_projector"  # in the names of both projectors' parameters
WEIGHTS = "model.safetensors"  # of a checkpoint: the trained parameters
STATE = "trainer_state.json"
COMPLETE = "complete"  # an empty file, the last of a checkpoint
KEPT_CHECKPOINTS = 2

Batch = dict[str, Any]
# told the step and the number of steps; returns more arguments for the network
OnStep = Callable[[int, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Trained:
    """What a run has come to."""

    state: Mapping[str, Tensor]  # of the network, on the CPU; on the first process alone
    step: int
    max_steps: int
    is_first: bool  # of several processes

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end; otherwise the same call goes on."""
        return self.step >= self.max_steps


def run_training(
    config: TrainConfig,
    network: nn.Module,
    dataset: Dataset[Any],
    collator: Callable[[list[Any]], Batch],
    console: Console,
    *,
    on_step: OnStep | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train what of a network takes gradients, from the newest checkpoint of its folder on.

    Args:
        config: of it, what is about optimising, batches and the folder.
        network: maps a batch to {"loss": …}; is given `num_items_in_batch`, the number of tokens
            that the whole step learns, by which it divides the sum of its losses.
        dataset: map-style, of a fixed length, in the order in which it is seen. `set_epoch(epoch)`
            is called where it has that.
        collator: makes a batch of the items. `labels` are what is learned, the first of a row
            excepted; `skipped`, a list of (id, reason), is written down and taken out.
        console: where progress is told.
        on_step: makes more arguments for the network, such as a weight that decays.
        callbacks: told of each step, as `transformers.Trainer` does.
        should_stop: whether to end behind a checkpoint.

    Raises:
        UsageError: batch and processes do not fit together, or the folder's checkpoint is of
            another network.
    """
    folder = Path(config.output)
    arguments = make_arguments(config)
    checkpoint = find_checkpoint(folder)
    if checkpoint is not None and config.fsdp is None and config.deepspeed is None:
        check_checkpoint(checkpoint, network)
    # each epoch starts workers, and importing takes seconds
    multiprocessing.set_forkserver_preload([__name__, type(dataset).__module__])
    log = RunLog(folder, console, should_stop)
    trainer = VideoTrainer(
        log,
        network,
        on_step or (lambda step, max_steps: {}),
        config.projector_learning_rate,
        config.muon_learning_rate,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=list(callbacks),
    )
    if trainer.is_world_process_zero():
        remove_unfinished(folder)
    step, max_steps = (0, -1) if checkpoint is None else read_progress(checkpoint)
    if checkpoint is not None:
        console.note(f"going on from step {step:,}: {checkpoint}")
    if checkpoint is not None and step == max_steps:
        trainer.restore(checkpoint)
    else:
        with warnings.catch_warnings():
            # of DDP, about 1 x 1 convolutions; speed alone is at stake
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        step, max_steps = trainer.state.global_step, trainer.state.max_steps
    state = trainer.gather_state()
    if trainer.is_world_process_zero():
        plot_loss(folder)
    return Trained(state, step, max_steps, trainer.is_world_process_zero())


class VideoTrainer(Trainer):
    """`transformers.Trainer` for networks whose loss is a sum over the tokens of answers.

    Args:
        log: told what each step is given.
        network: what is trained.
        on_step: see `run_training`.
        projector_learning_rate: of parameters of a projector; None: as the others.
        muon_learning_rate: of hidden matrices, by Muon; None: AdamW alone.
        arguments: of `Trainer`.
    """

    def __init__(
        self,
        log: RunLog,
        network: nn.Module,
        on_step: OnStep,
        projector_learning_rate: float | None,
        muon_learning_rate: float | None,
        **arguments: Any,
    ) -> None:
        super().__init__(model=network, **arguments)
        self.remove_callback(PrinterCallback)  # which writes to stdout
        self.add_callback(log)
        self.add_callback(_CompleteMark(self, log.folder))
        self.network = network
        self.log_of_run = log
        self.on_step = on_step
        self.projector_learning_rate = projector_learning_rate
        self.muon_learning_rate = muon_learning_rate
        self.model_accepts_loss_kwargs = True  # the network divides by the step's tokens

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with up to four groups: with and without decay, projectors and the rest."""
        if self.optimizer is None:
            model = self.network if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = group_parameters(
                model,
                set(self.get_decay_parameter_names(model)),
                self.args.weight_decay,
                self.projector_learning_rate,
            )
            self.optimizer = optimizer_class(groups, **settings)
            if self.muon_learning_rate is not None:
                self.optimizer = with_muon(self.optimizer, model, self.muon_learning_rate)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Take the batches of one step; count their tokens over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        skipped = [sample for batch in batches for sample in batch.pop("skipped", ())]
        counts = torch.tensor(
            [
                sum(count_targets(batch) for batch in batches),
                sum(count_samples(batch) for batch in batches),
                len(skipped),
                self.log_of_run.should_stop(),
            ],
            device=device,
        )
        totals = self.accelerator.gather(counts[None]).sum(0)
        tokens, samples, num_skipped, num_stopping = totals.tolist()
        self.log_of_run.totals.add(tokens, samples, num_skipped)
        self.log_of_run.is_stopping = num_stopping > 0
        if num_skipped:
            everywhere = gather_object(skipped)
            if self.is_world_process_zero():
                self.log_of_run.skip(self.state.global_step + 1, everywhere)
        return batches, totals[0].clamp(min=1)  # a step may be of bad samples alone

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of one batch, with what `on_step` adds."""
        more = self.on_step(self.state.global_step, self.state.max_steps)
        return super().compute_loss(model, {**inputs, **more}, return_outputs, num_items_in_batch)

    def _get_learning_rate(self) -> float:
        # what is logged; Muon's groups and the projectors' may come first
        if not self.is_deepspeed_enabled:
            assert self.optimizer is not None, "nothing steps"
            for group in self.optimizer.param_groups:
                if group["initial_lr"] == self.args.learning_rate:
                    return float(group["lr"])
        return float(super()._get_learning_rate())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters; sharded ones as accelerate and DeepSpeed do."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.log_of_run.folder)
            folder.mkdir(parents=True, exist_ok=True)
            trained = {name: weight.data for name, weight in named_trained(self.network)}
            save_file(trained, folder / WEIGHTS, metadata={"format": "pt"})

    def restore(self, checkpoint: Path) -> None:
        """Load a checkpoint's weights without training on.

        Raises:
            UsageError: they are sharded.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UsageError(
                f"'{checkpoint}' is the last of its run, whose weights are sharded; remove it to "
                "go on from the one before"
            )
        self._load_from_checkpoint(str(checkpoint))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # called by `train`, which wants all weights of a model of transformers' own
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        trained = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        unexpected = self.network.load_state_dict(trained, strict=False).unexpected_keys
        assert not unexpected, f"no place for {unexpected}"

    def gather_state(self) -> dict[str, Tensor]:
        """Collect the network's weights on the CPU of the first process."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.is_world_process_zero():
            return {}
        return {name: tensor.detach().cpu() for name, tensor in state.items()}


class _CompleteMark(TrainerCallback):
    """Marks a checkpoint as complete once every process has written its part."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (self.folder / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def make_arguments(config: TrainConfig) -> TrainingArguments:
    """Say the configuration in the words of `transformers.Trainer`.

    Raises:
        UsageError: the processes do not divide the batch, or are too few for the GPUs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by the launcher
    at_once = config.per_device_batch * world_size
    if config.batch % at_once:
        raise UsageError(
            f"batch is {config.batch}, no multiple of per_device_batch {config.per_device_batch} "
            f"on {world_size} processes"
        )
    has_cuda, has_peers = torch.cuda.is_available(), world_size > 1
    arguments = TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=config.per_device_batch,
        gradient_accumulation_steps=config.batch // at_once,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,  # below 1 it is a share
        weight_decay=config.weight_decay,
        bf16=uses_bfloat16(config),
        use_cpu=not torch.accelerator.is_available(),  # or two processes would not know each other
        seed=config.seed,
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # which would write the last good loss instead
        save_steps=config.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=has_cuda,
        # gloo and NCCL have threads, which do not survive a fork
        dataloader_multiprocessing_context="forkserver" if has_peers and config.workers else None,
        # the network runs what a batch leaves unused on blanks
        ddp_find_unused_parameters=False,
        **_sharding(config),
    )
    if arguments.n_gpu > 1:
        raise UsageError(
            f"{arguments.n_gpu} GPUs and one process: start one for each with torchrun "
            f"--nproc-per-node {arguments.n_gpu} -m vla2cli train …, or choose one with "
            "CUDA_VISIBLE_DEVICES"
        )
    return arguments


def _sharding(config: TrainConfig) -> dict[str, Any]:
    if config.fsdp is not None:
        return {"fsdp": True, "fsdp_config": config.fsdp}
    return {} if config.deepspeed is None else {"deepspeed": config.deepspeed}


def count_steps(config: TrainConfig, num_samples: int) -> int:
    """Count the steps that a run takes over samples, as `Trainer` does."""
    if config.max_steps is not None:
        return config.max_steps
    return math.ceil(config.epochs * math.ceil(num_samples / config.batch))


def uses_bfloat16(config: TrainConfig) -> bool:
    """Tell whether products are made in bfloat16; trained weights are float32 in any case."""
    if config.precision == "auto":
        return torch.cuda.is_available()
    return config.precision == "bfloat16"


def group_parameters(
    network: nn.Module,
    decayed: Iterable[str],
    weight_decay: float,
    projector_learning_rate: float | None,
) -> list[dict[str, Any]]:
    """Sort the trained parameters into the optimiser's groups, none of them empty.

    Args:
        network: of which those with gradients are taken.
        decayed: names of parameters that decay: neither norms nor biases.
        weight_decay: of those.
        projector_learning_rate: of both projectors; None: the optimiser's own.
    """
    decayed = set(decayed)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named_trained(network):
        is_own = projector_learning_rate is not None and PROJECTOR in name
        groups.setdefault((is_own, name in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if is_decayed else 0.0,
            **({"lr": projector_learning_rate} if is_own else {}),
        }
        for (is_own, is_decayed), parameters in groups.items()
    ]


def named_trained(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name the parameters that take gradients."""
    return ((name, p) for name, p in network.named_parameters() if p.requires_grad)


def count_targets(batch: Batch) -> int:
    """Count the tokens that are learned: nothing predicts the first of a row."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def count_samples(batch: Batch) -> int:
    """Count the rows that something is learned from."""
    return int((batch["labels"] != IGNORED).any(1).sum())


def find_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint of a run that is whole."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints that were never complete: they would count among those that are kept."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).exists():
            shutil.rmtree(checkpoint)


def read_progress(checkpoint: Path) -> tuple[int, int]:
    """Read how far a checkpoint is: the step, and the number of steps."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state["global_step"], state["max_steps"]


def check_checkpoint(checkpoint: Path, network: nn.Module) -> None:
    """Refuse the checkpoint of another network.

    Raises:
        UsageError: naming the first parameter that one of them lacks.
    """
    with safe_open(checkpoint / WEIGHTS, "pt") as file:
        found = set(file.keys())
    for name in sorted(found ^ dict(named_trained(network)).keys()):
        other = "does not train" if name in found else "trains, and the checkpoint has not"
        raise UsageError(f"'{checkpoint}' is of another run: '{name}' is what this one {other}")
