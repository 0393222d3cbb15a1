"""Form and colour apart: shapes of which one of the two has a name, and says nothing of the other.

Each shape lacks a colour in training. A model that meets both together before it can tell forms
learns that green means "not a circle"; here it meets every form in paints like none of the six
colours, grays among them, and every colour on forms without a name.
"""

from __future__ import annotations

import colorsys
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from vla2cli.world.facts import Facts, Thing
from vla2cli.world.vocabulary import COLOURS, NAMELESS, Colour

NUM_FORMS = 64  # without a name
_HUE_GAP = 0.055  # between a paint and a colour that it is not to be like, in turns
_GRAY = 0.2  # saturation below which a paint has no hue to speak of


def take_apart(facts: Facts, share: float, rng: np.random.Generator) -> Facts:
    """Leave of a share of a clip's shapes the form or the colour."""
    things = tuple(
        _take_apart(thing, rng) if thing.is_shape and rng.random() < share else thing
        for thing in facts.things
    )
    return replace(facts, things=things)


def _take_apart(shape: Thing, rng: np.random.Generator) -> Thing:
    if rng.random() < 0.5:
        return replace(shape, colour=None, paint=mix_paint(rng, COLOURS))
    return replace(shape, name=NAMELESS, form=int(rng.integers(NUM_FORMS)))


def mix_paint(rng: np.random.Generator, unlike: Collection[str]) -> Colour:
    """Draw a colour that is like none of those of COLOURS which are named."""
    while True:
        hue, saturation, value = rng.uniform((0, 0, 0.15), (1, 1, 1)).tolist()
        gaps = (abs((hue - _hue(colour) + 0.5) % 1 - 0.5) for colour in unlike)
        if saturation < _GRAY or all(gap > _HUE_GAP for gap in gaps):
            r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
            return round(255 * r), round(255 * g), round(255 * b)


def _hue(colour: str) -> float:
    return colorsys.rgb_to_hsv(*(channel / 255 for channel in COLOURS[colour]))[0]
