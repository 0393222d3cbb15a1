"""Stages that work at the same time: each in a thread of its own, over a bounded queue.

A stage is an iterator over the items of the one before it. `Ahead` runs one some items ahead of who
takes them, `InTurn` only when one is taken; both end, fail and are closed alike.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

WAIT_S = 0.1  # how long a closed stage may go unnoticed


class Feed(Protocol[T_co]):
    """Where a stage takes its items from."""

    @property
    def is_over(self) -> bool:
        """Whether the last item was taken."""

    def take(self, *, wait: bool = True) -> T_co | None:
        """Return the next item; None where none is ready and `wait` is off, or at the end.

        Raises:
            BaseException: what the stage ended with.
        """

    def close(self) -> None:
        """End the stage; what it has ready is lost."""

    def __iter__(self) -> Iterator[T_co]:
        """Take all items."""


class InTurn(Generic[T]):
    """A stage that works when it is asked for an item; its methods are those of `Feed`."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self.is_over = False

    def take(self, *, wait: bool = True) -> T | None:
        """Make the next item."""
        item = None
        try:
            if not self.is_over:
                item = next(self._items, None)
        finally:
            self.is_over |= item is None
        return item

    def close(self) -> None:
        """End the stage."""
        self.is_over = True
        close = getattr(self._items, "close", None)
        if close:
            close()

    def __iter__(self) -> Iterator[T]:
        """Take all items."""
        while (item := self.take()) is not None:
            yield item


class _End:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Ahead(Generic[T]):
    """A stage that works in a thread of its own; its methods are those of `Feed`.

    Args:
        items: the stage.
        size: items that may be ready; more are not made.
        name: of the thread.
    """

    def __init__(self, items: Iterator[T], size: int, name: str) -> None:
        self._items = items
        self._ready: queue.Queue[T | _End] = queue.Queue(size)
        self._is_closed = threading.Event()
        self.is_over = False
        # a daemon: what nobody closed must not keep the interpreter from ending
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def take(self, *, wait: bool = True) -> T | None:
        """Take the next item."""
        if self.is_over:
            return None
        item = self._get(wait)
        if item is None:
            return None
        if not isinstance(item, _End):
            return item
        self.is_over = True
        if item.error is not None:
            raise item.error
        return None

    def _get(self, wait: bool) -> T | _End | None:
        while not self._is_closed.is_set():
            try:
                return self._ready.get(block=wait, timeout=WAIT_S)
            except queue.Empty:
                if not wait:
                    break
        return None

    def close(self) -> None:
        """End the thread after the item in hand."""
        self._is_closed.set()
        self.is_over = True
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        """Take all items."""
        while (item := self.take()) is not None:
            yield item

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
            self._put(_End())
        except BaseException as error:  # whoever takes the items is told
            self._put(_End(error))
        finally:
            InTurn(self._items).close()

    def _put(self, item: T | _End) -> bool:
        while not self._is_closed.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=WAIT_S)
                return True
        return False


class Cores:
    """The processor's cores, divided between those who compute at the same moment.

    A product that waits for a thread which has no core costs more than one with a single thread.

    Args:
        num_others: tells how many other processes compute, as a rule.
        is_shared: False: nothing is divided, as where a GPU computes.
    """

    def __init__(self, num_others: Callable[[], int], *, is_shared: bool) -> None:
        self.is_shared = is_shared
        self._count_others = num_others
        self._lock = threading.Lock()
        self._num_active = 0
        self._num_cores = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Compute with this thread's share of the cores."""
        import torch

        if not self.is_shared:
            yield
            return
        with self._lock:
            # the first look is before anybody's share was set
            self._num_cores = self._num_cores or torch.get_num_threads()
            self._num_active += 1
            share = self._num_cores // (self._num_active + self._count_others())
        torch.set_num_threads(max(1, share))
        try:
            yield
        finally:
            with self._lock:
                self._num_active -= 1
                if not self._num_active:  # a thread begins with what was set last, in any thread
                    torch.set_num_threads(self._num_cores)
