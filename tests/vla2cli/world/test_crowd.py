"""What the labels of a crowd say is what its pixels show."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from vla2cli.world import crowd as crowd_module
from vla2cli.world.clip import WorldClip
from vla2cli.world.crowd import COLOUR_NAMES, KINDS, SCENE_NAMES, UNNAMED, draw_crowd
from vla2cli.world.picture import draw_frame, draw_silhouette
from vla2cli.world.vocabulary import COLOURS, OBJECTS, SHAPES

SIDE, GRID = 112, 8
SEED = 5


@pytest.fixture(scope="module")
def crowds():
    return [draw_crowd(SEED, index, SIDE, GRID) for index in range(150)]


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
        is_shape = crowd.kinds > len(OBJECTS)
        assert ((crowd.colours > 0) == is_shape).all()


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


def test_colours_and_shapes_go_together_as_in_training_clips():
    crowded = set()
    for index in range(500):
        crowd = draw_crowd(SEED, index, side=32, grid=4)
        pairs = np.stack([crowd.kinds, crowd.colours], -1)[crowd.colours > 0]
        crowded |= {(KINDS[kind - 1], COLOUR_NAMES[colour - 1]) for kind, colour in pairs}
    things = [t for i in range(2000) for t in WorldClip(SEED, i, "train").facts.things]
    assert crowded == {(thing.name, thing.colour) for thing in things if thing.is_shape}
    assert len(crowded) == len(SHAPES) * (len(COLOURS) - 1)


def test_of_striped_crowds_no_shape_s_form_and_colour_are_both_told(crowds):
    num_told = num_shapes = num_gray = 0
    for index, plain in enumerate(crowds):
        crowd = draw_crowd(SEED, index, SIDE, GRID, striped=0.6)
        np.testing.assert_array_equal(crowd.centres, plain.centres)
        form_is_told, colour_is_told = crowd.kinds != UNNAMED, crowd.colours != UNNAMED
        np.testing.assert_array_equal(crowd.kinds[form_is_told], plain.kinds[form_is_told])
        np.testing.assert_array_equal(crowd.colours[colour_is_told], plain.colours[colour_is_told])
        is_shape = plain.kinds > len(OBJECTS)
        if (crowd.frame == crowd.frame[..., :1]).all():
            num_gray += 1
            assert form_is_told.all()
            assert not colour_is_told[plain.kinds > 0].any()
        else:
            assert (form_is_told ^ colour_is_told)[is_shape].all()
            assert (form_is_told & colour_is_told)[~is_shape].all()
            num_told += (form_is_told & is_shape).sum()
            num_shapes += is_shape.sum()
    assert 0.5 < num_told / num_shapes < 0.7
    assert 0.15 < num_gray / len(crowds) < 0.35


@pytest.fixture
def striped(monkeypatch):
    """The striped shapes of some crowds."""
    found = []
    draw = crowd_module.draw_frame

    def watch(frame, placed):
        found.extend(item for item in placed if item.stripes is not None)
        return draw(frame, placed)

    with monkeypatch.context() as patch:
        patch.setattr(crowd_module, "draw_frame", watch)
        for index in range(150):
            draw_crowd(SEED, index, 32, 4, striped=0.9)
    return found


def test_neither_colour_of_stripes_is_most_of_a_shape(striped):
    assert len(striped) > 100
    for item in striped:
        frame = draw_frame(Image.new("RGB", (SIDE, SIDE)), [item]).astype(int)
        pixels = frame[draw_silhouette(item, SIDE) > 0.99]
        apart = [
            np.abs(pixels - colour).max(-1) for colour in (item.stripes.first, item.stripes.second)
        ]
        share = (apart[0] < apart[1]).mean()
        assert 0.25 < share < 0.75, item


def test_the_colours_of_stripes_follow_from_no_shape(striped):
    hues = {name: [] for name in SHAPES}
    for item in striped:
        for colour in (item.stripes.first, item.stripes.second):
            hues[item.thing.name].append(colorsys.rgb_to_hsv(*colour)[0])
    for name, of_shape in hues.items():
        # all around the circle: a sixth of it, as wide as a named colour, is never empty
        counts, _ = np.histogram(of_shape, bins=6, range=(0, 1))
        assert counts.min() > 0, name
        # the mean direction of even hues is 1 / sqrt(n) long
        length = abs(np.exp(2j * np.pi * np.array(of_shape)).mean())
        assert length < 3 / len(of_shape) ** 0.5, name


def test_a_crowd_follows_from_its_seed_and_number():
    one, same = (draw_crowd(SEED, 3, SIDE, GRID) for _ in range(2))
    for name in ("frame", "kinds", "colours", "centres"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
    others = draw_crowd(SEED, 4, SIDE, GRID), draw_crowd(SEED + 1, 3, SIDE, GRID)
    assert all((one.frame != other.frame).any() for other in others)
