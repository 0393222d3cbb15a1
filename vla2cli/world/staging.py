"""Facts -> where everything is at each moment: how a clip is acted, before it is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla2cli.world.facts import Facts, Thing

# sizes and positions are shares of the picture's side; y grows downwards
_SIZE = (0.28, 0.42)
_COUNTED_SIZE = (0.18, 0.24)
_SMALL, _LARGE = (0.16, 0.22), (0.44, 0.56)
# place -> the middle of where its subjects stand
_SPOTS = {
    "left": (0.22, 0.5),
    "right": (0.78, 0.5),
    "top": (0.5, 0.22),
    "bottom": (0.5, 0.78),
    "middle": (0.5, 0.5),
}
_SPREAD = 0.06  # about a spot
_TRIES = 200  # at placing several things, before it begins anew
_START = 0.1  # how far from the edge a motion may begin or end, beyond the subject itself


@dataclass(frozen=True)
class Placed:
    """One thing at one moment."""

    thing: Thing
    x: float  # centre
    y: float
    size: float


@dataclass(frozen=True)
class Act:
    """One thing's way through the clip, straight from its first state to its last."""

    thing: Thing
    start: tuple[float, float, float]  # x, y, size
    end: tuple[float, float, float]
    appears: float = 0.0  # share of the clip
    leaves: float = 1.0

    def at(self, moment: float) -> Placed | None:
        """Say where the thing is at a share of the clip from 0 to 1, or None where it is not."""
        if not self.appears <= moment <= self.leaves:
            return None
        x, y, size = (a + (b - a) * moment for a, b in zip(self.start, self.end, strict=True))
        return Placed(self.thing, x, y, size)


def stage(facts: Facts, rng: np.random.Generator) -> tuple[Act, ...]:
    """Choose sizes, places and ways that make the facts true."""
    if facts.plot == "moves":
        return (_move(facts, rng),)
    if facts.plot == "stands":
        assert facts.place is not None
        x, y = (float(c + rng.uniform(-_SPREAD, _SPREAD)) for c in _SPOTS[facts.place])
        return (_still(facts.things[0], x, y, float(rng.uniform(*_SIZE))),)
    if facts.plot == "count":
        return _count(facts, rng)
    switch = float(rng.uniform(0.42, 0.58))
    first, second = facts.things
    return (_appear(first, rng, 0.0, switch), _appear(second, rng, switch, 1.0))


def placed_at(acts: tuple[Act, ...], moment: float) -> list[Placed]:
    """List what is seen at a share of the clip from 0 to 1."""
    return [placed for act in acts if (placed := act.at(moment)) is not None]


def _move(facts: Facts, rng: np.random.Generator) -> Act:
    thing = facts.things[0]
    if facts.motion in ("grows", "shrinks"):
        x, y = rng.uniform(0.35, 0.65, 2).tolist()
        states = [(x, y, float(rng.uniform(*_SMALL))), (x, y, float(rng.uniform(*_LARGE)))]
        start, end = states if facts.motion == "grows" else states[::-1]
        return Act(thing, start, end)
    size = float(rng.uniform(*_SIZE))
    near, far = size / 2 + rng.uniform(0, _START), 1 - size / 2 - rng.uniform(0, _START)
    across = float(rng.uniform(size / 2, 1 - size / 2))
    begin, finish = (near, far) if facts.motion in ("right", "down") else (far, near)
    if facts.motion in ("left", "right"):
        return Act(thing, (float(begin), across, size), (float(finish), across, size))
    return Act(thing, (across, float(begin), size), (across, float(finish), size))


def _count(facts: Facts, rng: np.random.Generator) -> tuple[Act, ...]:
    size = float(rng.uniform(*_COUNTED_SIZE))
    centres: list[tuple[float, float]] = []
    tries = 0
    while len(centres) < facts.number:
        tries += 1
        if tries % _TRIES == 0:  # the first may stand so that there is no room for the last
            centres.clear()
        x, y = rng.uniform(size / 2, 1 - size / 2, 2).tolist()
        # a gap between the boxes, so that each can be told from its neighbour
        if all(max(abs(x - a), abs(y - b)) > 1.1 * size for a, b in centres):
            centres.append((x, y))
    return tuple(_still(facts.things[0], x, y, size) for x, y in centres)


def _appear(thing: Thing, rng: np.random.Generator, appears: float, leaves: float) -> Act:
    size = float(rng.uniform(*_SIZE))
    x, y = rng.uniform(size / 2, 1 - size / 2, 2).tolist()
    return Act(thing, (x, y, size), (x, y, size), appears, leaves)


def _still(thing: Thing, x: float, y: float, size: float) -> Act:
    return Act(thing, (x, y, size), (x, y, size))
