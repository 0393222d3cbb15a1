"""Crowded still pictures, and what each of their patches shows: what the vision tower learns from.

Nothing in them is a combination that is held out.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vla2cli.world.facts import Thing, draw_thing, is_held_out_shape
from vla2cli.world.picture import draw_background, draw_frame, draw_silhouette
from vla2cli.world.staging import Placed
from vla2cli.world.vocabulary import COLOURS, OBJECTS, SCENES, SHAPES

# a patch's kind and colour count from 1; 0 is the background, and an object's own colours
KINDS = (*OBJECTS, *SHAPES)
COLOUR_NAMES = tuple(COLOURS)
SCENE_NAMES = tuple(SCENES)

_NUM_THINGS = (2, 7)
_SIZE = (0.16, 0.5)
_APART = 0.45  # of two sizes together: boxes may touch, the middle of each stays free
_TRIES = 60
UNNAMED = -100  # what torch's losses leave out
# a painted shape keeps this far from the hue in which it is held out, in turns
_HUE_GAP = 0.085
_COVERED = 0.3  # of a patch, from which on it shows a thing


@dataclass(frozen=True)
class Crowd:
    """A still picture with several things, and what is in each of its patches."""

    frame: NDArray[np.uint8]  # (side, side, 3) RGB
    kinds: NDArray[np.int64]  # (grid, grid) of KINDS, from 1; 0 where there is background
    # (grid, grid) of COLOUR_NAMES, from 1; 0 for none, UNNAMED for a colour without a name
    colours: NDArray[np.int64]
    centres: NDArray[np.int64]  # (grid, grid), 1 where the centre of a thing is
    scene: int  # of SCENE_NAMES


def draw_crowd(seed: int, index: int, side: int, grid: int, painted: float = 0.0) -> Crowd:
    """Draw the picture with an index in a seed's collection.

    Args:
        seed: of the collection.
        index: of the picture in it.
        side: of the picture, in pixels; a multiple of `grid`.
        grid: patches in a row.
        painted: share of the shapes that are in a colour without a name.
    """
    rng = np.random.default_rng([seed, index])
    scene = int(rng.integers(len(SCENE_NAMES)))
    placed = _place(rng)
    if painted:
        placed = [_paint(item, rng) if rng.random() < painted else item for item in placed]
    frame = draw_frame(draw_background(SCENE_NAMES[scene], side, rng), placed)
    kinds, colours, centres = np.zeros((3, grid, grid), np.int64)
    patch = side // grid
    most = np.full((grid, grid), _COVERED)
    for item in placed:
        covered = draw_silhouette(item, side).reshape(grid, patch, grid, patch).mean((1, 3))
        is_shown = covered > most
        most = np.maximum(most, covered)
        kinds[is_shown] = KINDS.index(item.thing.name) + 1
        colours[is_shown] = _number_colour(item)
        centres[int(item.y * grid), int(item.x * grid)] = 1
    return Crowd(frame, kinds, colours, centres, scene)


def _place(rng: np.random.Generator) -> list[Placed]:
    placed: list[Placed] = []
    wanted = int(rng.integers(*_NUM_THINGS))
    for _ in range(_TRIES):
        size = float(rng.uniform(*_SIZE))
        x, y = rng.uniform(size / 2, 1 - size / 2, 2).tolist()
        if len(placed) < wanted and all(
            max(abs(x - p.x), abs(y - p.y)) > _APART * (size + p.size) for p in placed
        ):
            placed.append(Placed(_draw_seen(rng), x, y, size))
    return placed


def _number_colour(item: Placed) -> int:
    if item.paint is not None:
        return UNNAMED
    return COLOUR_NAMES.index(item.thing.colour) + 1 if item.thing.colour else 0


def _paint(item: Placed, rng: np.random.Generator) -> Placed:
    """Give a shape any colour but those near its held-out one, so that colours do not tell shapes.

    Where each shape lacks one of few colours, the other shapes of that colour are a better guess
    than the right one, and a tower learns to make it.
    """
    if not item.thing.is_shape:
        return item
    held_out = next(c for c in COLOURS if is_held_out_shape(Thing(item.thing.name, c)))
    avoided, *_ = colorsys.rgb_to_hsv(*(channel / 255 for channel in COLOURS[held_out]))
    hue = (avoided + rng.uniform(_HUE_GAP, 1 - _HUE_GAP)) % 1
    channels = colorsys.hsv_to_rgb(hue, *rng.uniform(0.3, 1.0, 2))
    r, g, b = (round(255 * channel) for channel in channels)
    return replace(item, paint=(r, g, b))


def _draw_seen(rng: np.random.Generator) -> Thing:
    while is_held_out_shape(thing := draw_thing(rng)):
        pass
    return thing
