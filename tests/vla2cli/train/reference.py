"""The reference's training batches, and ours of the same conversations."""

import json

import pytest
from safetensors.torch import load_file

from tests.goldens import SHARED, golden
from vla2cli.train.conversation import Utterance
from vla2cli.train.media import Media

CASES = ("mistral_clip_stc_8f", "qwen2_siglip_stcv35_16f")
KINDS = ("video", "image", "text")
PAD_TOKENS = {"mistral_clip_stc_8f": "<unk>", "qwen2_siglip_stcv35_16f": "<|endoftext|>"}


def conversation_of(case, kind):
    """What the reference was given."""
    about = json.loads(golden("data/train_batches.json").read_text(encoding="utf-8"))
    turns = about[f"{case}.{kind}"]["conversations_in"]
    return [Utterance(turn["from"], turn["value"]) for turn in turns]


def losses_of(case):
    """The loss of each sample by itself."""
    about = json.loads(golden("data/train_batches.json").read_text(encoding="utf-8"))
    return about[f"{case}.batch"]["per_sample_loss"]


def batch_of(case):
    """The reference's tensors of a case: the repository's part, with the rest where it is there."""
    tensors = load_file(golden("data/train_batches.safetensors"))
    whole = SHARED / "golden/vision/data/train_batches.safetensors"
    if whole.exists():
        tensors |= load_file(whole)
    return {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{case}.")
    }


def media_of(case):
    """The stored pixels of the three samples."""
    tensors = batch_of(case)
    if "video.pixel_values" not in tensors:
        pytest.skip(f"no pixels of {case}: set VLA2_SHARED to the folder with golden/")
    video, image = tensors["video.pixel_values"], tensors["image.pixel_values"]
    return [Media(pixel_values=video), Media(pixel_values=image, is_image=True), Media()]
