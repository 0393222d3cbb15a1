"""Look into a folder for a few seconds: what it holds, what cannot be read, what is there twice.

Of many files a sample is looked into; it depends on nothing but the files.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TypeVar

from vla2cli.errors import InputError
from vla2cli.inputs import Item
from vla2cli.media.pool import DecodePool
from vla2cli.media.records import Probe
from vla2cli.plan import outcome

MAX_PROBED = 500  # files
MAX_HASHED_BYTES = 2 * 10**9
LIMIT_S = 5.0  # for each of the two, whatever the disk
GOLDEN_RATIO = (5**0.5 - 1) / 2

T = TypeVar("T")
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Survey:
    """What is known of some files; all keys are ids."""

    items: tuple[Item, ...]
    sizes: Mapping[str, int]  # bytes, of all that can be asked for it
    probes: Mapping[str, Probe]  # of those that were looked into and can be read
    unreadable: Mapping[str, InputError]  # the others of them
    duplicates: tuple[tuple[str, ...], ...]  # ids of files with the same content
    uncompared: tuple[str, ...]  # as large as another file, and not read

    @property
    def num_probed(self) -> int:
        """Files that were looked into."""
        return len(self.probes) + len(self.unreadable)

    @property
    def num_unreadable(self) -> int:
        """Files that cannot be read; estimated where not all were looked into."""
        return round(sum(map(self.chance_unreadable, self.items)))

    def chance_unreadable(self, item: Item) -> float:
        """Say whether a file is known to be unreadable; of others, how likely that is."""
        if item.id in self.probes:
            return 0.0
        if item.id in self.unreadable:
            return 1.0
        return len(self.unreadable) / max(1, self.num_probed)

    @property
    def size_bytes(self) -> int:
        """Sum of all sizes."""
        return sum(self.sizes.values())

    @property
    def duration_s(self) -> float:
        """Of all videos and sounds; estimated, by kind, where not all were looked into."""
        total_s = 0.0
        for kind in ("video", "audio"):
            of_kind = [item for item in self.items if item.kind == kind]
            known = [self.probes[item.id].duration_s for item in of_kind if item.id in self.probes]
            # of those that can be read, known or not, each is as long as the known ones
            num_readable = sum(1 - self.chance_unreadable(item) for item in of_kind)
            total_s += num_readable * sum(known) / max(1, len(known))
        return total_s


def look_into(items: Sequence[Item], pool: DecodePool) -> Survey:
    """Ask all files for their sizes, look into a sample, compare those of the same size."""
    sizes = {item.id: size for item in items if (size := _size_of(item)) is not None}
    probes: dict[str, Probe] = {}
    unreadable: dict[str, InputError] = {}
    chosen = sample(items, sizes)[:MAX_PROBED]
    found = _within_limit(chosen, lambda item: pool.submit_probe(item.path, item.kind))
    for item, probe in zip(chosen, found):
        if isinstance(probe, InputError):
            unreadable[item.id] = probe
        elif probe is not None:
            probes[item.id] = probe
    duplicates, uncompared = _find_duplicates(items, sizes, pool)
    return Survey(tuple(items), sizes, probes, unreadable, duplicates, uncompared)


def sample(items: Sequence[Item], sizes: Mapping[str, int]) -> list[Item]:
    """Order files so that those up to any place stand for all: of each kind and size their share.

    Args:
        items: the files.
        sizes: id -> bytes; those without count as empty.
    """
    return spread(sorted(items, key=lambda item: rank(item, sizes)))


def rank(item: Item, sizes: Mapping[str, int]) -> tuple[str, int, str]:
    """Return a sort key that puts files of one kind and of like sizes beside each other."""
    return item.kind, sizes.get(item.id, 0), item.id


def spread(entries: Sequence[Entry]) -> list[Entry]:
    """Order a list so that the entries up to any place lie evenly over all of it.

    Source: the multiples of the golden ratio, modulo 1, leave gaps of three lengths at most
    (V. T. Sós 1958), so do the places whose multiples lie below any bound.
    """
    order = sorted(range(len(entries)), key=lambda place: (place + 1) * GOLDEN_RATIO % 1)
    return [entries[place] for place in order]


def _size_of(item: Item) -> int | None:
    try:
        return os.stat(item.path).st_size  # noqa: PTH116 a path may end in a surrogate
    except (OSError, ValueError):
        return None


def _find_duplicates(
    items: Sequence[Item], sizes: Mapping[str, int], pool: DecodePool
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Return the groups of the same content, and what was not read; small files come first."""
    of_size: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        if sizes.get(item.id):  # empty files are unreadable, and named as that
            of_size[sizes[item.id]].append(item)
    alike = [item for size in sorted(of_size) if len(of_size[size]) > 1 for item in of_size[size]]
    chosen: list[Item] = []
    num_bytes = 0
    for item in alike:
        num_bytes += sizes[item.id]
        if num_bytes > MAX_HASHED_BYTES:
            break
        chosen.append(item)
    found = _within_limit(chosen, lambda item: pool.submit_hash(item.path))
    of_content: dict[str, list[str]] = defaultdict(list)
    for item, state in zip(chosen, found):
        if state is not None and not isinstance(state, InputError):
            of_content[state.sha256].append(item.id)
    seen = {item.id for item, state in zip(chosen, found) if state is not None}
    groups = tuple(tuple(ids) for ids in of_content.values() if len(ids) > 1)
    return groups, tuple(item.id for item in alike if item.id not in seen)


def _within_limit(
    items: Sequence[Item], submit: Callable[[Item], Future[T]]
) -> list[T | InputError | None]:
    """Return what each file gives, None for those whose turn did not come in time."""
    futures = [submit(item) for item in items]
    found: list[T | InputError | None] = []
    deadline: float | None = None  # from the first answer on: the processes have to start
    for future in futures:
        try:
            if deadline is not None:
                future.exception(max(0.0, deadline - time.monotonic()))
            answer: T | InputError = outcome(future)
            found.append(answer)
        except (TimeoutError, CancelledError):
            future.cancel()
            found.append(None)
        deadline = deadline or time.monotonic() + LIMIT_S
    return found
