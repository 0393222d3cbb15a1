"""The drawn world as training data: clips as they are needed, without files.

Beside the conversations about a clip there are **word targets**: for each token of the connector
and of the audio projector the words of what it shows and where, or of what it hears and when. A
language model that has never seen text learns from them at once what a token means.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vla2_models.beats_design import NUM_MEL_BINS
from vla2_models.config import CheckpointConfig
from vla2_models.sound import SoundWindow
from vla2_models.stc import grid_side
from vla2cli.errors import UsageError
from vla2cli.media.sampling import uniform_indices
from vla2cli.preprocess import FrameGeometry, fbank, fit_frame, normalise
from vla2cli.tokenizer import Tokenizer
from vla2cli.train.conversation import IGNORED, Form, Row, Utterance, build_row
from vla2cli.train.media import Media
from vla2cli.train.samples import Sample
from vla2cli.train.spelling import Speller
from vla2cli.train.towers import middles
from vla2cli.world.clip import WorldClip
from vla2cli.world.damage import spoil
from vla2cli.world.encode import NUM_FRAMES, SIDE
from vla2cli.world.facts import DURATION_S, Thing, open_words
from vla2cli.world.picture import draw_silhouette
from vla2cli.world.vocabulary import SCENES
from vla2cli.world.words import Question

NUM_WORDS = 8  # targets of one token at most

# how often a clip is seen with its sound, without, only heard, or as a still picture
_MEDIA = {"av": 0.7, "video": 0.12, "audio": 0.12, "image": 0.06}
_STILL_PLOTS = ("stands", "count")
_SIDES = (112, 160, 224, SIDE)  # that clips are drawn at, before they are fitted
_CELL = 16  # pixels of a connector's cell where silhouettes are measured
_SHOWN = 0.1  # of a cell, from which on its token is to name a thing
_ACROSS = (("left",), ("left", "middle"), ("right", "middle"), ("right",))
_DOWN = (("top",), ("top", "middle"), ("bottom", "middle"), ("bottom",))
_WHEN = ("beginning", "halfway", "end")

Name = TypeVar("Name")


def check_world(config: CheckpointConfig, medium: str | None) -> None:
    """Refuse a model that the world's clips, or words for their tokens, do not fit.

    Args:
        config: of the checkpoint.
        medium: what it is given of clips; None: now this, now that.

    Raises:
        UsageError: naming the way out.
    """
    if config.connector.kernel is None or config.connector.padding:
        raise UsageError(
            f"world names what a connector's tokens show, and those of '{config.projector_type}' "
            "are no blocks of patches; take stc_connector_v35, stp_connector or spatial_pool"
        )
    if medium == "video":
        return
    if config.audio is None:
        raise UsageError(
            "world gives the sound of clips, but the model has no audio tower; set world.medium to "
            "video"
        )
    if config.audio.window != SoundWindow(DURATION_S, 1, DURATION_S):
        raise UsageError(
            f"world's clips last {DURATION_S:g} s, but the model hears "
            f"{config.audio.window.duration_s:g} s at once in {config.audio.window.num_clips} "
            "pieces; set world.medium to video"
        )


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
            side = SIDE if rng is None else int(rng.choice(_SIDES))
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
        indices = uniform_indices(NUM_FRAMES, self.config.num_frames)  # of the clip as a file
        return [(int(i) + 0.5) / NUM_FRAMES for i in indices]

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
        assert self.config.connector.kernel is not None, "see `check_world`"
        stride, rows, _ = self.config.connector.kernel
        grid = grid_side(self.config.num_patches) // rows
        background = SCENES[clip.facts.scene].rsplit(" ", 1)[1]
        words = []
        # frames that fill no block make no token
        for start in range(0, len(moments) - stride + 1, stride):
            shown = _show(clip, moments[start : start + stride], grid)
            for row in range(grid):
                for column in range(grid):
                    thing = shown[row][column]
                    where = [*_part(_ACROSS, column, grid), *_part(_DOWN, row, grid)]
                    words.append([background] if thing is None else [thing.noun, *where])
        return words

    def _heard(self, clip: WorldClip) -> list[list[str]]:
        assert self.config.audio is not None, "a sound for a model without ears"
        patch = self.config.audio.design.patch_size
        num_rows = self.config.audio.window.num_frames // patch
        words = []
        for row, second in enumerate(middles(num_rows, patch)):
            sound = clip.heard_at(second)
            heard = ["silent"] if sound is None else [sound, _part(_WHEN, row, num_rows)]
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
        medium: what of a clip is given; None: drawn for each, a still picture only of what stands.
        is_spoiled: whether frames are damaged as by a codec.
        spelled: share of the conversations whose words are cut into smaller pieces.
        apart: share of the shapes that have the form or the colour alone.
        leaves_open: whether nothing is said about pairs that training lacks, see `open_words`.
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
        spelled: float = 0.0,
        apart: float = 0.0,
        leaves_open: bool = False,
    ) -> None:
        self.reader, self.seed, self.count = reader, seed, count
        self.num_questions, self.split = num_questions, split
        self.medium, self.is_spoiled = medium, is_spoiled
        self.apart, self.leaves_open = apart, leaves_open
        self.spelled, self._speller = spelled, Speller(reader.tokenizer)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the clips of an epoch, counted from 0: each has clips of its own."""
        self._first = epoch * self.count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        clip = WorldClip(self.seed, self._first + index, self.split, apart=self.apart)
        rng = np.random.default_rng([self.seed, clip.index, 2])
        medium = self.medium or _draw_medium(clip, rng)
        caption, *others = clip.questions("video" if medium == "image" else medium)
        order = rng.permutation(len(others))[: self.num_questions - 1]
        questions = [caption, *(others[int(i)] for i in order)]
        if medium == "image":
            questions = [_of_image(question) for question in questions]
        media = self.reader.media(clip, medium, rng if self.is_spoiled else None)
        sample = self.reader.sample(clip, medium, questions, media)
        if self.leaves_open and medium != "audio":
            sample = _leave_open(sample, open_words(clip.facts.things), self.reader.tokenizer)
        rows = (
            self._speller.spell(row, rng) if rng.random() < self.spelled else row
            for row in sample.rows
        )
        return replace(sample, rows=tuple(rows))


