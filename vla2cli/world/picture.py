"""Drawing: a scene's background, and things on it, at any size.

The objects are emoji of Noto Color Emoji (SIL Open Font License 1.1, see `sprites/LICENSE.txt`),
rendered once into an atlas; shapes and scenes are drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vla2_models.errors import one_line
from vla2cli.errors import UsageError
from vla2cli.world.staging import Placed
from vla2cli.world.vocabulary import COLOURS, OBJECTS, Colour

ATLAS = Path(__file__).parent / "sprites" / "objects.png"
ATLAS_COLUMNS = 6
SPRITE_SIDE = 96

# scene -> colours of the upper part, from top to horizon, and of the ground, from horizon to bottom
_GROUNDS: dict[str, tuple[Colour, Colour, Colour, Colour]] = {
    "meadow": ((120, 180, 235), (190, 220, 245), (110, 180, 80), (70, 140, 50)),
    "night": ((8, 10, 36), (24, 28, 72), (20, 24, 60), (10, 12, 30)),
    "room": ((176, 176, 180), (166, 166, 170), (120, 118, 116), (96, 94, 92)),
    "desert": ((235, 205, 150), (245, 222, 175), (214, 170, 105), (190, 142, 80)),
    "snow": ((206, 218, 230), (224, 232, 240), (246, 249, 252), (232, 238, 246)),
    "sea": ((150, 205, 235), (180, 225, 242), (40, 120, 180), (14, 70, 130)),
}


def draw_frame(background: Image.Image, placed: Sequence[Placed]) -> NDArray[np.uint8]:
    """Draw what is seen at one moment.

    Args:
        background: (side, side) RGB, left as it is.
        placed: in the order of drawing.

    Returns:
        (side, side, 3) RGB.
    """
    frame = background.copy()
    for item in placed:
        sprite, corner = _fit(item, frame.width)
        frame.paste(sprite, corner, sprite)
    return np.asarray(frame)


def draw_silhouette(item: Placed, side: int) -> NDArray[np.bool_]:
    """Tell which pixels a thing covers: (side, side)."""
    sprite, corner = _fit(item, side)
    silhouette = Image.new("L", (side, side))
    silhouette.paste(sprite.getchannel("A"), corner)
    return np.asarray(silhouette) > 127


def draw_background(scene: str, side: int, rng: np.random.Generator) -> Image.Image:
    """Draw a scene without its things: (side, side) RGB, no two quite alike."""
    horizon = float(rng.uniform(0.45, 0.7))
    tint = rng.uniform(-10, 10, 3)
    y = (np.arange(side) + 0.5) / side
    top, low, near, bottom = (np.array(colour) + tint for colour in _GROUNDS[scene])
    above = np.clip(y / horizon, 0, 1)[:, None]
    below = np.clip((y - horizon) / (1 - horizon), 0, 1)[:, None]
    rows = np.where(
        (y < horizon)[:, None],
        top + (low - top) * above,
        near + (bottom - near) * below,
    )
    image = Image.fromarray(
        np.broadcast_to(rows[:, None], (side, side, 3)).clip(0, 255).astype(np.uint8)
    )
    _DETAILS[scene](ImageDraw.Draw(image), side, horizon, rng)
    return image


def _fit(item: Placed, side: int) -> tuple[Image.Image, tuple[int, int]]:
    pixels = max(2, round(item.size * side))
    sprite = _sprite(item).resize((pixels, pixels), Image.Resampling.BICUBIC)
    return sprite, (round(item.x * side - pixels / 2), round(item.y * side - pixels / 2))


def _sprite(item: Placed) -> Image.Image:
    thing = item.thing
    if thing.picture is not None:
        return open_picture(thing.picture)
    colour = thing.paint or COLOURS.get(thing.colour or "")
    if colour is None:
        return _objects()[thing.name]
    form = _form(thing.name) if thing.form is None else _nameless_form(thing.form)
    painted = Image.new("RGB", form.size, colour)
    painted.putalpha(form)
    return painted


@cache
def open_picture(path: str) -> Image.Image:
    """Open a guest's picture as a sprite: what is not transparent of it, on a square.

    Raises:
        UsageError: it cannot be read, nothing of it is to be seen, or nothing is transparent.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"'{path}' is no picture that can be read: {one_line(error)}") from error
    box = image.getchannel("A").getbbox()
    if box is None:
        raise UsageError(f"'{path}' is transparent all over; give a picture of something")
    if image.getchannel("A").getextrema()[0] == 255:
        raise UsageError(f"'{path}' has no transparency; cut out what it is to show")
    shown = image.crop(box)
    side = max(shown.size)
    square = Image.new("RGBA", (side, side))
    square.paste(shown, ((side - shown.width) // 2, (side - shown.height) // 2))
    return square.resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)


@cache
def _objects() -> dict[str, Image.Image]:
    atlas = Image.open(ATLAS).convert("RGBA")
    corners = [divmod(i, ATLAS_COLUMNS) for i in range(len(OBJECTS))]
    boxes = [(c * SPRITE_SIDE, r * SPRITE_SIDE) for r, c in corners]
    return {
        name: atlas.crop((x, y, x + SPRITE_SIDE, y + SPRITE_SIDE))
        for name, (x, y) in zip(OBJECTS, boxes, strict=True)
    }


@cache
def _nameless_form(number: int) -> Image.Image:
    """Draw a form like none that has a name, as `_form`."""
    rng = np.random.default_rng(number)
    num_corners = int(rng.integers(6, 11))
    angles = 2 * math.pi * (np.arange(num_corners) + rng.uniform(-0.35, 0.35, num_corners))
    radii = rng.uniform(0.2, 0.49, num_corners)
    fine = 4 * SPRITE_SIDE
    corners = [
        (fine * (0.5 + r * math.cos(a / num_corners)), fine * (0.5 + r * math.sin(a / num_corners)))
        for r, a in zip(radii.tolist(), angles.tolist(), strict=True)
    ]
    image = Image.new("L", (fine, fine))
    ImageDraw.Draw(image).polygon(corners, fill=255)
    return image.resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)


