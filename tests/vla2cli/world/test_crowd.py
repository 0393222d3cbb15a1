"""What the labels of a crowd say is what its pixels show."""

import colorsys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vla2cli.world import crowd as crowd_module
from vla2cli.world.clip import WorldClip
from vla2cli.world.crowd import (
    COLOUR_NAMES,
    KINDS,
    SCENE_NAMES,
    SHAPE,
    SHAPE_NAMES,
    UNNAMED,
    draw_crowd,
)
from vla2cli.world.facts import Thing, is_held_out_shape
from vla2cli.world.picture import draw_frame
from vla2cli.world.vocabulary import COLOURS, SHAPES

SIDE, GRID = 112, 8
SEED = 5


@pytest.fixture(scope="module")
def crowds():
    return [draw_crowd(SEED, index, SIDE, GRID) for index in range(250)]


@pytest.fixture(scope="module")
def drawn():
    """All things of other crowds."""
    found = []
    draw = crowd_module.draw_frame

    def watch(frame, placed):
        found.extend(placed)
        return draw(frame, placed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crowd_module, "draw_frame", watch)
        for index in range(500):
            draw_crowd(SEED, index, side=32, grid=4)
    return found


@pytest.fixture(scope="module")
def painted(drawn):
    return [item for item in drawn if item.thing.paint is not None]


def patches_of(crowd):
    """(GRID, GRID, pixels, 3) of a picture."""
    patch = SIDE // GRID
    cut = crowd.frame.reshape(GRID, patch, GRID, patch, 3).swapaxes(1, 2)
    return cut.reshape(GRID, GRID, patch * patch, 3).astype(int)


def shares_of(crowd, colour):
    """How much of each patch has one of the six colours, but for smoothed edges: (GRID, GRID)."""
    distance = np.abs(patches_of(crowd) - COLOURS[colour]).max(-1)
    return (distance < 12).mean(-1)


def test_a_patch_with_a_coloured_shape_has_the_pixels_of_its_colour(crowds):
    for number, colour in enumerate(COLOUR_NAMES, start=1):
        shares = np.concatenate([shares_of(c, colour)[c.colours == number] for c in crowds])
        assert len(shares) > 50
        assert shares.mean() > 0.5, colour
        # 0.3 of it is covered at least, smoothed edges and what stands before it taken off
        assert (shares > 0.15).mean() > 0.97, colour


def test_a_patch_of_the_background_shows_little_of_anything(crowds):
    # no scene has these colours
    for colour in ("red", "purple"):
        shares = np.concatenate([shares_of(c, colour)[c.kinds == 0] for c in crowds])
        assert shares.max() < 0.35


def test_shapes_have_a_colour_and_objects_their_own(crowds):
    for crowd in crowds:
        assert ((crowd.colours != 0) == (crowd.kinds == KINDS.index(SHAPE) + 1)).all()


def test_every_thing_has_one_centre_and_most_are_named_there(crowds):
    counts = [int(crowd.centres.sum()) for crowd in crowds]
    assert set(counts) == {2, 3, 4, 5, 6}
    named = 0
    for crowd in crowds:
        kinds = crowd.kinds[crowd.centres == 1]
        # some objects, such as a key, have nothing in their middle
        named += (kinds > 0).sum()
        assert len(np.unique(crowd.kinds[crowd.kinds > 0])) <= len(kinds)
    assert named > 0.95 * sum(counts)


def test_every_kind_and_scene_is_drawn(crowds):
    seen = np.unique(np.concatenate([crowd.kinds.ravel() for crowd in crowds]))
    assert seen.tolist() == list(range(len(KINDS) + 1))
    assert {crowd.scene for crowd in crowds} == set(range(len(SCENE_NAMES)))


def test_a_scene_has_the_brightness_of_its_name(crowds):
    means = {
        name: np.mean([c.frame[-4:].mean() for c in crowds if SCENE_NAMES[c.scene] == name])
        for name in SCENE_NAMES
    }
    assert min(means, key=means.get) == "night"
    assert max(means, key=means.get) == "snow"


def test_colours_and_shapes_go_together_as_in_training_clips(drawn):
    crowded = {
        (item.thing.name, item.thing.colour) for item in drawn if item.thing.colour is not None
    }
    things = [t for i in range(2000) for t in WorldClip(SEED, i, "train").facts.things]
    assert crowded == {(thing.name, thing.colour) for thing in things if thing.is_shape}
    assert len(crowded) == len(SHAPES) * (len(COLOURS) - 1)


def test_which_shape_it_is_is_told_where_its_colour_leaves_all_of_them_open(crowds):
    possible = {
        colour: {shape for shape in SHAPES if not is_held_out_shape(Thing(shape, colour))}
        for colour in COLOUR_NAMES
    }
    open_colours = {colour for colour, shapes in possible.items() if shapes == set(SHAPES)}
    assert open_colours == {"red", "orange"}
    told = Counter()
    for crowd in crowds:
        is_shape = crowd.kinds == KINDS.index(SHAPE) + 1
        assert (crowd.shapes[~is_shape] == UNNAMED).all()
        for shape, number in zip(crowd.shapes[is_shape], crowd.colours[is_shape], strict=True):
            colour = None if number == UNNAMED else COLOUR_NAMES[number - 1]
            assert (shape != UNNAMED) == (colour is None or colour in open_colours)
            told[SHAPE_NAMES[shape] if shape != UNNAMED else None, colour] += 1
    assert {pair for pair in told if pair[0] is not None} == {
        (shape, colour) for shape in SHAPES for colour in (None, *open_colours)
    }


def test_no_paint_is_like_a_colour_that_a_shape_lacks(painted):
    assert len(painted) > 200
    lacked = [COLOURS[colour] for colour in ("green", "blue", "yellow", "purple")]
    for item in painted:
        assert item.thing.is_shape
        hue, saturation, _ = colorsys.rgb_to_hsv(*(channel / 255 for channel in item.thing.paint))
        if saturation < 0.25:
            continue
        for colour in lacked:
            gap = abs(hue - colorsys.rgb_to_hsv(*colour)[0])
            assert min(gap, 1 - gap) > 0.05  # turns: 18 degrees


def test_what_is_painted_shows_its_paint(painted):
    for item in painted[:50]:
        frame = draw_frame(Image.new("RGB", (SIDE, SIDE)), [item])
        at = int(item.y * SIDE), int(item.x * SIDE)
        assert frame[at].tolist() == list(item.thing.paint)


def test_paints_follow_from_no_shape(painted):
    hues = {name: [] for name in SHAPES}
    for item in painted:
        hues[item.thing.name].append(colorsys.rgb_to_hsv(*item.thing.paint)[0])
    everywhere = np.exp(2j * np.pi * np.concatenate(list(hues.values()))).mean()
    for name, of_shape in hues.items():
        # the mean direction of n random ones is about 1 / sqrt(n) off
        mean = np.exp(2j * np.pi * np.array(of_shape)).mean()
        assert abs(mean - everywhere) < 3 / len(of_shape) ** 0.5, name


def test_a_crowd_follows_from_its_seed_and_number():
    one, same = (draw_crowd(SEED, 3, SIDE, GRID) for _ in range(2))
    for name in ("frame", "kinds", "shapes", "colours", "centres"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
    others = draw_crowd(SEED, 4, SIDE, GRID), draw_crowd(SEED + 1, 3, SIDE, GRID)
    assert all((one.frame != other.frame).any() for other in others)
