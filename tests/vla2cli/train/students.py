"""Tiny networks to train, and clips made of noise that need no file."""

import copy
import functools

import torch

from tests.tiny import SHORT_WINDOW, write_tiny
from vla2_models.checkpoint import open_checkpoint
from vla2_models.hub import Source
from vla2_models.loading import load_model
from vla2cli.console import Console
from vla2cli.train.collate import Collator
from vla2cli.train.config import make_config
from vla2cli.train.conversation import IGNORED, Row
from vla2cli.train.media import Media
from vla2cli.train.run import make_student
from vla2cli.train.samples import Sample, Skipped
from vla2cli.train.start import open_start
from vla2cli.train.trainer import run_training

NUM_FRAMES, SIDE = 2, 56
QUIET = Console(quiet=True)
# a checkpoint that the drawn world fits: tokens that are blocks of patches, five seconds of sound
FOR_WORLD = {
    "num_frames": 8,
    "mm_projector_type": "stc_connector_v35",
    "mm_audio_window_s": 5,
    "mm_audio_num_clips": 1,
    "mm_audio_clip_s": 5,
}
COLLATOR = Collator(pad_token_id=2, max_length=64)
SETTINGS = {
    "batch": 2,
    "warmup_ratio": 0,
    "learning_rate": 1e-3,
    "workers": 0,
    "precision": "float32",
    "gradient_checkpointing": False,
}


class Clips(torch.utils.data.Dataset):
    """So many samples of noise, with sound; those whose numbers are `bad` cannot be used."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            return Skipped(f"clip {index}", "no such file")
        return Sample((f"clip {index}",), (row(index),), media(index))


@functools.cache
def media(seed):
    generator = torch.Generator().manual_seed(seed)
    return Media(
        pixel_values=torch.randn(NUM_FRAMES, 3, SIDE, SIDE, generator=generator),
        fbank=torch.randn(1, 48, 128, generator=generator),
    )


def row(seed):
    generator = torch.Generator().manual_seed(seed)
    answer = torch.randint(260, 500, (4 + seed % 3,), generator=generator).tolist()
    asked = (1, 300 + seed % 20, -201, 301)
    return Row((*asked, *answer, 2), (*(IGNORED for _ in asked), *answer, 2))


def write_student(hub_dir, **changes):
    """Write a checkpoint with ears for `hub_dir`; return its name there."""
    fields = {"num_frames": NUM_FRAMES, **SHORT_WINDOW, **changes}
    folder = write_tiny(hub_dir, has_ears=True, **fields)
    return folder.relative_to(hub_dir).as_posix()


def configured(hub_dir, output, stage="joint", **settings):
    """A configuration for a tiny checkpoint, without files of samples."""
    model = settings.pop("model", None) or write_student(hub_dir)
    content = {"model": model, "stage": stage, "output": str(output)}
    return make_config({**content, **SETTINGS, **settings})


def student_of(config, hub_dir):
    return make_student(config, open_start(config, Source(hub_dir)))


def run(config, hub_dir, dataset=None, console=QUIET, **more):
    """Train a student on noise; return it and what `run_training` returns."""
    student = student_of(config, hub_dir)
    dataset = Clips(8) if dataset is None else dataset
    trained = run_training(config, student.network, dataset, COLLATOR, console, **more)
    return student, trained


def logits_of(model, seed=0):
    """(L, V) of one sample, from networks that are not trained any more.

    They are copied first: products of a memory-mapped weight, which lies anywhere, are rounded in
    another order than those of one that begins on a cache line.
    """
    model = copy.deepcopy(model)
    collated = COLLATOR([Sample(("a",), (row(seed),), media(seed))])
    clip = collated["media"][0]
    with torch.no_grad():
        visual = model.project(model.encode_frames(clip.pixel_values)[None])[0]
        audio = model.project_sound(model.encode_sound(clip.fbank))[0]
        embeds = model.splice(row(seed).input_ids, [torch.cat([visual, audio])])
        return model.language_model(inputs_embeds=embeds[None]).logits[0]


def loaded(folder, hub_dir):
    """The networks of a folder, as `vla2 --model` has them."""
    return load_model(open_checkpoint(str(folder), Source(hub_dir)), dtype=torch.float32)
