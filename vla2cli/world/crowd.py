"""Crowded still pictures, and what each of their patches shows: what the vision tower learns from.

Nothing in them is a combination that is held out.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vla2cli.world.facts import Thing, draw_thing, is_held_out_shape
from vla2cli.world.picture import draw_background, draw_frame, draw_silhouette
from vla2cli.world.staging import Placed, Stripes
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
_HUE_GAP = 0.33  # between the two colours of stripes, in turns
_NUM_STRIPES = (2.5, 6.0)  # enough that neither colour is most of a thing
_GRAY_SHARE = 0.25  # of the pictures, where shapes are striped
_COVERED = 0.3  # of a patch, from which on it shows a thing


@dataclass(frozen=True)
class Crowd:
    """A still picture with several things, and what is in each of its patches."""

    frame: NDArray[np.uint8]  # (side, side, 3) RGB
    # both UNNAMED where it is not to be told
    kinds: NDArray[np.int64]  # (grid, grid) of KINDS, from 1; 0 where there is background
    colours: NDArray[np.int64]  # (grid, grid) of COLOUR_NAMES, from 1; 0 for none
    centres: NDArray[np.int64]  # (grid, grid), 1 where the centre of a thing is
    scene: int  # of SCENE_NAMES


def draw_crowd(seed: int, index: int, side: int, grid: int, striped: float = 0.0) -> Crowd:
    """Draw the picture with an index in a seed's collection.

    Args:
        seed: of the collection.
        index: of the picture in it.
        side: of the picture, in pixels; a multiple of `grid`.
        grid: patches in a row.
        striped: share of the shapes that have two colours. Where it is not 0, these and those of
            gray pictures alone are to be told apart, and the others' colours: each shape lacks one
            of few colours, so that of a shape in that colour any other is a better guess than the
            right one, and a tower that may learn to make it does.
    """
    rng = np.random.default_rng([seed, index])
    scene = int(rng.integers(len(SCENE_NAMES)))
    placed = _place(rng)
    if striped:
        placed = [_stripe(item, rng) if rng.random() < striped else item for item in placed]
    frame = draw_frame(draw_background(SCENE_NAMES[scene], side, rng), placed)
    is_gray = bool(striped) and rng.random() < _GRAY_SHARE
    if is_gray:
        frame = _as_gray(frame, rng)
    kinds, colours, centres = np.zeros((3, grid, grid), np.int64)
    patch = side // grid
    most = np.full((grid, grid), _COVERED)
    for item in placed:
        covered = draw_silhouette(item, side).reshape(grid, patch, grid, patch).mean((1, 3))
        is_shown = covered > most
        most = np.maximum(most, covered)
        hides_colour = is_gray or item.stripes is not None
        is_told = not striped or hides_colour or not item.thing.is_shape
        kinds[is_shown] = KINDS.index(item.thing.name) + 1 if is_told else UNNAMED
        colour = item.thing.colour
        number = COLOUR_NAMES.index(colour) + 1 if colour else 0
        colours[is_shown] = UNNAMED if hides_colour else number
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


def _as_gray(frame: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Take the colours out of a picture, and what of them is left in the brightness."""
    brightness = frame.astype(np.float32) @ np.array([0.3, 0.59, 0.11], np.float32)
    gray = (brightness * rng.uniform(0.5, 1.4)).clip(0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _stripe(item: Placed, rng: np.random.Generator) -> Placed:
    """Give a shape two colours far apart, whatever shape it is; objects stay as they are."""
    if not item.thing.is_shape:
        return item
    hue = rng.random()
    hues = hue, (hue + rng.uniform(_HUE_GAP, 1 - _HUE_GAP)) % 1
    first, second = (_colour(h, *rng.uniform(0.3, 1.0, 2).tolist()) for h in hues)
    angle, number = rng.uniform(0, math.pi), rng.uniform(*_NUM_STRIPES)
    return replace(item, stripes=Stripes(first, second, float(angle), float(number)))


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)


def _draw_seen(rng: np.random.Generator) -> Thing:
    while is_held_out_shape(thing := draw_thing(rng)):
        pass
    return thing