@cache
def _form(name: str) -> Image.Image:
    """Draw a shape's silhouette: (SPRITE_SIDE, SPRITE_SIDE), 255 where it is."""
    fine = 4 * SPRITE_SIDE  # drawn large and made smaller: that smooths the edges
    image = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(image)
    if name == "circle":
        draw.ellipse((8, 8, fine - 8, fine - 8), fill=255)
    elif name == "square":
        draw.rectangle((24, 24, fine - 24, fine - 24), fill=255)
    else:
        draw.polygon(_corners(name, fine), fill=255)
    return image.resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)


def _corners(name: str, side: int) -> list[tuple[float, float]]:
    if name == "triangle":
        return [(side / 2, 16), (side - 8, side - 24), (8, side - 24)]
    radii = [side / 2 - 4, side * 0.21] * 5
    angles = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
    return [
        (side / 2 + r * math.cos(a), side / 2 + r * math.sin(a))
        for r, a in zip(radii, angles, strict=True)
    ]


def _blades(draw: ImageDraw.ImageDraw, side: int, horizon: float, rng: np.random.Generator) -> None:
    for x, y in rng.uniform((0, horizon), (1, 1), (40, 2)) * side:
        draw.line((x, y, x + side * 0.01, y - side * 0.03), fill=(60, 120, 45), width=_width(side))


def _stars(draw: ImageDraw.ImageDraw, side: int, horizon: float, rng: np.random.Generator) -> None:
    radius = side * 0.004
    for x, y in rng.uniform((0, 0), (1, horizon), (25, 2)) * side:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(235, 235, 210))


def _boards(draw: ImageDraw.ImageDraw, side: int, horizon: float, rng: np.random.Generator) -> None:
    top = horizon * side
    draw.line((0, top, side, top), fill=(80, 78, 76), width=_width(side))
    for x in (rng.uniform(0, 0.2) + np.arange(6) / 5) * side:
        draw.line((x, top, side / 2 + (x - side / 2) * 1.6, side), fill=(92, 90, 88))


def _dunes(draw: ImageDraw.ImageDraw, side: int, horizon: float, rng: np.random.Generator) -> None:
    for x, y in rng.uniform((0, horizon), (1, 0.95), (5, 2)) * side:
        reach = side * 0.18
        draw.arc((x - reach, y, x + reach, y + side * 0.08), 180, 360, fill=(180, 132, 72))


def _flakes(draw: ImageDraw.ImageDraw, side: int, horizon: float, rng: np.random.Generator) -> None:
    radius = side * 0.006
    for x, y in rng.uniform((0, 0), (1, horizon), (20, 2)) * side:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))


def _waves(draw: ImageDraw.ImageDraw, side: int, horizon: float, rng: np.random.Generator) -> None:
    for x, y in rng.uniform((0, horizon), (0.9, 1), (14, 2)) * side:
        draw.line((x, y, x + side * 0.1, y), fill=(150, 200, 230), width=_width(side))


def _width(side: int) -> int:
    return max(1, side // 160)


_DETAILS: dict[str, Callable[[ImageDraw.ImageDraw, int, float, np.random.Generator], None]] = {
    "meadow": _blades,
    "night": _stars,
    "room": _boards,
    "desert": _dunes,
    "snow": _flakes,
    "sea": _waves,
}
