"""What a clip shows is what its facts say: looked at in pixels, not in the staging."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from vla2cli.world.clip import WorldClip
from vla2cli.world.facts import Thing
from vla2cli.world.picture import draw_frame
from vla2cli.world.staging import Placed
from vla2cli.world.vocabulary import COLOURS, OBJECTS, SCENES, SHAPES

SIDE = 160
BEFORE = -1.0  # a moment at which nothing is there yet: the bare background
SEED = 11


def clips(plot: str, num: int = 30) -> Iterator[WorldClip]:
    """Yield clips of a plot, of both splits in turn."""
    found = 0
    for index in range(100 * num):
        clip = WorldClip(SEED, index, ("train", "heldout")[index % 2])
        if clip.facts.plot == plot:
            yield clip
            found += 1
            if found == num:
                return


def look(clip, moment):
    """Return the picture and where it differs from the bare background."""
    bare, frame = clip.frames([BEFORE, moment], SIDE).astype(int)
    return frame, np.abs(frame - bare).sum(2) > 24


def centre(mask):
    """Return the middle of a mask's box, x and y as shares of the side."""
    y, x = np.nonzero(mask)
    return (x.min() + x.max() + 1) / 2 / SIDE, (y.min() + y.max() + 1) / 2 / SIDE


def width(mask):
    """Return the longer side of a mask's box as a share of the picture's."""
    y, x = np.nonzero(mask)
    return max(np.ptp(x), np.ptp(y)) / SIDE


def nearest_colour(pixels):
    """Name the colour that most pixels are closest to."""
    distances = np.stack([np.abs(pixels - rgb).sum(-1) for rgb in COLOURS.values()])
    return list(COLOURS)[np.bincount(distances.argmin(0)).argmax()]


def count_blobs(mask):
    """Count the connected parts of a mask that are more than a few pixels."""
    left, sizes = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        stack, size = [left.pop()], 1
        while stack:
            y, x = stack.pop()
            near = {(y + b, x + a) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            stack += near
            size += len(near)
        sizes.append(size)
    return sum(size > 20 for size in sizes)


def test_subject_goes_where_the_caption_says():
    seen = set()
    for clip in clips("moves", 60):
        first, last = (look(clip, moment)[1] for moment in (0.01, 0.99))
        (x0, y0), (x1, y1) = centre(first), centre(last)
        growth = width(last) / width(first)
        is_true = {
            "left": x0 - x1 > 0.3 and abs(y0 - y1) < 0.05,
            "right": x1 - x0 > 0.3 and abs(y0 - y1) < 0.05,
            "up": y0 - y1 > 0.3 and abs(x0 - x1) < 0.05,
            "down": y1 - y0 > 0.3 and abs(x0 - x1) < 0.05,
            "grows": growth > 1.7,
            "shrinks": growth < 1 / 1.7,
        }
        assert [motion for motion, holds in is_true.items() if holds] == [clip.facts.motion], clip
        seen.add(clip.facts.motion)
    assert len(seen) == 6


def test_subject_stands_where_the_caption_says_all_the_time():
    for clip in clips("stands"):
        places = [centre(look(clip, moment)[1]) for moment in (0.01, 0.5, 0.99)]
        assert len(set(places)) == 1
        x, y = places[0]
        is_true = {"left": x < 0.35, "right": x > 0.65, "top": y < 0.35, "bottom": y > 0.65}
        is_true["middle"] = not any(is_true.values())
        assert [place for place, holds in is_true.items() if holds] == [clip.facts.place], clip


def test_as_many_things_are_seen_as_the_caption_says():
    for clip in clips("count", 40):
        assert count_blobs(look(clip, 0.5)[1]) == clip.facts.number, clip


def test_things_appear_in_the_order_of_the_caption():
    num_shapes = 0
    for clip in clips("order"):
        for thing, moment in zip(clip.facts.things, (0.2, 0.8), strict=True):
            frame, mask = look(clip, moment)
            assert count_blobs(mask) >= 1
            if thing.is_shape:
                assert nearest_colour(frame[mask]) == thing.colour
                num_shapes += 1
        first, second = (look(clip, moment)[1] for moment in (0.2, 0.8))
        assert (first != second).any()
    assert num_shapes > 10


def test_shapes_have_the_colour_of_their_name():
    for clip in clips("stands", 60):
        if clip.facts.things[0].is_shape:
            frame, mask = look(clip, 0.5)
            assert nearest_colour(frame[mask]) == clip.facts.things[0].colour


@pytest.mark.parametrize("scene", SCENES)
def test_scene_has_the_colours_of_its_name(scene):
    found = (c for c in clips("stands", 200) if c.facts.scene == scene)
    for clip in [next(found) for _ in range(3)]:
        picture = clip.frames([BEFORE], SIDE)[0].astype(float)
        sky, ground = picture[: SIDE // 4].mean((0, 1)), picture[-SIDE // 8 :].mean((0, 1))
        (r, g, b), level = ground, ground.mean()
        is_true = {
            "meadow": g > 1.2 * max(r, b),
            "sea": b > 1.2 * g > 1.2 * r,
            "desert": r > g > 1.2 * b,
            "night": level < 60,
            "snow": level > 200 and sky.mean() > 180,
            "room": 70 < level < 150 and np.ptp(ground) < 35,
        }
        assert is_true[scene], (clip, ground)


def test_no_two_backgrounds_of_a_scene_are_alike():
    found = [c for c in clips("stands", 60) if c.facts.scene == "meadow"]
    first, second = (clip.frames([BEFORE], SIDE)[0] for clip in found[:2])
    assert (first != second).any()


def test_every_object_and_shape_looks_different():
    things = [Thing(name) for name in OBJECTS] + [Thing(name, "red") for name in SHAPES]
    background = WorldClip(SEED, 0, "train").frames([BEFORE], SIDE)[0]
    canvas = Image.fromarray(background)
    drawn = [draw_frame(canvas, [Placed(thing, 0.5, 0.5, 1.0)]) for thing in things]
    for i, one in enumerate(drawn):
        assert (one != background).any()
        for other in drawn[:i]:
            # more than what compression changes, see test_write.py
            assert np.abs(one.astype(int) - other).mean() > 8


def test_larger_picture_shows_the_same():
    clip = next(clips("moves"))
    small, large = (clip.frames([0.5], side)[0] for side in (112, 336))
    shrunk = large.reshape(112, 3, 112, 3, 3).mean((1, 3))
    assert np.abs(small - shrunk).mean() < 6


def test_frames_do_not_depend_on_which_others_are_drawn():
    clip = WorldClip(SEED, 3, "train")
    together = clip.frames([0.1, 0.5, 0.9], SIDE)
    alone = WorldClip(SEED, 3, "train").frames([0.5], SIDE)
    np.testing.assert_array_equal(together[1], alone[0])
