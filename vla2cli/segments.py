"""Long files cut into segments of one length, each an item of its own.

Of 100 s, with a segment every 30 s, [0, 30), [30, 60), [60, 90) and [90, 100) are made. A rest of
less than a tenth of a segment joins the last one, and what is not longer than one stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise

from vla2cli.errors import InputError
from vla2cli.inputs import Item
from vla2cli.media.pool import DecodePool, Probe
from vla2cli.plan import Sampling, outcome

_LEAST = 0.1  # of the length: a shorter rest is no segment of its own


def cut_items(
    items: Sequence[Item], sampling: Sampling, pool: DecodePool
) -> tuple[list[Item], dict[str, InputError]]:
    """Cut each item, or the range of it that is asked about, into segments of `sampling.every_s`.

    Pictures stay whole, and so does what is not longer than a segment, what does not tell its
    length, and what cannot be read. That is not to be decoded: a record of the whole of a long file
    would hide that it was never cut.

    Args:
        items: their kinds settled.
        sampling: where nothing is to be cut, all items stay as they are.
        pool: looks how long the files are, many at once.

    Returns:
        The segments in the order of the items, the ends between them in whole milliseconds; and
        path -> what is wrong with a file that cannot be read.
    """
    if sampling.every_s is None:
        return list(items), {}
    probes: dict[tuple[str, str], Future[Probe]] = {}
    for file in (_file_of(item, sampling) for item in items if item.kind != "image"):
        if file not in probes:
            probes[file] = pool.submit_probe(*file)
    cut: list[Item] = []
    unreadable: dict[str, InputError] = {}
    for item in items:
        probe = probes.get(_file_of(item, sampling))
        found = None
        if probe is not None:
            found = outcome(probe)
        if isinstance(found, InputError):
            unreadable[item.path] = found
            cut.append(item)
        else:
            cut += _cut(item, sampling.range_of(item), _length_s(found), sampling.every_s)
    return cut, unreadable


def _file_of(item: Item, sampling: Sampling) -> tuple[str, str]:
    return item.path, "audio" if sampling.medium_of(item) == "audio" else item.kind


def _length_s(found: Probe | None) -> float:
    if found is None:
        return 0.0
    # a range of a video is counted in frames: its times may run differently
    return found.num_total / found.fps if found.fps else found.duration_s


def _cut(
    item: Item, range_s: tuple[float | None, float | None], length_s: float, every_s: float
) -> list[Item]:
    start_s = range_s[0] or 0.0
    end_s = round(length_s, 3) if range_s[1] is None else min(range_s[1], round(length_s, 3))
    ends = _ends(start_s, end_s, every_s)
    if len(ends) <= 2:
        return [item]
    return [replace(item, start_s=a, end_s=b) for a, b in pairwise(ends)]


def _ends(start_s: float, end_s: float, every_s: float) -> list[float]:
    num = math.floor((end_s - start_s) / every_s + 1 - _LEAST)
    return [start_s, *(round(start_s + i * every_s, 3) for i in range(1, num)), end_s]