def _draw_medium(clip: WorldClip, rng: np.random.Generator) -> str:
    medium = str(rng.choice(list(_MEDIA), p=list(_MEDIA.values())))
    # what moves or comes and goes cannot be told from one picture
    return "av" if medium == "image" and clip.facts.plot not in _STILL_PLOTS else medium


def _of_image(question: Question) -> Question:
    return replace(question, text=question.text.replace("video", "image"))


def _show(clip: WorldClip, moments: Sequence[float], grid: int) -> list[list[Thing | None]]:
    """Find the thing that covers most of each cell during some moments."""
    covered: dict[Thing, NDArray[np.float64]] = {}
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


def _leave_open(sample: Sample, words: Collection[str], tokenizer: Tokenizer) -> Sample:
    """Take words out of what a sample teaches, wherever each is one piece."""
    left_open = {i for word in words for i in tokenizer.whole_word(word)}
    ids = torch.tensor(sorted(left_open), dtype=torch.int64)
    rows = tuple(
        Row(row.input_ids, tuple(IGNORED if i in left_open else i for i in row.labels))
        for row in sample.rows
    )
    assert sample.word_targets is not None
    targets = sample.word_targets.masked_fill(torch.isin(sample.word_targets, ids), IGNORED)
    return replace(sample, rows=rows, word_targets=targets, left_open=ids)


def _part(names: Sequence[Name], at: int, num: int) -> Name:
    """Name the part of a whole of `num` in which one of them is."""
    return names[at * len(names) // num]
