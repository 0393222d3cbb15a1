"""Render the objects out of the font: `python make_atlas.py NotoColorEmoji.ttf`."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vla2cli.world.picture import ATLAS, ATLAS_COLUMNS, SPRITE_SIDE
from vla2cli.world.vocabulary import OBJECTS

# one character for each of OBJECTS, in their order
CHARACTERS = "🚗🚌🚀✈⛵🚲🚜🍎🍌🥕🍕🎂🐶🐱🐎🐷🐸🐟🦋🐢🐘🐧🎸☂🔑🏠🌲🌻🤖👑"
FONT_SIZE = 109  # the only size that the font's bitmaps have
CANVAS = (136, 128)  # of one of its characters


def main(font: Path) -> None:
    """Write the atlas beside the code."""
    rows = -(-len(OBJECTS) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * SPRITE_SIDE, rows * SPRITE_SIDE))
    emoji = ImageFont.truetype(font, FONT_SIZE)
    for i, (_, character) in enumerate(zip(OBJECTS, CHARACTERS, strict=True)):
        row, column = divmod(i, ATLAS_COLUMNS)
        image = Image.new("RGBA", CANVAS)
        ImageDraw.Draw(image).text((0, 0), character, font=emoji, embedded_color=True)
        box = image.getbbox()
        assert box, f"the font has no {character}"
        side = max(box[2] - box[0], box[3] - box[1])
        square = Image.new("RGBA", (side, side))
        width, height = box[2] - box[0], box[3] - box[1]
        square.paste(image.crop(box), ((side - width) // 2, (side - height) // 2))
        sprite = square.resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)
        atlas.paste(sprite, (column * SPRITE_SIDE, row * SPRITE_SIDE))
    atlas.save(ATLAS, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
