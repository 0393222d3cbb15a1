"""The stages of training: what each trains, on what kind of text, and with which settings.

    towers           both towers, on the drawn world           labels of patches
    video-pretrain   connector                                 captions alone
    video-finetune   connector, language model                 conversations
    audio-pretrain   audio projector                           captions alone
    audio-finetune   audio projector, audio tower              conversations
    joint            both projectors, language model           conversations

The first is ours, for a model that begins at nothing (see `towers`).

Source: VideoLLaMA 2, arXiv:2406.07476, section 3, for the parts; for the numbers the public scripts
of upstream VideoLLaMA2@c0bb03a, scripts/vllava, and of its branch audio_visual at 8cedfbd,
scripts/custom. Of these va_joint.sh trains the audio tower too, which the paper keeps frozen: the
key `train` of a configuration names the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vla2cli.train.conversation import Form

if TYPE_CHECKING:
    from vla2_models.videollama2 import VideoLLaMA2

# attributes of `VideoLLaMA2`; what hears comes after what sees
CONNECTOR, AUDIO_PROJECTOR = "mm_projector", "mm_projector_a"
VISION_TOWER, AUDIO_TOWER = "vision_tower", "audio_tower"
LANGUAGE_MODEL = "language_model"
PARTS = (VISION_TOWER, CONNECTOR, AUDIO_TOWER, AUDIO_PROJECTOR, LANGUAGE_MODEL)
HEARING = (AUDIO_TOWER, AUDIO_PROJECTOR)


@dataclass(frozen=True)
class Stage:
    """One stage; all but its parts can be set otherwise in a configuration."""

    trained: tuple[str, ...]  # of `PARTS`
    form: Form  # of the texts, see `conversation`
    learning_rate: float
    batch: int  # samples of one step, over all devices
    per_device_batch: int  # as in the scripts, for 80 GB
    epochs: int = 1
    image_aspect_ratio: str | None = None  # pad: images are made square; None: stretched
    va: bool = False  # whether the sound of videos is heard


TOWERS = "towers"
STAGES: Mapping[str, Stage] = {
    TOWERS: Stage((VISION_TOWER, AUDIO_TOWER), "chat", 1e-3, 48, 48),
    "video-pretrain": Stage((CONNECTOR,), "plain", 1e-3, 256, 8),
    "video-finetune": Stage(
        (CONNECTOR, LANGUAGE_MODEL), "chat", 2e-5, 128, 4, image_aspect_ratio="pad"
    ),
    "audio-pretrain": Stage((AUDIO_PROJECTOR,), "plain-caption", 1e-3, 1024, 32),
    "audio-finetune": Stage((AUDIO_TOWER, AUDIO_PROJECTOR), "chat", 2e-5, 128, 4, epochs=2),
    "joint": Stage(
        (CONNECTOR, AUDIO_PROJECTOR, LANGUAGE_MODEL),
        "chat",
        2e-5,
        128,
        4,
        epochs=2,
        image_aspect_ratio="pad",
        va=True,
    ),
}


def freeze_all_but(model: VideoLLaMA2, parts: Collection[str]) -> None:
    """Let gradients reach the named parts of a model alone, and in them what its tokens come from.

    A tower's blocks behind the selected one, and the classes that BEATs tells apart, are of no use
    to the language model: nothing would ever change them.

    Raises:
        ValueError: it has no such part.
    """
    for name in parts:
        if getattr(model, name, None) is None:
            raise ValueError(f"the model has no {name}")
    for name, part in model.named_children():
        part.requires_grad_(name in parts)
    tower = model.vision_tower
    unused = [*tower.encoder.layers[model.config.num_tower_blocks :], tower.post_layernorm]
    for part in (
        *unused,
        getattr(tower, "head", None),
        getattr(model.audio_tower, "predictor", None),
    ):
        if part is not None:
            part.requires_grad_(False)
