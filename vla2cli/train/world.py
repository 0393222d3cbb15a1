"""The drawn world as training data: clips as they are needed, without files.

Beside the conversations about a clip there are **word targets**: for each token of the connector
and of the audio projector the words of what it shows and where, or of what it hears and when. A
language model that has never seen text learns from them at once what a token means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vla2_models.beats_design import NUM_MEL_BINS
from vla2_models.config import CheckpointConfig
from vla2_models.stc import ConnectorDesign
from vla2cli.media.sampling import uniform_indices
from vla2cli.preprocess import FrameGeometry, fbank, fit_frame, normalise
from vla2cli.tokenizer import Tokenizer
from vla2cli.train.conversation import IGNORED, Form, Utterance, build_row
from vla2cli.train.media import Media
from vla2cli.train.samples import Sample
from vla2cli.train.towers import spoil
from vla2cli.world.clip import WorldClip
from vla2cli.world.facts import Thing
from vla2cli.world.picture import draw_silhouette
from vla2cli.world.vocabulary import SCENES
from vla2cli.world.words import Question

NUM_FILE_FRAMES = 50  # of a clip as a file: five seconds at ten a second
NUM_WORDS = 8  # targets of one token at most

# how often a clip is seen with its sound, without, only heard, or as a still picture
_MEDIA = {"av": 0.7, "video": 0.12, "audio": 0.12, "image": 0.06}
_STILL_PLOTS = ("stands", "count")
_SIDES = (112, 160, 224, 320)  # that clips are drawn at, before they are fitted
_CELL = 16  # pixels of a connector's cell where silhouettes are measured
_SHOWN = 0.1  # of a cell, from which on its token is to name a thing
_ACROSS = (("left",), ("left", "middle"), ("right", "middle"), ("right",))
_DOWN = (("top",), ("top", "middle"), ("bottom", "middle"), ("bottom",))
_WHEN = ("beginning", "halfway", "end")
_ROW_S = 0.01


@dataclass(frozen=True)
class WorldReader:
    """Makes samples of clips for one checkpoint."""

    tokenizer: Tokenizer
    config: CheckpointConfig
    geometry: FrameGeometry
    form: Form = "chat"

    def media(self, clip: WorldClip, medium: str, rng: np.random.Generator | None = None) -> Media:
        """Draw and synthesise what the towers are given.

        Args:
            clip: to be seen and heard.
            medium: `av`, `video`, `audio` or `image`.
            rng: of the size it is drawn at and of a codec's damage; None: undamaged.
        """
        moments = self.moments if medium != "image" else [0.5]
        pixel_values = sound = None
        if medium != "audio":
            side = 320 if rng is None else int(rng.choice(_SIDES))
            frames = [fit_frame(frame, self.geometry) for frame in clip.frames(moments, side)]
            fitted = np.stack(frames)
            fitted = fitted if rng is None else spoil(fitted, rng)
            pixel_values = torch.from_numpy(normalise(fitted, self.geometry))
        if medium in ("av", "audio"):
            sound = fbank(clip.track())[None]
        return Media(pixel_values, sound, is_image=medium == "image")

    @property
    def moments(self) -> list[float]:
        """The shares of a clip's length at which its frames are looked at."""
        indices = uniform_indices(NUM_FILE_FRAMES, self.config.num_frames)
        return [(int(i) + 0.5) / NUM_FILE_FRAMES for i in indices]

    def sample(
        self, clip: WorldClip, medium: str, questions: Sequence[Question], media: Media
    ) -> Sample:
        """Make a sample of some questions about a clip."""
        tag = "video" if medium == "av" else medium
        rows = tuple(
            build_row(
                self.tokenizer,
                [Utterance("human", f"<{tag}>\n{q.text}"), Utterance("gpt", q.answer)],
                tag,
                self.form,
            )
            for q in questions
        )
        ids = tuple(f"{clip.split}-{clip.index}-{q.kind}" for q in questions)
        return Sample(ids, rows, media, word_targets=self.word_targets(clip, medium))

    def word_targets(self, clip: WorldClip, medium: str) -> Tensor:
        """Name what each token of the media shows or hears: (num_media_tokens, NUM_WORDS)."""
        words: list[list[str]] = []
        if medium != "audio":
            moments = [0.5] * self.config.num_frames if medium == "image" else self.moments
            words += self._seen(clip, moments)
        if medium in ("av", "audio"):
            words += self._heard(clip)
        ids = [self._ids(of_token) for of_token in words]
        return torch.tensor([row + [IGNORED] * (NUM_WORDS - len(row)) for row in ids])

    def _ids(self, words: Sequence[str]) -> list[int]:
        return [i for word in words for i in self.tokenizer.encode(word)][:NUM_WORDS]

    def _seen(self, clip: WorldClip, moments: Sequence[float]) -> list[list[str]]:
        slots, grid = _count_slots(self.config.connector, len(moments), self.config.num_patches)
        stride = len(moments) // slots
        words = []
        for slot in range(slots):
            shown = _show(clip, moments[slot * stride : (slot + 1) * stride], grid)
            for row in range(grid):
                for column in range(grid):
                    thing = shown[row][column]
                    where = [*_third(_ACROSS, column, grid), *_third(_DOWN, row, grid)]
                    background = SCENES[clip.facts.scene].rsplit(" ", 1)[1]
                    words.append([background] if thing is None else [thing.noun, *where])
        return words

    def _heard(self, clip: WorldClip) -> list[list[str]]:
        assert self.config.audio is not None, "a sound for a model without ears"
        patch = self.config.audio.design.patch_size
        num_rows = self.config.audio.window.num_frames // patch
        words = []
        for row in range(num_rows):
            middle = (row + 0.5) * patch * _ROW_S
            heard = ["silent"]
            if clip.span is not None and clip.span[0] <= middle < clip.span[1]:
                assert clip.facts.sound is not None
                heard = [clip.facts.sound, _WHEN[row * len(_WHEN) // num_rows]]
            words += [heard] * (NUM_MEL_BINS // patch)
        return words


class WorldSamples(Dataset[Sample]):
    """Clips of one split with questions about them.

    Args:
        reader: makes the samples.
        seed: of the collection.
        count: of clips.
        num_questions: about each, its caption among them.
        split: `train` or `heldout`.
        medium: what of a clip is given; None: drawn for each.
        is_spoiled: whether frames are damaged as by a codec.
    """

    def __init__(
        self,
        reader: WorldReader,
        seed: int,
        count: int,
        *,
        num_questions: int = 6,
        split: str = "train",
        medium: str | None = None,
        is_spoiled: bool = True,
    ) -> None:
        self.reader, self.seed, self.count = reader, seed, count
        self.num_questions, self.split = num_questions, split
        self.medium, self.is_spoiled = medium, is_spoiled
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the clips of an epoch, counted from 0: each has clips of its own."""
        self._first = epoch * self.count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        clip = WorldClip(self.seed, self._first + index, self.split)
        rng = np.random.default_rng([self.seed, clip.index, 2])
        medium = self.medium or _draw_medium(clip, rng)
        caption, *others = clip.questions("video" if medium == "image" else medium)
        order = rng.permutation(len(others))[: self.num_questions - 1]
        questions = [caption, *(others[int(i)] for i in order)]
        if medium == "image":
            questions = [_of_image(question) for question in questions]
        media = self.reader.media(clip, medium, rng if self.is_spoiled else None)
        return self.reader.sample(clip, medium, questions, media)


def _draw_medium(clip: WorldClip, rng: np.random.Generator) -> str:
    medium = str(rng.choice(list(_MEDIA), p=list(_MEDIA.values())))
    # what moves or comes and goes cannot be told from one picture
    return "av" if medium == "image" and clip.facts.plot not in _STILL_PLOTS else medium


def _of_image(question: Question) -> Question:
    return Question(question.kind, question.text.replace("video", "image"), question.answer)


def _count_slots(design: ConnectorDesign, num_frames: int, num_patches: int) -> tuple[int, int]:
    """Return the slots in time, and the rows of cells, of a connector's tokens."""
    tokens = design.count_tokens(num_frames, num_patches)
    slots = num_frames // 2
    grid = round((tokens / slots) ** 0.5)
    if slots * grid**2 != tokens:
        raise ValueError(f"no word targets for a connector with {tokens} tokens")
    return slots, grid


def _show(clip: WorldClip, moments: Sequence[float], grid: int) -> list[list[Thing | None]]:
    """Find the thing that covers most of each cell during some moments."""
    covered: dict[Thing, np.ndarray] = {}
    for moment in moments:
        for item in clip.placed(moment):
            pixels = draw_silhouette(item, grid * _CELL)
            share = pixels.reshape(grid, _CELL, grid, _CELL).mean((1, 3)) / len(moments)
            covered[item.thing] = covered.get(item.thing, 0) + share
    shown: list[list[Thing | None]] = [[None] * grid for _ in range(grid)]
    most = np.full((grid, grid), _SHOWN)
    for thing, share in covered.items():
        for row, column in np.argwhere(share > most):
            shown[row][column] = thing
        most = np.maximum(most, share)
    return shown


def _third(names: Sequence[tuple[str, ...]], at: int, grid: int) -> tuple[str, ...]:
    return names[at * len(names) // grid]
