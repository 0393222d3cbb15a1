"""Facts -> the true caption, and questions with their true answers.

Questions vary, answers are canonical: one string is right, so that exact match can be the measure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla2cli.world.facts import Facts
from vla2cli.world.vocabulary import (
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    NUMBERS,
    OBJECTS,
    PLACES,
    SCENES,
    SHAPES,
    SILENCE,
    SOUNDS,
    TIMES,
    with_article,
)

NUM_CHOICES = 4
CAPTION_QUESTIONS = (
    "Please describe the {medium} in detail.",
    "Describe the {medium}.",
    "What happens in the {medium}?",
)


@dataclass(frozen=True)
class Question:
    """One question about a clip and its only right answer."""

    kind: str  # a row of the table: object, colour, …, caption
    text: str
    answer: str
    choices: tuple[str, ...] = ()  # the answer among them, for a choice by log-probability


def caption(facts: Facts, medium: str = "av") -> str:
    """Say all that is seen and heard.

    Args:
        facts: of the clip.
        medium: `av` with the sound, `video` without a word about it, `audio` of the sound alone.
    """
    if medium == "video":
        return _seen(facts)
    return _heard(facts) if medium == "audio" else f"{_seen(facts)} {_heard(facts)}"


def ask_all(facts: Facts, rng: np.random.Generator, medium: str = "av") -> list[Question]:
    """List every question that the clip answers, each in one of its wordings.

    Args:
        facts: of the clip.
        rng: chooses the wordings and the order of choices.
        medium: `av`, `video` or `audio`: what may be asked about.
    """
    questions = [_ask_caption(facts, rng, medium)]
    if medium != "audio":
        questions += _ask_picture(facts, rng)
    if medium != "video":
        questions += _ask_sound(facts, rng)
    return questions


def _seen(facts: Facts) -> str:
    where = SCENES[facts.scene]
    first = facts.things[0]
    if facts.plot == "moves":
        assert facts.motion is not None
        return f"{_capital(with_article(first.noun))} {MOTIONS[facts.motion]} {where}."
    if facts.plot == "stands":
        assert facts.place is not None
        return f"{_capital(with_article(first.noun))} stands {PLACES[facts.place]} {where}."
    if facts.plot == "count":
        return f"{_capital(NUMBERS[facts.number - 1])} {first.plural} are {where}."
    second = with_article(facts.things[1].noun)
    return f"First {with_article(first.noun)} appears, then {second} {where}."


def _heard(facts: Facts) -> str:
    if facts.sound is None:
        return f"{SILENCE}."
    assert facts.time is not None
    return f"{SOUNDS[facts.sound].sentence} {TIMES[facts.time]}."


def _ask_caption(facts: Facts, rng: np.random.Generator, medium: str) -> Question:
    word = "audio" if medium == "audio" else "video"
    text = _pick(rng, *CAPTION_QUESTIONS).format(medium=word)
    return Question("caption", text, caption(facts, medium))


def _ask_picture(facts: Facts, rng: np.random.Generator) -> list[Question]:
    scene = _pick(rng, "Where is this?", "What is in the background?")
    questions = [Question("scene", scene, SCENES[facts.scene])]
    thing = facts.things[0]
    if facts.plot == "order":
        return questions + _ask_order(facts, rng)
    if facts.plot == "count":
        text = _pick(rng, "How many {} are there?", "How many {} do you see?")
        number = NUMBERS[facts.number - 1]
        return [*questions, Question("count", text.format(thing.plural), number)]
    if thing.colour is not None:
        text = _pick(rng, "What colour is it?", "Which colour does it have?")
        questions.append(Question("colour", text, thing.colour, _options(rng, thing.colour)))
    if thing.is_shape:
        text = _pick(rng, "What shape is it?", "Which shape is seen?")
        questions.append(Question("shape", text, thing.name))
    elif thing.colour is None:
        text = _pick(rng, "What is in the video?", "What do you see?", "Which object is it?")
        answer = with_article(thing.noun)
        questions.append(Question("object", text, answer, _options(rng, answer)))
    if facts.plot == "stands":
        assert facts.place is not None
        text = _pick(rng, "Where in the picture is the {}?", "Where does the {} stand?")
        answer = PLACES[facts.place]
        return [
            *questions,
            Question("place", text.format(thing.noun), answer, _options(rng, answer)),
        ]
    return questions + _ask_motion(facts, rng)


def _ask_order(facts: Facts, rng: np.random.Generator) -> list[Question]:
    first, second = (with_article(thing.noun) for thing in facts.things)
    return [
        Question("order", _pick(rng, "What appears first?", "What comes first?"), first),
        Question("order", _pick(rng, "What appears then?", "What comes second?"), second),
    ]


def _ask_motion(facts: Facts, rng: np.random.Generator) -> list[Question]:
    assert facts.motion is not None
    noun = facts.things[0].noun
    text = _pick(rng, "What does the {} do?", "What happens to the {}?").format(noun)
    questions = [Question("motion", text, f"It {MOTIONS[facts.motion]}.")]
    if facts.motion in DIRECTIONS:
        text = _pick(rng, "Which way does the {} move?", "Where does the {} go?").format(noun)
        answer = DIRECTIONS[facts.motion]
        questions.append(Question("direction", text, answer, _options(rng, answer)))
    return questions


def _ask_sound(facts: Facts, rng: np.random.Generator) -> list[Question]:
    text = _pick(rng, "Is there a sound?", "Is anything heard?")
    questions = [Question("is-sound", text, "no" if facts.sound is None else "yes")]
    if facts.sound is None:
        return questions
    assert facts.time is not None
    source = SOUNDS[facts.sound].source
    what = _pick(rng, "What is heard?", "Which sound is it?", "What makes the sound?")
    when = _pick(rng, "When is the sound heard?", "When is it heard?")
    return [
        *questions,
        Question("sound", what, source, _options(rng, source)),
        Question("when", when, TIMES[facts.time], _options(rng, TIMES[facts.time])),
    ]


# the answers that may stand beside a right one in a choice
_RIVALS = (
    tuple(with_article(name) for name in OBJECTS),
    tuple(COLOURS),
    tuple(SHAPES),
    tuple(DIRECTIONS.values()),
    tuple(PLACES.values()),
    tuple(TIMES.values()),
    tuple(words.source for words in SOUNDS.values()),
)


def _options(rng: np.random.Generator, answer: str) -> tuple[str, ...]:
    # a guest is an object that is in no group
    rivals = next((group for group in _RIVALS if answer in group), _RIVALS[0])
    others = [rival for rival in rivals if rival != answer]
    picked = [others[int(i)] for i in rng.permutation(len(others))[: NUM_CHOICES - 1]]
    picked.insert(int(rng.integers(NUM_CHOICES)), answer)
    return tuple(picked)


def _pick(rng: np.random.Generator, *wordings: str) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
