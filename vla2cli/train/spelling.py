"""Words in smaller pieces than they need: what makes a piece known that no whole word uses.

A model that learns to read from few words meets most pieces of its vocabulary only so; without it
a word that is taught later is made of pieces that it cannot tell apart.

Source: subword regularisation, Kudo 2018, arXiv:1804.10959: a text has many segmentations, and
training may see them all. As in BPE-dropout (Provilkov et al. 2020, arXiv:1910.13267) no model of
their likelihood is needed: here each piece is split again and again by chance.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vla2cli.tokenizer import Tokenizer
from vla2cli.train.conversation import IGNORED, Row

_SPLIT_SHARE = 0.5  # of the pieces that can be


class Speller:
    """Cuts the pieces of rows, as far as what they are cut into are pieces themselves.

    Args:
        tokenizer: whose pieces they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._splits: dict[int, list[tuple[int, int]]] = {}

    def spell(self, row: Row, rng: np.random.Generator) -> Row:
        """Cut pieces of a row by chance; its text is the same, and what of it is learned.

        What is before the media stays: rows about the same media share it.
        """
        place = -1 if row.place is None else row.place
        ids: list[int] = []
        labels: list[int] = []
        for at, (id_, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
            parts = [id_] if at <= place else list(self._cut(id_, rng))
            ids += parts
            labels += [IGNORED] * len(parts) if label == IGNORED else parts
        return Row(tuple(ids), tuple(labels))

    def _cut(self, id_: int, rng: np.random.Generator) -> Iterator[int]:
        if id_ not in self._splits:
            self._splits[id_] = self.tokenizer.splits(id_)
        splits = self._splits[id_]
        if not splits or rng.random() >= _SPLIT_SHARE:
            yield id_
            return
        for part in splits[int(rng.integers(len(splits)))]:
            yield from self._cut(part, rng)
