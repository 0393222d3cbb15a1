"""Questions about clips that were not learned from, asked while a network is trained.

Each is right when greedy decoding would give the true answer word for word, to the question in the
checkpoint's template, in whatever form the stage learns. One forward pass tells that for all of
them (`TrainedNetwork.recite`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vla2cli.train.collate import Collator
from vla2cli.train.config import EXAM_SEED
from vla2cli.train.hf import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from vla2cli.train.log import append_lines, take_back
from vla2cli.train.network import TrainedNetwork
from vla2cli.train.samples import Sample
from vla2cli.train.world import WorldReader, WorldSamples
from vla2cli.world.facts import SPLITS

EXAM = "exam.jsonl"  # in the run's folder: step, split, kind, num, right
NUM_CLIPS = 96  # of each split
BATCH = 16
_ALL_QUESTIONS = 100  # more than any clip answers


class Exam(TrainerCallback):
    """Writes down the share of right answers, every so many steps and at the end.

    Args:
        folder: the run's.
        network: in training.
        reader: makes the clips.
        medium: what of a clip is given.
        every: steps between two exams.
        is_half: whether products are made in bfloat16, as in training.
    """

    def __init__(
        self,
        folder: Path,
        network: TrainedNetwork,
        reader: WorldReader,
        medium: str,
        every: int,
        *,
        is_half: bool,
    ) -> None:
        self.path, self.network, self.every = folder / EXAM, network, every
        self.is_half = is_half
        self.collator = Collator(reader.tokenizer.eos_token_id, 2**20, _ALL_QUESTIONS)
        asking = replace(reader, form="chat")
        self.papers = {split: _draw(asking, split, medium) for split in SPLITS}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take back what lies beyond the checkpoint."""
        if state.is_world_process_zero:
            take_back(self.path, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Hold an exam where one is due."""
        is_due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if is_due and state.is_world_process_zero:
            self.network.eval()
            append_lines(self.path, self._lines(state.global_step))
            self.network.train()

    def _lines(self, step: int) -> Iterator[dict[str, int | str]]:
        for split, samples in self.papers.items():
            for kind, (num, right) in sorted(self.mark(samples).items()):
                yield {"step": step, "split": split, "kind": kind, "num": num, "right": right}

    def mark(self, samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
        """Count the questions and the right answers of each kind."""
        asked: Counter[str] = Counter()
        right: Counter[str] = Counter()
        for start in range(0, len(samples), BATCH):
            some = samples[start : start + BATCH]
            batch = self.collator(some)
            assert len(batch["media"]) == len(some), "each sample is one packed row"
            batch.pop("skipped")
            batch.pop("word_targets")
            with torch.autocast(self.network.model.device.type, torch.bfloat16, self.is_half):
                row, segment, is_right = self.network.recite(**batch)
            wrong = set(zip(row[~is_right].tolist(), segment[~is_right].tolist(), strict=True))
            for i, sample in enumerate(some):
                for number, name in enumerate(sample.ids, start=1):
                    kind = name.split("-", 2)[2]
                    asked[kind] += 1
                    right[kind] += (i, number) not in wrong
        return {kind: (asked[kind], right[kind]) for kind in asked}


def _draw(reader: WorldReader, split: str, medium: str) -> list[Sample]:
    clips = WorldSamples(
        reader,
        EXAM_SEED,
        NUM_CLIPS,
        num_questions=_ALL_QUESTIONS,
        split=split,
        medium=medium,
        is_spoiled=False,
    )
    return [clips[i] for i in range(NUM_CLIPS)]
