"""The facts of one clip, drawn by chance: what a caption of it may say.

A clip is a seed and an index, so that the same command makes the same clips, one by one and in any
order. The splits differ in **combinations**: each object, motion, sound, colour and shape is seen
in training, but some of their pairs only in the held-out split, and each held-out clip has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla2cli.world.vocabulary import (
    COLOURS,
    MOTIONS,
    NUMBERS,
    OBJECTS,
    PLACES,
    PLURALS,
    SCENES,
    SHAPES,
    SOUNDS,
    TIMES,
    Colour,
)

SPLITS = ("train", "heldout")
DURATION_S = 5.0

_OBJECTS, _SHAPES, _COLOURS = list(OBJECTS), list(SHAPES), list(COLOURS)
_MOTIONS, _SOUNDS = list(MOTIONS), list(SOUNDS)
# how often each plot is drawn, and shapes among the things; the rest are emoji
_PLOTS = {"moves": 0.45, "stands": 0.2, "order": 0.2, "count": 0.15}
_SHAPE_SHARE = 0.35
_SILENT_SHARE = 0.2


@dataclass(frozen=True)
class Thing:
    """Something that is seen."""

    name: str  # of OBJECTS or SHAPES, NAMELESS, or a guest's
    colour: str | None = None  # of COLOURS; None for a painted shape and for an object
    paint: Colour | None = None  # of a shape, in the place of a colour that has a name
    form: int | None = None  # of what is NAMELESS: the number of its form
    picture: str | None = None  # file of a guest: an object that the world does not have

    @property
    def is_shape(self) -> bool:
        """Whether it is a shape, in a colour or a paint."""
        return self.name in SHAPES

    @property
    def noun(self) -> str:
        """Name it as a caption does, without an article."""
        return f"{self.colour} {self.name}" if self.colour else self.name

    @property
    def plural(self) -> str:
        """Name several of it."""
        if self.picture is not None:
            return f"{self.name}s"
        plural = PLURALS[self.name]
        return f"{self.colour} {plural}" if self.colour else plural


@dataclass(frozen=True)
class Facts:
    """Everything that is true of a clip and that words may say."""

    plot: str  # moves | stands | order | count
    things: tuple[Thing, ...]  # two for "order", else one
    scene: str  # of SCENES
    motion: str | None = None  # of MOTIONS, for "moves"
    place: str | None = None  # of PLACES, for "stands"
    number: int = 1  # of equal things, for "count"
    sound: str | None = None  # of SOUNDS; None: it is silent
    time: str | None = None  # of TIMES: when the sound is heard


def draw_facts(seed: int, index: int, split: str, guest: Thing | None = None) -> Facts:
    """Draw the facts of a clip.

    Args:
        seed: of the whole collection.
        index: of the clip in it, from 0.
        split: `train` or `heldout`.
        guest: takes the place of the first thing, in every clip.

    Returns:
        For `train`, facts without a held-out combination; for `heldout`, with at least one, unless
        it goes with the thing whose place the guest takes.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    rng = generator(seed, index, split, purpose=0)
    while True:
        facts = _draw(rng)
        if has_held_out(facts) == (split == "heldout"):
            return facts if guest is None else replace(facts, things=(guest, *facts.things[1:]))


def has_held_out(facts: Facts) -> bool:
    """Tell whether a clip has a combination that no training clip has."""
    objects = [thing.name for thing in facts.things if thing.name in OBJECTS]
    return (
        any(is_held_out_shape(thing) for thing in facts.things)
        or any(is_held_out_motion(name, facts.motion) for name in objects)
        or any(is_held_out_sound(name, facts.sound) for name in objects)
    )


def is_held_out_motion(name: str, motion: str | None) -> bool:
    """Tell whether an object never makes this motion in training: one motion of six each."""
    if motion is None:
        return False
    at = _OBJECTS.index(name)
    return (at + at // len(_MOTIONS)) % len(_MOTIONS) == _MOTIONS.index(motion)


def is_held_out_sound(name: str, sound: str | None) -> bool:
    """Tell whether an object is never seen with this sound in training: one sound of ten each."""
    if sound is None:
        return False
    at = _OBJECTS.index(name)
    return (3 * at + at // len(_SOUNDS)) % len(_SOUNDS) == _SOUNDS.index(sound)


def is_held_out_shape(thing: Thing) -> bool:
    """Tell whether a shape never has this colour in training."""
    return thing.is_shape and thing.colour == lacked_colour(thing.name)


def lacked_colour(shape: str) -> str:
    """Name the colour that a shape never has in training: one of six each."""
    return _COLOURS[(_SHAPES.index(shape) + 1) % len(_COLOURS)]


LACKED_COLOURS = frozenset(map(lacked_colour, SHAPES))


def open_words(things: Sequence[Thing]) -> set[str]:
    """List the words that are neither right nor wrong, in training, about clips of these things.

    A pair that training lacks is no reason to deny it, and what is denied is learned long before a
    form is told from another: that green means "not a circle". So of a named shape nothing is said
    about the colour that it lacks, nor of its colour about the shape that lacks it.
    """
    words: set[str] = set()
    for thing in things:
        if thing.is_shape:
            words.add(lacked_colour(thing.name))
            lacking = [shape for shape in SHAPES if lacked_colour(shape) == thing.colour]
            words.update(lacking, (SHAPES[shape] for shape in lacking))
    return words


def generator(seed: int, index: int, split: str, *, purpose: int) -> np.random.Generator:
    """Make the generator for one purpose of one clip, so that no purpose moves another's draws."""
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])


def _draw(rng: np.random.Generator) -> Facts:
    plot = str(rng.choice(list(_PLOTS), p=list(_PLOTS.values())))
    first, second = draw_thing(rng), draw_thing(rng)
    while second.name == first.name:
        second = draw_thing(rng)
    sound = None if rng.random() < _SILENT_SHARE else str(rng.choice(_SOUNDS))
    return Facts(
        plot=plot,
        things=(first, second) if plot == "order" else (first,),
        scene=str(rng.choice(list(SCENES))),
        motion=str(rng.choice(_MOTIONS)) if plot == "moves" else None,
        place=str(rng.choice(list(PLACES))) if plot == "stands" else None,
        number=int(rng.integers(2, len(NUMBERS) + 1)) if plot == "count" else 1,
        sound=sound,
        time=None if sound is None else str(rng.choice(list(TIMES))),
    )


def draw_thing(rng: np.random.Generator, shape_share: float = _SHAPE_SHARE) -> Thing:
    """Draw an object, or a shape of any colour."""
    if rng.random() < shape_share:
        return Thing(str(rng.choice(_SHAPES)), str(rng.choice(_COLOURS)))
    return Thing(str(rng.choice(_OBJECTS)))
