"""The pass that says one token of each row, recorded once and replayed on a GPU.

Such a pass is some thousand small kernels, which take less time than Python takes to start them. A
recording is of fixed sizes and fixed places in memory: there is one for each power of two of rows
and each step of columns, and all are made anew when the slots have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vla2cli.engines.slots import SlotCache

STEP = 256  # columns between two recordings

# makes (B, V) logits of (B, 1) tokens at their (B, 1) positions, looking at so many columns
Decode = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class _Recording:
    graph: Any
    tokens: Tensor
    positions: Tensor
    logits: Tensor


class DecodeGraphs:
    """Recordings of one function over the slots of one cache, made as they are needed.

    Args:
        decode: what is recorded; it may wait for nothing and look at no number on the CPU.
        cache: whose first rows it works on.
        device: a GPU.
    """

    def __init__(self, decode: Decode, cache: SlotCache, device: torch.device) -> None:
        self._decode, self._cache, self._device = decode, cache, device
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._version = -1  # of the cache that they write to
        self._is_warm = False
        self._pool = torch.cuda.graph_pool_handle()  # none needs what another has left there

    def clear(self) -> None:
        """Forget the recordings and give their memory back."""
        self._recordings.clear()

    def __call__(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Decode as the function does; the logits hold until the next call."""
        num_rows = min(1 << (len(tokens) - 1).bit_length(), self._cache.num_slots)
        end = -(-(max(positions) + 1) // STEP) * STEP
        self._cache.reserve(num_rows, end)
        if self._version != self._cache.version:
            self._recordings.clear()
        # rows beside those in use write to column 0 of free slots, which a prompt overwrites
        more = [0] * (num_rows - len(tokens))
        given, places = (torch.tensor([*n, *more])[:, None] for n in (tokens, positions))
        recording = self._recordings.get((num_rows, end))
        if recording is None:
            recording = self._record(given.to(self._device), places.to(self._device), end)
            self._recordings[num_rows, end] = recording
            self._version = self._cache.version
        else:
            recording.tokens.copy_(given)
            recording.positions.copy_(places)
        recording.graph.replay()
        return recording.logits[: len(tokens)]

    def _record(self, tokens: Tensor, positions: Tensor, end: int) -> _Recording:
        if not self._is_warm:
            self._warm_up(tokens, positions, end)
        graph = torch.cuda.CUDAGraph()
        # the encoding thread may do as it likes meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._decode(tokens, positions, end)
        return _Recording(graph, tokens, positions, logits)

    def _warm_up(self, tokens: Tensor, positions: Tensor, end: int) -> None:
        # what libraries set up at their first call cannot be recorded; that it writes the same
        # keys and values as the replay will does no harm
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            self._decode(tokens, positions, end)
        torch.cuda.current_stream(self._device).wait_stream(aside)
        self._is_warm = True
