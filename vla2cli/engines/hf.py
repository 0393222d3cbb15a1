"""The language model on transformers' own layers, where a row that ends gives up its place at once.

    waiting ── prefill, several alike at a time ──> rows ── a token each, all together ──> ready

Prompts that begin alike are read once up to where they differ. What a row says comes from its own
slot and position alone, so that its ids in float32 are those of the same prompt by itself.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from vla2cli.console import say_once
from vla2cli.engines.base import Request, Result, Scores
from vla2cli.engines.passes import Passes
from vla2cli.engines.rows import Row, take_tokens
from vla2cli.engines.slots import Prefix
from vla2cli.errors import is_out_of_memory

ALIKE = 1.25  # prompts are read together when the longest is at most so many times the shortest
AHEAD = 2  # times the rows: so many requests are taken in, to find alike ones among them


class HFEngine:
    """A causal language model of transformers; its methods are those of `LanguageEngine`.

    Args:
        model: Mistral, Mixtral or Qwen2, on one device or spread over several.
        num_rows: prompts that are worked on together.
        device: where prompts come from; by default the model's.
        say: told when memory does not suffice for so many.
    """

    name = "hf"

    def __init__(
        self,
        model: PreTrainedModel,
        num_rows: int,
        *,
        device: torch.device | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.num_rows = num_rows
        self.num_steps = 0  # passes in which each row said a token
        self.num_columns = 0  # positions that were looked back at in them, of all rows
        self._say_fewer = say_once(say)
        self._passes = Passes(model, num_rows, device or model.device, say)
        self._waiting: deque[Row] = deque()
        self._suspects: deque[Row] = deque()  # one of them fails: each is tried alone
        self._rows: list[Row] = []  # row i is in slot i
        self._prefixes: OrderedDict[Hashable, Prefix] = OrderedDict()
        self._num_tickets = 0

    @property
    def num_open(self) -> int:
        """Requests whose result has not come back yet."""
        return len(self._rows) + len(self._waiting) + len(self._suspects)

    @property
    def num_wanted(self) -> int:
        """Requests that it could take in now."""
        return max(0, AHEAD * self.num_rows - self.num_open)

    def submit(self, request: Request) -> int:
        """Take a request; the number that comes back stands beside its result."""
        self._num_tickets += 1
        row = Row(self._num_tickets, request)
        if self._start_of(row):  # the sooner it is over, the sooner its beginning is forgotten
            self._waiting.appendleft(row)
        else:
            self._waiting.append(row)
        return self._num_tickets

    def drop_waiting(self) -> None:
        """Forget the requests that were not begun, or are to be begun anew."""
        self._waiting.clear()
        self._suspects.clear()

    def release(self, key: Hashable) -> None:
        """Forget a shared beginning."""
        self._prefixes.pop(key, None)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Result]]:
        """Fill the free slots, then let each row say one token; return what has become ready.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        begun: list[Row] = []
        ready: list[tuple[int, Result]] = []
        try:
            while begun := self._next_alike():
                ready += self._begin(begun)
            return ready + self._go_on()
        except Exception as error:  # one prompt must not end the others
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise  # every further call would fail as well
            return ready + self._recover(error, begun)

    def _next_alike(self) -> list[Row]:
        """Take prompts off the queue that are read together: the first, and those like it."""
        if self._suspects:
            return [] if self._rows else [self._suspects.popleft()]
        num_free = self.num_rows - len(self._rows)
        if not self._waiting or not num_free:
            return []
        first = self._waiting[0]
        alike: list[Row] = []
        beginnings: set[Hashable] = set()
        for row in self._waiting:
            if row.shared_key is not None and not self._start_of(row):
                # of prompts with one beginning the first is read by itself, then the others
                if row.shared_key in beginnings:
                    continue
                beginnings.add(row.shared_key)
            if self._is_alike(row, first):
                alike.append(row)
            if len(alike) == num_free:
                break
        for row in alike:
            self._waiting.remove(row)
        return alike

    def _is_alike(self, row: Row, first: Row) -> bool:
        short, long = sorted((row.num_prompt, first.num_prompt))
        return (
            self._start_of(row) == self._start_of(first)
            and row.is_weighed == first.is_weighed
            and long <= ALIKE * short
        )

    def _start_of(self, row: Row) -> int:
        """Return how much of a prompt was read for another one."""
        prefix = self._prefixes.get(row.shared_key)
        return prefix.length if prefix else 0

    def _begin(self, rows: Sequence[Row]) -> list[tuple[int, Result]]:
        """Read prompts and go on from each; return the results of those that are over with that."""
        with self._timed(rows, "prefill_s"):
            logits = self._prefill(rows)
        for row, of_row in zip(rows, logits, strict=True):
            row.first_logits = of_row
        if rows[0].is_weighed:
            return self._weigh(rows)
        with self._timed(rows, "generate_s"):
            take_tokens(rows, logits)
        self._rows += rows
        return self._leave()

    def _prefill(self, rows: Sequence[Row]) -> Tensor:
        """Read prompts into the slots behind the rows; return (B, V) logits."""
        slot = len(self._rows)
        start = self._start_of(rows[0])
        for i, row in enumerate(rows if start else ()):
            self._passes.cache.paste(slot + i, self._prefixes[row.shared_key])
        logits = self._passes.prefill(slot, [row.request.inputs_embeds for row in rows], start)
        for i, row in enumerate(rows):
            shared = row.request.shared
            if shared is not None and not start:
                self._prefixes[shared.key] = self._passes.cache.copy(slot + i, shared.length)
        while len(self._prefixes) > AHEAD * self.num_rows:  # who comes too late is read whole
            self._prefixes.popitem(last=False)
        return logits

    def _weigh(self, rows: Sequence[Row]) -> list[tuple[int, Result]]:
        """Score the options of prompts that were just read."""
        slot = len(self._rows)
        with self._timed(rows, "generate_s"):
            scores = self._passes.weigh(
                slot,
                [row.num_prompt for row in rows],
                [row.request.options for row in rows],
                torch.stack([row.logits for row in rows]),
            )
        for i, of_row in enumerate(scores):
            if not all(map(math.isfinite, of_row)):
                self._passes.cache.clear(slot + i)
        return [
            (row.ticket, Scores(of_row, row.logits, row.prefill_s, row.generate_s))
            for row, of_row in zip(rows, scores, strict=True)
        ]

    def _go_on(self) -> list[tuple[int, Result]]:
        """Let each row say one more token."""
        if not self._rows:
            return []
        with self._timed(self._rows, "generate_s"):
            logits = self._passes.decode(
                [row.ids[-1] for row in self._rows],
                [row.num_read for row in self._rows],
            )
            take_tokens(self._rows, logits)
        self.num_steps += 1
        self.num_columns += sum(row.num_read for row in self._rows)
        return self._leave()

    def _leave(self) -> list[tuple[int, Result]]:
        """Take the rows that are over out of their slots; the last ones move up."""
        ready: list[tuple[int, Result]] = []
        for slot in reversed(range(len(self._rows))):
            row = self._rows[slot]
            if row.reason is None:
                continue
            ready.append((row.ticket, row.result()))
            if not row.is_finite:
                self._passes.cache.clear(slot)
            last = self._rows.pop()
            if last is not row:
                self._rows[slot] = last
                self._passes.cache.move(len(self._rows), slot, last.num_read)
        return ready[::-1]

    def _recover(self, error: Exception, begun: Sequence[Row]) -> list[tuple[int, Result]]:
        """Begin anew with the prompts in hand: fewer at a time, or each alone."""
        inside = self._rows + [row for row in begun if row not in self._rows]
        again = [Row(row.ticket, row.request, row.num_failed + 1) for row in inside]
        self._rows = []
        self._prefixes.clear()
        is_memory = is_out_of_memory(error)
        has_room = is_memory and self.num_rows > 1
        if has_room:
            self.num_rows //= 2
            self._say_fewer(
                f"out of memory: going on with {self.num_rows} prompts at a time, or fewer"
            )
        self._passes.drop(self.num_rows)
        if is_memory and self._passes.device.type == "cuda":
            torch.cuda.empty_cache()
        # memory may have been taken by another stage for a moment
        may_try = is_memory and (has_room or again[0].num_failed == 1)
        if len(again) == 1 and not may_try:
            # its traceback would hold the tensors of the pass for as long as somebody holds it
            return [(again[0].ticket, error.with_traceback(None))]
        if is_memory:
            self._waiting.extendleft(reversed(again))
        else:
            self._suspects.extend(again)
        return []

    @contextmanager
    def _timed(self, rows: Sequence[Row], name: str) -> Iterator[None]:
        """Add to each row its share of the time that this takes."""
        started = time.perf_counter()
        yield
        if self._passes.device.type == "cuda":  # it has only been told what to do
            torch.cuda.synchronize(self._passes.device)
        share_s = (time.perf_counter() - started) / len(rows)
        for row in rows:
            setattr(row, name, getattr(row, name) + share_s)
