"""Make the clips of this folder: eight of the drawn world's held-out split.

They are chosen by what happens in them and by no model's success: of the clips of one seed the
first that fits each line below, has a sound and shows and sounds like none before it.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from PIL import Image

from vla2cli.world.clip import WorldClip
from vla2cli.world.encode import SIDE, encode, has_track
from vla2cli.world.vocabulary import DIRECTIONS
from vla2cli.world.words import caption

SEED = 2024
CAPTIONS = "captions.json"  # file -> true caption
STILL = "09.png"


def _moves(clip: WorldClip, motions: tuple[str, ...], *, is_shape: bool = False) -> bool:
    facts = clip.facts
    return facts.motion in motions and facts.things[0].is_shape is is_shape


FITS: dict[str, Callable[[WorldClip], bool]] = {
    "01.mp4": lambda clip: _moves(clip, ("left", "right")),
    "02.mp4": lambda clip: _moves(clip, ("up", "down")),
    "03.mp4": lambda clip: _moves(clip, tuple(DIRECTIONS), is_shape=True),
    "04.mp4": lambda clip: _moves(clip, ("grows", "shrinks")),
    "05.mp4": lambda clip: clip.facts.plot == "stands",
    "06.mp4": lambda clip: clip.facts.plot == "order",
    "07.mp4": lambda clip: clip.facts.plot == "count",
    "08.mp4": lambda clip: not has_track(clip),  # a silent one
    STILL: lambda clip: clip.facts.plot == "stands",  # of which one moment is taken
}


def choose() -> dict[str, WorldClip]:
    """Find the clip of each file."""
    chosen: dict[str, WorldClip] = {}
    for name, fits in FITS.items():
        old = [content for clip in chosen.values() for content in _contents(clip)]
        chosen[name] = next(
            clip
            for clip in _heldout()
            if fits(clip)
            and (clip.facts.sound is None) is (name == "08.mp4")
            and not any(content in old for content in _contents(clip))
        )
    return chosen


def still(clip: WorldClip) -> Image.Image:
    """Draw the middle of a clip."""
    return Image.fromarray(clip.frames([0.5], SIDE)[0])


def make_examples(folder: Path) -> None:
    """Make all files anew in `folder`."""
    chosen = choose()
    still(chosen.pop(STILL)).save(folder / STILL, optimize=True)
    for name, clip in chosen.items():
        encode(clip, folder / name)
    captions = {name: caption(clip.facts) for name, clip in chosen.items()}
    (folder / CAPTIONS).write_text(json.dumps(captions, indent=2) + "\n", encoding="utf-8")


def _heldout() -> Iterator[WorldClip]:
    return (WorldClip(SEED, index, "heldout") for index in count())


def _contents(clip: WorldClip) -> list[object]:
    """List the things and the sound of a clip."""
    facts = clip.facts
    return [thing.name for thing in facts.things] + [facts.sound]


if __name__ == "__main__":
    make_examples(Path(__file__).parent)
