"""The public data format -> samples: a list of `{id, video|image|audio, conversations}`.

Several files are mixed by weight. What an epoch holds and in which order follows from the seed and
its number alone. A sample that cannot be used is handed on as `Skipped`, never replaced.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from vla2cli.errors import InputError, ModelError, UsageError
from vla2cli.tokenizer import Tokenizer
from vla2cli.train.config import DataFile
from vla2cli.train.conversation import Form, Row, build_row
from vla2cli.train.entries import Entry, read_entries
from vla2cli.train.media import Media, MediaFile, MediaReader


@dataclass(frozen=True)
class Skipped:
    """A conversation that is left out of training, and why."""

    id: str
    reason: str


@dataclass(frozen=True, eq=False)
class Sample:
    """One medium, or none, and the conversations about it that are learned together."""

    ids: tuple[str, ...]  # of the conversations
    rows: tuple[Row, ...]  # as many
    media: Media
    skipped: tuple[Skipped, ...] = ()  # conversations about the same medium that cannot be used
    # (num_media_tokens, K) int64: words that each token of the media stands for, -100 for none
    word_targets: Tensor | None = None
    # (W,) int64: ids that are neither right nor wrong about the media, and nowhere learned
    left_open: Tensor | None = None


class SampleDataset(Dataset["Sample | Skipped"]):
    """The samples of one epoch, a map-style dataset that never raises for a bad one.

    Args:
        files: at least one.
        tokenizer: of the checkpoint that is trained.
        reader: reads the media.
        form: how conversations are written, see `vla2cli.train.conversation`.
        pack: at most so many conversations about the same medium make one sample.
        seed: of the order and of the choice where a weight is no whole number.

    Raises:
        UsageError: a file is no list of entries, or its weight leaves nothing of it.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        tokenizer: Tokenizer,
        reader: MediaReader,
        *,
        form: Form = "chat",
        pack: int = 1,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.reader, self.form, self.seed = tokenizer, reader, form, seed
        self._groups = [group_entries(_read(file), pack) for file in files]
        self._weights = [file.weight for file in files]
        for file, groups in zip(files, self._groups):
            if not (math.isfinite(file.weight) and round(len(groups) * file.weight) >= 1):
                raise UsageError(
                    f"'{file.file}': a weight of {file.weight!r} leaves none of its "
                    f"{len(groups)} samples"
                )
        self.set_epoch(0)

    @property
    def counts(self) -> list[int]:
        """Samples of each file in one epoch."""
        pairs = zip(self._groups, self._weights, strict=True)
        return [round(len(groups) * weight) for groups, weight in pairs]

    def set_epoch(self, epoch: int) -> None:
        """Choose and order the samples of an epoch, counted from 0."""
        chosen = [
            groups[i]
            for number, (groups, weight) in enumerate(zip(self._groups, self._weights))
            for i in draw_indices(len(groups), weight, epoch, seed=f"{self.seed}:{number}")
        ]
        random.Random(f"{self.seed}:order:{epoch}").shuffle(chosen)
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample | Skipped:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample | Skipped]:
        """Make several samples at once, as a data loader asks for a batch: files in parallel."""
        drafts = [self._draft(self._chosen[i]) for i in indices]
        read = iter(self.reader.read([draft.file for draft in drafts if draft.file is not None]))
        return [draft.finish(Media() if draft.file is None else next(read)) for draft in drafts]

    def _draft(self, group: Sequence[Entry]) -> _Draft:
        learned: list[tuple[str, Row]] = []
        skipped = []
        for entry in group:
            if entry.fault is not None:
                skipped.append(Skipped(entry.id, entry.fault))
                continue
            try:
                row = build_row(self.tokenizer, entry.conversation, entry.medium, self.form)
                learned.append((entry.id, row))
            except (InputError, ModelError) as error:
                skipped.append(Skipped(entry.id, str(error)))
        path = group[0].path
        # nothing is decoded for nobody
        is_needed = path is not None and bool(learned)
        file = MediaFile(str(path), group[0].medium) if is_needed else None
        return _Draft(tuple(learned), tuple(skipped), file)


@dataclass(frozen=True)
class _Draft:
    """A sample before its media are there."""

    learned: tuple[tuple[str, Row], ...]  # id and row of each conversation
    skipped: tuple[Skipped, ...]
    file: MediaFile | None

    def finish(self, media: Media | InputError) -> Sample | Skipped:
        learned, skipped = self.learned, self.skipped
        if isinstance(media, InputError):
            assert self.file is not None, "media of no file"
            reason = f"'{self.file.path}': {media}"
            skipped += tuple(Skipped(id, reason) for id, _ in learned)
            learned, media = (), Media()
        if not learned and len(skipped) == 1:
            return skipped[0]
        return Sample(
            tuple(id for id, _ in learned), tuple(row for _, row in learned), media, skipped
        )


def _read(file: DataFile) -> list[Entry]:
    """Read the entries, their media's paths with the folder before them."""
    path = Path(file.file)
    folder = path.parent if file.folder is None else Path(file.folder)
    if not folder.is_dir():
        raise UsageError(f"'{folder}', the folder of '{path}', is none; give what its paths are in")
    return [
        entry if entry.path is None else replace(entry, path=str(folder / entry.path))
        for entry in read_entries(path)
    ]


def group_entries(entries: Sequence[Entry], pack: int) -> list[tuple[Entry, ...]]:
    """Put up to `pack` entries about the same medium together, in the order of their first."""
    by_medium: dict[tuple[str, str | None], list[Entry]] = {}
    for entry in entries:
        by_medium.setdefault((entry.medium, entry.path), []).append(entry)
    return [
        tuple(about[i : i + pack])
        for about in by_medium.values()
        for i in range(0, len(about), pack)
    ]


def draw_indices(count: int, weight: float, epoch: int, *, seed: str) -> list[int]:
    """Choose which of `count` groups an epoch sees: `weight` times all of them.

    Epochs deal from one pile that is shuffled anew when it is empty, so that over time each group
    comes as often as any other.
    """
    wanted = round(count * weight)
    first = epoch * wanted
    drawn: list[int] = []
    for pile in range(first // count, math.ceil((first + wanted) / count)):
        shuffled = random.Random(f"{seed}:{pile}").sample(range(count), count)
        start = max(first - pile * count, 0)
        drawn += shuffled[start : first + wanted - pile * count]
    return drawn
