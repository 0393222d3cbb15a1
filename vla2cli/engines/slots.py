"""Keys and values of several prompts, each in a slot of its own.

A row of the batch is a slot: it begins at column 0 and ends where its prompt has come to, so that
rows of any lengths stand beside each other, one can leave and another take its place while the
rest go on, and nothing is copied to make room for a token. Who reads a slot masks what lies behind
its end.

It stands where transformers' attention layers expect a cache, and knows nothing of masks: these
are made beforehand, in four dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROWTH = 128  # columns; a power of two


@dataclass(frozen=True)
class Prefix:
    """The first columns of one slot, copied out of it."""

    length: int
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values, (H, length, d)


class SlotCache:
    """Slots for the keys and values of `num_slots` rows, (num_slots, H, columns, d) a layer.

    Before each pass of the model `place` says which slots it is about and where they go on.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots = 0  # there is room for
        self.columns = 0
        self.version = 0  # counts how often the slots have moved in memory
        self.layers: list[tuple[Tensor, Tensor]] = []
        self._rows = slice(0, 0)
        self._start: int | Tensor = 0
        self._end = 0

    def place(self, rows: slice, start: int | Tensor, end: int) -> None:
        """Say where the next pass writes, and how much of it attention reads.

        Args:
            rows: slots, as many as the pass has rows.
            start: the first column of all rows; or for each of their new positions its own,
                (B, T) int64.
            end: columns that are read.
        """
        self._rows, self._start, self._end = rows, start, end
        self.reserve(rows.stop, end)

    def reserve(self, slots: int, columns: int) -> None:
        """Make room for the first so many slots and columns."""
        if slots <= self.slots and columns <= self.columns:
            return
        if slots > self.slots:  # few prompts take little memory, however many there might be
            self.slots = min(self.num_slots, 1 << (slots - 1).bit_length())
        if columns > self.columns:
            self.columns = -(-columns // GROWTH) * GROWTH
        self.version += 1
        # one layer after the other, so that only one is there twice
        for i, (keys, values) in enumerate(self.layers):
            self.layers[i] = self._grown(keys), self._grown(values)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the (B, H, T, d) of a layer; return all that its rows hold up to `end`."""
        if layer_idx == len(self.layers):
            self.layers.append((self._empty(keys), self._empty(values)))
        layer = self.layers[layer_idx]
        for held, new in zip(layer, (keys, values), strict=True):
            self._write(held[self._rows], new)
        held_keys, held_values = (held[self._rows, :, : self._end] for held in layer)
        return held_keys, held_values

    def _write(self, rows: Tensor, new: Tensor) -> None:
        if isinstance(self._start, int):
            rows[:, :, self._start : self._start + new.shape[2]] = new
            return
        columns = self._start.to(rows.device)
        row = torch.arange(len(columns), device=rows.device)[:, None]
        rows[row, :, columns] = new.transpose(1, 2)

    def copy(self, slot: int, length: int) -> Prefix:
        """Take the first columns of a slot out of it."""
        pairs = ((keys[slot, :, :length], values[slot, :, :length]) for keys, values in self.layers)
        return Prefix(length, tuple((keys.clone(), values.clone()) for keys, values in pairs))

    def paste(self, slot: int, prefix: Prefix) -> None:
        """Put such columns at the beginning of a slot."""
        self.reserve(slot + 1, prefix.length)
        for held, copied in zip(self.layers, prefix.layers, strict=True):
            for tensor, part in zip(held, copied, strict=True):
                tensor[slot, :, : prefix.length] = part

    def move(self, source: int, target: int, length: int) -> None:
        """Let a slot hold the first columns of another one."""
        for tensor in (tensor for layer in self.layers for tensor in layer):
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Leave no number in a slot; NaN behind a mask is NaN."""
        for tensor in (tensor for layer in self.layers for tensor in layer):
            tensor[slot] = 0

    def drop(self, num_slots: int) -> None:
        """Give the memory back and begin anew with so many slots."""
        self.num_slots, self.slots, self.columns, self.layers = num_slots, 0, 0, []
        self.version += 1

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        # zeros: what is masked has to be a number
        return like.new_zeros(self.slots, heads, self.columns, width)

    def _grown(self, tensor: Tensor) -> Tensor:
        grown = self._empty(tensor)
        grown[: len(tensor), :, : tensor.shape[2]] = tensor
        return grown
