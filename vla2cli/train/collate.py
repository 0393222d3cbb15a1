"""Samples -> one batch: rows padded on the right, or several conversations behind one medium.

A packed row is the tokens up to the placeholder, which its conversations share, and the rest of
each of them. `segments` tells them apart; what each may see is the network's business.

Source: upstream VideoLLaMA2@c0bb03a, train.py, `DataCollatorForSupervisedDataset`; packing is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vla2cli.train.conversation import IGNORED, Row
from vla2cli.train.media import Media
from vla2cli.train.samples import Sample, Skipped


@dataclass(frozen=True)
class PackedRow:
    """Conversations behind one medium, before they are padded."""

    input_ids: list[int]
    labels: list[int]
    segments: list[int]  # 0 for what is shared, k for the rest of conversation k


@dataclass(frozen=True)
class Collator:
    """Make what `TrainedNetwork.forward` takes of samples, and list what was left out.

    Called with samples it returns `input_ids`, `attention_mask` (bool) and `labels`, all (B, L),
    `media`, one for each row, and `skipped`, a list of (id, reason), which is not for the network;
    where it packs, `segments` (B, L); where a sample has them, `word_targets` and `left_open`, one
    for each row or None. A batch of which nothing is left has one row that teaches nothing.
    """

    pad_token_id: int
    max_length: int  # of one conversation, before the media are spliced in
    pack: int = 1  # at most so many conversations behind one medium

    def __post_init__(self) -> None:
        """Refuse sizes that hold nothing."""
        for name in ("max_length", "pack"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    def __call__(self, samples: Sequence[Sample | Skipped]) -> dict[str, Any]:
        """Collate; see the class."""
        skipped: list[Skipped] = []
        rows: list[PackedRow] = []
        owners: list[Sample] = []
        for sample in samples:
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            packed = pack_rows(self._cut(sample, skipped), self.pack)
            rows += packed
            owners += [sample] * len(packed)
        batch = self._pad(rows or [PackedRow([self.pad_token_id], [IGNORED], [0])])
        batch["media"] = [owner.media for owner in owners] or [Media()]
        if any(owner.word_targets is not None for owner in owners):
            batch["word_targets"] = [owner.word_targets for owner in owners]
        if any(owner.left_open is not None for owner in owners):
            batch["left_open"] = [owner.left_open for owner in owners]
        batch["skipped"] = [(left_out.id, left_out.reason) for left_out in skipped]
        return batch

    def _cut(self, sample: Sample, skipped: list[Skipped]) -> list[Row]:
        skipped += sample.skipped
        kept = []
        for id_, row in zip(sample.ids, sample.rows, strict=True):
            cut = Row(row.input_ids[: self.max_length], row.labels[: self.max_length])
            if cut.place != row.place:
                reason = f"its medium comes after the {self.max_length} tokens that are kept"
            elif all(label == IGNORED for label in cut.labels):
                reason = f"no answer begins within the {self.max_length} tokens that are kept"
            else:
                kept.append(cut)
                continue
            skipped.append(Skipped(id_, reason))
        return kept

    def _pad(self, rows: Sequence[PackedRow]) -> dict[str, Any]:
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        length = int(lengths.max())
        batch: dict[str, Any] = {
            "input_ids": _pad([row.input_ids for row in rows], length, self.pad_token_id),
            # upstream compares ids with the padding's, which may be a word of the text
            "attention_mask": torch.arange(length) < lengths[:, None],
            "labels": _pad([row.labels for row in rows], length, IGNORED),
        }
        if self.pack > 1:
            batch["segments"] = _pad([row.segments for row in rows], length, 0)
        return batch


def pack_rows(rows: Sequence[Row], pack: int) -> list[PackedRow]:
    """Put up to `pack` conversations about one medium behind what they have in common.

    They are, where the tokens up to the placeholder are equal and none of them is learned; a row
    without a medium has nothing in common with others and shares no more than the batch's row.
    """
    packed: list[PackedRow] = []
    last: list[int] | None = None  # what the conversations of the last row share
    num_segments = 0
    for row in rows:
        shared = 0 if row.place is None else row.place + 1
        prefix = list(row.input_ids[:shared])
        learns_prefix = any(label != IGNORED for label in row.labels[:shared])
        if prefix != last or num_segments == pack or learns_prefix:
            packed.append(PackedRow(list(prefix), list(row.labels[:shared]), [0] * shared))
            num_segments = 0
            last = None if learns_prefix else prefix
        num_segments += 1
        rest = row.input_ids[shared:]
        packed[-1].input_ids.extend(rest)
        packed[-1].labels.extend(row.labels[shared:])
        packed[-1].segments.extend([num_segments] * len(rest))
    return packed


def _pad(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
