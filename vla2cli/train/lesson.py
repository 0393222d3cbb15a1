"""What a network is taught with: a dataset, what makes batches of it, and what changes by the step.

data: [...]       files of conversations                 `samples`
world: {...}      clips of the drawn world               `world`
stage: towers     its pictures and sounds, with labels   `towers`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import Dataset

from vla2_models.checkpoint import Checkpoint
from vla2cli.engine import read_geometry
from vla2cli.errors import UsageError
from vla2cli.tokenizer import load_tokenizer
from vla2cli.train.collate import Collator
from vla2cli.train.config import TrainConfig, WorldData
from vla2cli.train.media import MediaReader
from vla2cli.train.samples import SampleDataset
from vla2cli.train.stages import TOWERS
from vla2cli.train.towers import TowerSamples, collate_towers
from vla2cli.train.trainer import Batch, OnStep
from vla2cli.train.world import WorldReader, WorldSamples, check_world


@dataclass(frozen=True)
class Lesson:
    """Everything that `run_training` is given beside the network."""

    dataset: Dataset[Any]
    collator: Callable[[list[Any]], Batch]
    counts: Mapping[str, int]  # samples of an epoch, by file
    on_step: OnStep | None = None
    reader: WorldReader | None = None  # of the clips that exams are about

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts.values())


def open_lesson(config: TrainConfig, checkpoint: Checkpoint) -> Lesson:
    """Open what a configuration names to learn from.

    Raises:
        UsageError: there is none, a file is not in the format, or the world does not fit the model.
    """
    if config.world is None:
        return _read_files(config, checkpoint)
    geometry = read_geometry(checkpoint)
    counts = {"world": config.world.clips}
    if config.stage == TOWERS:
        pictures = TowerSamples(checkpoint.config, geometry, config.world.seed, config.world.clips)
        return Lesson(pictures, collate_towers, counts)
    check_world(checkpoint.config, config.world.medium)
    tokenizer = load_tokenizer(checkpoint.text_folder)
    reader = WorldReader(tokenizer, checkpoint.config, geometry, config.form)
    clips = WorldSamples(
        reader,
        config.world.seed,
        config.world.clips,
        num_questions=config.world.questions,
        medium=config.world.medium,
        spelled=config.world.spelled,
        apart=config.world.apart,
        leaves_open=True,
    )
    collator = Collator(tokenizer.eos_token_id, config.max_length, config.world.questions)
    return Lesson(clips, collator, counts, _fade(config.world), reader)


def _read_files(config: TrainConfig, checkpoint: Checkpoint) -> Lesson:
    if not config.data:
        raise UsageError("no data is given; expected a list of {file, folder, weight}")
    tokenizer = load_tokenizer(checkpoint.text_folder)
    geometry = replace(read_geometry(checkpoint), is_padded=config.image_aspect_ratio == "pad")
    audio = checkpoint.config.audio
    reader = MediaReader(
        geometry,
        config.num_frames or checkpoint.config.num_frames,
        window=None if audio is None else audio.window,
        hears_videos=config.va,
    )
    dataset = SampleDataset(
        config.data, tokenizer, reader, form=config.form, pack=config.pack, seed=config.seed
    )
    # any id fills rows up: a mask hides it
    collator = Collator(tokenizer.eos_token_id, config.max_length, config.pack)
    counts = dict(zip((entry.file for entry in config.data), dataset.counts, strict=True))
    return Lesson(dataset, collator, counts)


def _fade(world: WorldData) -> OnStep:
    """Let the loss of word targets fall evenly to nothing."""

    def word_weight(step: int, max_steps: int) -> Mapping[str, Any]:
        left = 1 - step / (max_steps * world.word_share) if world.word_share else 0.0
        return {"word_weight": world.word_weight * max(left, 0.0)}

    return word_weight
