"""What there is in the world, and the words for it: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Colour = tuple[int, int, int]  # RGB

# drawn emoji, in the order of the atlas beside the code; name -> plural
OBJECTS: Mapping[str, str] = {
    "car": "cars",
    "bus": "buses",
    "rocket": "rockets",
    "airplane": "airplanes",
    "sailboat": "sailboats",
    "bicycle": "bicycles",
    "tractor": "tractors",
    "apple": "apples",
    "banana": "bananas",
    "carrot": "carrots",
    "pizza": "pizzas",
    "cake": "cakes",
    "dog": "dogs",
    "cat": "cats",
    "horse": "horses",
    "pig": "pigs",
    "frog": "frogs",
    "fish": "fish",
    "butterfly": "butterflies",
    "turtle": "turtles",
    "elephant": "elephants",
    "penguin": "penguins",
    "guitar": "guitars",
    "umbrella": "umbrellas",
    "key": "keys",
    "house": "houses",
    "tree": "trees",
    "sunflower": "sunflowers",
    "robot": "robots",
    "crown": "crowns",
}
SHAPES: Mapping[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
}
NAMELESS = "thing"  # what has a colour, and a form without a name
PLURALS: Mapping[str, str] = {**OBJECTS, **SHAPES, NAMELESS: "things"}
COLOURS: Mapping[str, Colour] = {
    "red": (222, 38, 44),
    "green": (28, 172, 60),
    "blue": (34, 84, 232),
    "yellow": (250, 218, 32),
    "purple": (150, 50, 190),
    "orange": (250, 132, 22),
}
# name -> where it is, as a caption says it
SCENES: Mapping[str, str] = {
    "meadow": "on a green meadow",
    "night": "under the night sky",
    "room": "in a gray room",
    "desert": "in a sandy desert",
    "snow": "on a snowy field",
    "sea": "by the blue sea",
}
# name -> what a subject does
MOTIONS: Mapping[str, str] = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "grows": "grows",
    "shrinks": "shrinks",
}
DIRECTIONS: Mapping[str, str] = {
    "left": "to the left",
    "right": "to the right",
    "up": "up",
    "down": "down",
}
PLACES: Mapping[str, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
NUMBERS = ("one", "two", "three", "four", "five")


@dataclass(frozen=True)
class SoundWords:
    """How a sound is spoken of."""

    source: str  # a noun with its article: what is heard
    sentence: str  # without the full stop, without when


SOUNDS: Mapping[str, SoundWords] = {
    "bell": SoundWords("a bell", "A bell rings"),
    "engine": SoundWords("an engine", "An engine hums"),
    "siren": SoundWords("a siren", "A siren wails"),
    "drum": SoundWords("a drum", "A drum beats"),
    "bird": SoundWords("a bird", "A bird sings"),
    "rain": SoundWords("rain", "Rain falls"),
    "clock": SoundWords("a clock", "A clock ticks"),
    "horn": SoundWords("a horn", "A horn honks"),
    "whistle": SoundWords("a whistle", "A whistle blows"),
    "phone": SoundWords("a phone", "A phone beeps"),
}
# name -> when it is heard, as a caption says it
TIMES: Mapping[str, str] = {
    "beginning": "at the beginning",
    "middle": "halfway through",
    "end": "at the end",
    "throughout": "all the time",
}
SILENCE = "It is silent"


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
