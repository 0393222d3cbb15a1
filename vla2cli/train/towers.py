"""The stage before the paper's: both towers learn, from nothing, what each of their patches shows.

The public towers were trained by others on what no one here has. These see crowded pictures of the
drawn world and hear its sounds; linear heads name the kind, shape, colour, centre and scene of each
patch and the sound of each moment, and are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from vla2_models.beats_design import NUM_MEL_BINS
from vla2_models.config import CheckpointConfig
from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.errors import UsageError
from vla2cli.preprocess import FrameGeometry, fbank, normalise
from vla2cli.world.clip import WorldClip
from vla2cli.world.crowd import (
    COLOUR_NAMES,
    KINDS,
    SCENE_NAMES,
    SHAPE_NAMES,
    UNNAMED,
    draw_crowd,
)
from vla2cli.world.damage import spoil
from vla2cli.world.vocabulary import SOUNDS

_SOUND_NAMES = (None, *SOUNDS)  # None: silence
# classes of each head of the vision tower, and what its loss counts; the sound's counts 1
_PICTURE_HEADS = {
    "kinds": (len(KINDS) + 1, 1.0),
    "shapes": (len(SHAPE_NAMES), 0.5),
    "colours": (len(COLOUR_NAMES) + 1, 0.5),
    "centres": (2, 0.3),
    "scenes": (len(SCENE_NAMES), 0.1),
}
_ROW_S = 0.01  # from one row of the fbank to the next
# ears learn ten sounds long before eyes thirty objects: for so many pictures they get a sound
_PICTURES_PER_SOUND = 4


@dataclass(frozen=True)
class TowerSample:
    """A picture, for some a sound that has nothing to do with it, and what is in them."""

    pixel_values: Tensor  # (3, S, S) float32
    kinds: Tensor  # (N,) int64, as are the next three
    shapes: Tensor
    colours: Tensor
    centres: Tensor
    scenes: Tensor  # (N,), the same for each patch
    fbank: Tensor | None = None  # (R, 128) bfloat16
    sounds: Tensor | None = None  # (rows of patches,) int64, 0 for silence


class TowerSamples(Dataset[TowerSample]):
    """Pictures and sounds of the world, of each epoch others.

    Args:
        config: of the checkpoint whose towers learn; it has ears.
        geometry: of its frames.
        seed: of the collection.
        count: of pictures in an epoch.

    Raises:
        UsageError: the tower's image leaves a rest beside its patches.
    """

    def __init__(
        self, config: CheckpointConfig, geometry: FrameGeometry, seed: int, count: int
    ) -> None:
        assert config.audio is not None, "the towers' stage trains both of them"
        self.grid = round(config.num_patches**0.5)
        self.patch_rows = config.audio.design.patch_size
        self.geometry, self.seed, self.count = geometry, seed, count
        if geometry.height % self.grid:
            raise UsageError(
                f"the towers' stage names patches, and an image of {geometry.height} pixels is "
                f"no multiple of {self.grid} patches; take a vision tower whose is"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the pictures of an epoch, counted from 0."""
        self._first = epoch * self.count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> TowerSample:
        index += self._first
        crowd = draw_crowd(self.seed, index, self.geometry.height, self.grid)
        rng = np.random.default_rng([self.seed, index, 1])
        pixels = normalise(spoil(crowd.frame[None], rng), self.geometry)[0]
        kinds, shapes, colours, centres = (
            torch.from_numpy(labels.ravel())
            for labels in (crowd.kinds, crowd.shapes, crowd.colours, crowd.centres)
        )
        scenes = torch.full((self.grid**2,), crowd.scene)
        sample = TowerSample(torch.from_numpy(pixels), kinds, shapes, colours, centres, scenes)
        if index % _PICTURES_PER_SOUND:
            return sample
        clip = WorldClip(self.seed, index, "train")
        rows = fbank(clip.track())
        seconds = middles(len(rows) // self.patch_rows, self.patch_rows)
        sounds = torch.tensor([_SOUND_NAMES.index(clip.heard_at(second)) for second in seconds])
        return replace(sample, fbank=rows, sounds=sounds)


def middles(num_rows: int, patch_rows: int) -> list[float]:
    """List the second in the middle of each row of patches, of `patch_rows` rows of the fbank."""
    return [(row + 0.5) * patch_rows * _ROW_S for row in range(num_rows)]


def collate_towers(samples: Sequence[TowerSample]) -> dict[str, Any]:
    """Stack samples to what `TowerTask.forward` takes; `fbank` and `sounds` of those that have."""
    batch = {
        name: torch.stack([getattr(sample, name) for sample in samples])
        for name in ("pixel_values", *_PICTURE_HEADS)
    }
    for name in ("fbank", "sounds"):
        given = [getattr(sample, name) for sample in samples if sample.fbank is not None]
        if given:
            batch[name] = torch.stack(given)
    return {**batch, "labels": batch["kinds"], "skipped": []}


class TowerTask(nn.Module):
    """Both towers of a model with heads that name what their patches show.

    Args:
        model: the networks; the towers among them are trained.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: VideoLLaMA2) -> None:
        super().__init__()
        assert model.audio_tower is not None, "the towers' stage trains both of them"
        self.model = model
        width, ears_width = model.config.mm_hidden_size, model.audio_tower.design.hidden_size
        self.patch_size = model.audio_tower.design.patch_size
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, num) for name, (num, _) in _PICTURE_HEADS.items()}
        )
        self.sound_head = nn.Linear(ears_width, len(_SOUND_NAMES))

    def forward(
        self,
        pixel_values: Tensor,
        fbank: Tensor | None = None,
        sounds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **labels: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the sum of all heads' losses, each a mean over patches.

        Args:
            pixel_values: (B, 3, S, S).
            fbank: (b, R, 128), b at most B; None in a batch without sound.
            sounds: (b, rows of patches), None likewise.
            num_items_in_batch: learned labels of the whole step, as `transformers.Trainer` counts.
            labels: (B, N) for each of the picture's heads.

        Returns:
            `loss`, and when the module is evaluated each head's logits (B, N, classes).
        """
        features = self.norm(self.model.encode_frames(pixel_values))
        logits = {name: head(features) for name, head in self.heads.items()}
        loss = torch.zeros((), device=features.device)
        for name, (_, weight) in _PICTURE_HEADS.items():
            loss = loss + weight * _cross_entropy(logits[name], labels[name])
        if fbank is None or sounds is None:
            # other processes wait for the ears' gradients
            blank = torch.zeros(1, self.patch_size, NUM_MEL_BINS)
            loss = loss + 0.0 * self.sound_head(self.model.encode_sound(blank)).sum()
        else:
            logits["sounds"] = self.sound_head(self.model.encode_sound(fbank))
            patches = NUM_MEL_BINS // self.patch_size  # of one moment
            truth = sounds.repeat_interleave(patches, dim=1)
            loss = loss + _cross_entropy(logits["sounds"], truth)
        if num_items_in_batch is not None:
            loss = loss * ((labels["labels"][:, 1:] != UNNAMED).sum() / num_items_in_batch)
        return {"loss": loss} if self.training else {"loss": loss, **logits}


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    total = functional.cross_entropy(
        logits.float().flatten(0, 1), truth.flatten(), ignore_index=UNNAMED, reduction="sum"
    )
    return total / (truth != UNNAMED).sum().clamp(min=1)
