"""One clip of the world: its facts, and how it looks and sounds at any size and moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vla2cli.world.apart import take_apart
from vla2cli.world.facts import Facts, Thing, draw_facts, generator
from vla2cli.world.picture import draw_background, draw_frame
from vla2cli.world.sound import sound_span, synthesise
from vla2cli.world.staging import Act, Placed, placed_at, stage
from vla2cli.world.words import Question, ask_all

# what a clip's generators are for; facts have purpose 0, and a file of it 6 and 7
_STAGING, _BACKGROUND, _SPAN, _SOUND, _WORDS, _APART = (*range(1, 6), 8)


@dataclass(frozen=True)
class WorldClip:
    """The clip with an index in a split of a seed's collection."""

    seed: int
    index: int
    split: str  # train | heldout
    guest: Thing | None = None  # an object of a picture of its own, in every clip
    apart: float = 0.0  # share of the shapes that have the form or the colour alone

    @cached_property
    def facts(self) -> Facts:
        """What is true of it."""
        facts = draw_facts(self.seed, self.index, self.split, self.guest)
        return take_apart(facts, self.apart, self._generator(_APART)) if self.apart else facts

    @cached_property
    def acts(self) -> tuple[Act, ...]:
        """Where its things are, from beginning to end."""
        return stage(self.facts, self._generator(_STAGING))

    @cached_property
    def span(self) -> tuple[float, float] | None:
        """The seconds in which its sound is heard; None: it is silent."""
        return sound_span(self.facts, self._generator(_SPAN))

    def heard_at(self, second: float) -> str | None:
        """Name the sound that is heard at a second of the clip; None: it is silent then."""
        is_heard = self.span is not None and self.span[0] <= second < self.span[1]
        return self.facts.sound if is_heard else None

    def placed(self, moment: float) -> list[Placed]:
        """List what is seen at a share of the clip from 0 to 1."""
        return placed_at(self.acts, moment)

    def frames(self, moments: Sequence[float], side: int) -> NDArray[np.uint8]:
        """Draw the picture at some moments: (len(moments), side, side, 3) RGB."""
        background = draw_background(self.facts.scene, side, self._generator(_BACKGROUND))
        return np.stack([draw_frame(background, self.placed(moment)) for moment in moments])

    def track(self) -> NDArray[np.int16]:
        """Make its sound: (80000,) at 16 kHz."""
        return synthesise(self.facts, self.span, self._generator(_SOUND))

    def questions(self, medium: str = "av") -> list[Question]:
        """List what may be asked about it, with the true answers."""
        return ask_all(self.facts, self._generator(_WORDS), medium)

    def _generator(self, purpose: int) -> np.random.Generator:
        return generator(self.seed, self.index, self.split, purpose=purpose)
