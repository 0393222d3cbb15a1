"""Crowded still pictures, and what each of their patches shows: what the vision tower learns from.

Nothing in them is a combination that is held out. Each shape lacks one of few colours, though, so
that a tower which is told the shapes in those colours takes the colour for a sign of the others.
There it is told that something is a shape, and not which; forms are learned from shapes in colours
that all of them have, and in paints unlike every colour that one of them lacks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vla2cli.world.apart import mix_paint
from vla2cli.world.facts import LACKED_COLOURS, Thing, draw_thing, is_held_out_shape
from vla2cli.world.picture import draw_background, draw_frame, draw_silhouette
from vla2cli.world.staging import Placed
from vla2cli.world.vocabulary import COLOURS, OBJECTS, SCENES, SHAPES

SHAPE = "shape"
# a patch's kind and colour count from 1; 0 is the background, and an object's own colours
KINDS = (*OBJECTS, SHAPE)
SHAPE_NAMES = tuple(SHAPES)
COLOUR_NAMES = tuple(COLOURS)
SCENE_NAMES = tuple(SCENES)
UNNAMED = -100  # what torch's losses leave out

_NUM_THINGS = (2, 7)
_SHAPE_SHARE = 0.5  # among the things; a clip has fewer
_PAINTED_SHARE = 0.6  # of the shapes
_SIZE = (0.16, 0.5)
_APART = 0.45  # of two sizes together: boxes may touch, the middle of each stays free
_TRIES = 60
_COVERED = 0.3  # of a patch, from which on it shows a thing


@dataclass(frozen=True)
class Crowd:
    """A still picture with several things, and what is in each of its patches."""

    frame: NDArray[np.uint8]  # (side, side, 3) RGB
    kinds: NDArray[np.int64]  # (grid, grid) of KINDS, from 1; 0 where there is background
    shapes: NDArray[np.int64]  # (grid, grid) of SHAPE_NAMES, from 0; UNNAMED where none is told
    # (grid, grid) of COLOUR_NAMES, from 1; 0 for none, UNNAMED for a paint
    colours: NDArray[np.int64]
    centres: NDArray[np.int64]  # (grid, grid), 1 where the centre of a thing is
    scene: int  # of SCENE_NAMES


def draw_crowd(seed: int, index: int, side: int, grid: int) -> Crowd:
    """Draw the picture with an index in a seed's collection.

    Args:
        seed: of the collection.
        index: of the picture in it.
        side: of the picture, in pixels; a multiple of `grid`.
        grid: patches in a row.
    """
    rng = np.random.default_rng([seed, index])
    scene = int(rng.integers(len(SCENE_NAMES)))
    placed = _place(rng)
    frame = draw_frame(draw_background(SCENE_NAMES[scene], side, rng), placed)
    kinds, colours, centres = np.zeros((3, grid, grid), np.int64)
    shapes = np.full((grid, grid), UNNAMED)
    patch = side // grid
    most = np.full((grid, grid), _COVERED)
    for item in placed:
        covered = draw_silhouette(item, side).reshape(grid, patch, grid, patch).mean((1, 3))
        is_shown = covered > most
        most = np.maximum(most, covered)
        kinds[is_shown], shapes[is_shown], colours[is_shown] = _label(item.thing)
        centres[int(item.y * grid), int(item.x * grid)] = 1
    return Crowd(frame, kinds, shapes, colours, centres, scene)


def _label(thing: Thing) -> tuple[int, int, int]:
    """Tell a thing's kind, shape and colour, as far as they are to be told."""
    if not thing.is_shape:
        return KINDS.index(thing.name) + 1, UNNAMED, 0
    return (
        KINDS.index(SHAPE) + 1,
        UNNAMED if thing.colour in LACKED_COLOURS else SHAPE_NAMES.index(thing.name),
        COLOUR_NAMES.index(thing.colour) + 1 if thing.colour else UNNAMED,
    )


def _place(rng: np.random.Generator) -> list[Placed]:
    placed: list[Placed] = []
    wanted = int(rng.integers(*_NUM_THINGS))
    for _ in range(_TRIES):
        size = float(rng.uniform(*_SIZE))
        x, y = rng.uniform(size / 2, 1 - size / 2, 2).tolist()
        if len(placed) < wanted and all(
            max(abs(x - p.x), abs(y - p.y)) > _APART * (size + p.size) for p in placed
        ):
            thing = _draw_seen(rng)
            if thing.is_shape and rng.random() < _PAINTED_SHARE:
                thing = replace(thing, colour=None, paint=mix_paint(rng, LACKED_COLOURS))
            placed.append(Placed(thing, x, y, size))
    return placed


def _draw_seen(rng: np.random.Generator) -> Thing:
    while is_held_out_shape(thing := draw_thing(rng, _SHAPE_SHARE)):
        pass
    return thing
