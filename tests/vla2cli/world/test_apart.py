"""Shapes of which only the form or only the colour has a name."""

import colorsys
import re

import numpy as np
import pytest

from vla2cli.world.apart import NUM_FORMS, mix_paint
from vla2cli.world.clip import WorldClip
from vla2cli.world.facts import Thing, has_held_out, is_held_out_shape
from vla2cli.world.picture import draw_silhouette
from vla2cli.world.staging import Placed
from vla2cli.world.vocabulary import COLOURS, NAMELESS, SHAPES

SEED, NUM_CLIPS = 8, 600


def pairs(share):
    """Each clip as it is, and with a share of its shapes taken apart."""
    for index in range(NUM_CLIPS):
        yield WorldClip(SEED, index, "train"), WorldClip(SEED, index, "train", apart=share)


def things(share):
    for whole, apart in pairs(share):
        yield from zip(whole.facts.things, apart.facts.things, strict=True)


def test_taken_apart_a_shape_keeps_its_form_or_its_colour():
    kept = {"form": 0, "colour": 0}
    for whole, apart in things(1.0):
        if not whole.is_shape:
            assert apart == whole
        elif apart.colour is None:
            assert (apart.name, apart.noun) == (whole.name, whole.name)
            assert apart.paint is not None
            kept["form"] += 1
        else:
            assert (apart.colour, apart.noun) == (whole.colour, f"{whole.colour} {NAMELESS}")
            assert apart.form in range(NUM_FORMS)
            kept["colour"] += 1
    assert min(kept.values()) > 60


def hue_of(paint):
    """In turns; None: nearly gray, of no hue to speak of."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(channel / 255 for channel in paint))
    return hue if saturation >= 0.25 else None


def is_like(hue, colour):
    gap = abs(hue - hue_of(COLOURS[colour]))
    return min(gap, 1 - gap) < 0.05  # turns: 18 degrees


def test_nothing_held_out_gets_into_training_by_it():
    for _, apart in pairs(0.7):
        assert not has_held_out(apart.facts)
        for thing in apart.facts.things:
            if thing.paint is not None and (hue := hue_of(thing.paint)) is not None:
                assert not any(is_like(hue, colour) for colour in COLOURS)
    for colour in COLOURS:
        assert not is_held_out_shape(Thing(NAMELESS, colour, form=3))


def test_of_a_clip_nothing_else_changes():
    for whole, apart in pairs(1.0):
        for name in ("plot", "scene", "motion", "place", "number", "sound", "time"):
            assert getattr(apart.facts, name) == getattr(whole.facts, name)
        for one, other in zip(whole.placed(0.3), apart.placed(0.3), strict=True):
            assert (one.x, one.y, one.size) == (other.x, other.y, other.size)


def test_so_large_a_share_is_taken_apart():
    changed = [whole != apart for whole, apart in things(0.3) if whole.is_shape]
    assert 0.2 < np.mean(changed) < 0.4
    assert all(whole == apart for whole, apart in things(0.0))


def test_no_text_about_it_names_form_and_colour():
    names = "|".join([*SHAPES, *SHAPES.values()])
    both = re.compile(rf"\b({'|'.join(COLOURS)}) ({names})\b")
    asked = set()
    for whole, apart in pairs(1.0):
        for question in apart.questions("video"):
            assert not both.search(f"{question.text} {question.answer}")
            asked.add(question.kind)
        if whole.facts.things[0].is_shape and whole.facts.plot == "stands":
            kinds = {q.kind for q in apart.questions("video")}
            assert ("shape" in kinds) ^ ("colour" in kinds)
    assert {"shape", "colour", "object", "order", "count"} <= asked


@pytest.mark.parametrize("unlike", [[], ["green"], list(COLOURS)], ids=["none", "one", "all"])
def test_a_paint_is_like_none_of_the_colours_it_is_not_to_be_like(unlike):
    rng = np.random.default_rng(0)
    found = [hue_of(mix_paint(rng, unlike)) for _ in range(500)]
    hues = [hue for hue in found if hue is not None]
    assert not any(is_like(hue, colour) for hue in hues for colour in unlike)
    # red, orange and yellow fill one sixth of the circle
    assert (np.histogram(hues, bins=6, range=(0, 1))[0] > 20).sum() >= 5


def test_forms_without_a_name_differ_from_each_other_and_from_those_with_one():
    def silhouette(**thing):
        return draw_silhouette(Placed(Thing(colour="red", **thing), 0.5, 0.5, 1.0), 64)

    nameless = [silhouette(name=NAMELESS, form=form) for form in range(NUM_FORMS)]
    named = [silhouette(name=name) for name in SHAPES]
    for at, form in enumerate(nameless):
        assert 0.08 < form.mean() < 0.7
        for other in [*nameless[:at], *named]:
            overlap = (form & other).sum() / (form | other).sum()
            assert overlap < 0.97
