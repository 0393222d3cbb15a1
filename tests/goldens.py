"""Where the reference's numbers are: the part in this repository, else the optional full set."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla2_models.hub import Source
from vla2cli.engine import Engine
from vla2cli.media.frames import read_frames
from vla2cli.preprocess import fit_frame, normalise

torch.set_num_threads(1)  # as in tests/tiny.py

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("VLA2_SHARED", HERE.parents[1] / "shared")).resolve()

# every run of the reference: a checkpoint and what was asked of it
RUNS = [
    *[("mistral_clip_stc_8f", run) for run in ("cap", "qa", "img", "txt", "mt", "range")],
    ("mistral_clip_stc_16f_336", "cap"),
    ("mistral_clip_stc_8f_Base", "cap"),
    ("mistral_clip_stc_8f_lora", "cap"),
    *[("mixtral_clip_stc_8f", run) for run in ("cap", "qa", "img")],
    *[("qwen2_siglip_stcv35_16f", run) for run in ("cap", "qa", "img", "txt")],
    ("qwen2_siglip_stcv35_16f_384", "cap"),
]

# the runs of the audio-visual checkpoint
AV_RUNS = ("audio", "video", "av", "av_long", "av_silent", "av_short")
AV_CHECKPOINT = "VideoLLaMA2.1-tiny-AV"

# how far our float32 results may be from the reference's: about ten times the spread between
# attention implementations, and between float32 and float64, that was measured on the reference
ATOL = {
    "pixel_values": 1e-6,
    "vision_features": 1e-4,
    "projector_tokens": 2e-4,
    "beats_features": 2e-4,
    "audio_tokens": 2e-4,
    "inputs_embeds": 2e-4,
    "first_logits": 2e-4,
    "step_logits": 2e-4,
}


def assert_stages_match(title, found, expected):
    """Print the worst difference of each stage (`pytest -s` shows them), then hold it to `ATOL`."""
    for stage, tensor in found.items():
        worst = (tensor - expected[stage]).abs().max()
        print(f"\n{title:30} {stage:17} {worst:.1e}", end="")  # noqa: T201  a table for people
    for stage, tensor in found.items():
        torch.testing.assert_close(tensor, expected[stage], atol=ATOL[stage], rtol=0)


def golden(relative):
    """Return the path of a golden file or folder; skip the test where there is none."""
    return _find(relative, [HERE / "golden", SHARED / "golden/vision"])


def golden_audio(relative):
    """Return the path of a golden file of the audio-visual set; skip where there is none."""
    return _find(relative, [HERE / "golden/audio", SHARED / "golden/audio"])


def media(name):
    """Return the path of a real clip; skip the test where there is none."""
    return _find(name, [SHARED / "media"])


def spec(name):
    """Return the path of a table about the public checkpoints; skip where there is none."""
    return _find(name, [SHARED / "spec"])


def runs_of(case):
    return json.loads(golden(f"data/{case}.json").read_text(encoding="utf-8"))["runs"]


def tensors_of(case, run):
    return load_file(golden(f"data/{case}.{run}.safetensors"))


@functools.cache
def golden_engine(case):
    """An engine on a golden checkpoint, in float32 on the CPU; not to be changed."""
    folder = golden(f"checkpoints/{case}/config.json").parent
    hub_dir = folder.parents[1] / "towers"
    return Engine.load(str(folder), hub_dir=hub_dir, device="cpu", dtype="float32")


@functools.cache
def golden_av_engine():
    """An engine on the golden checkpoint with ears; not to be changed."""
    folder = golden_audio(f"{AV_CHECKPOINT}/config.json").parent
    return Engine.load(str(folder), hub_dir=folder.parent, device="cpu", dtype="float32")


@functools.cache
def about_av(run):
    """What the reference was asked in a run of the audio-visual set, and what it said."""
    return json.loads(golden_audio("e2e/meta.json").read_text(encoding="utf-8"))[run]


@functools.cache
def tensors_of_av(run):
    """The reference's tensors, with those that the set leaves out because they follow."""
    tensors = load_file(golden_audio(f"e2e/{run}.safetensors"))
    if run == "av_silent":
        silence = torch.full((1, 2998, 128), -15.9375, dtype=torch.bfloat16)
        assert tensors["fbank_bf16"].equal(silence)
        tensors["pixel_values"] = tensors_of_av("video")["pixel_values"]
    if "audio_tokens" not in tensors and run != "video":
        place = tensors["input_ids"].tolist().index(-201)
        num_audio = tensors["beats_features"].shape[1]
        num_media = len(tensors["inputs_embeds"][0]) - len(tensors["input_ids"]) + 1
        media = tensors["inputs_embeds"][:, place : place + num_media]
        tensors["video_tokens"] = media[:, : num_media - num_audio]
        tensors["audio_tokens"] = media[:, num_media - num_audio :]
    return tensors


def golden_source():
    """Where the towers and language models that the golden checkpoints name are."""
    return Source(golden("towers/mistralai").parent)


def pixels_of(case, run):
    """The input of the tower: the stored one, so that no decoder takes part, where it is whole."""
    tensors = tensors_of(case, run)
    if "pixel_values" in tensors:
        return tensors["pixel_values"]
    stored = np.load(golden(f"data/{case}.{run}.crop_u8.npz"))
    crops = np.ascontiguousarray(stored["crop_u8"].transpose(0, 2, 3, 1))
    if len(crops) < len(tensors["frame_indices"]):
        decoded = frames_of(case, run)
        assert np.array_equal(decoded[stored["frame_slots"]], crops)
        crops = decoded
    pixel_values = torch.from_numpy(normalise(crops, golden_engine(case).geometry))
    first = tensors["pixel_values_frame0"]
    torch.testing.assert_close(pixel_values[:1], first, atol=ATOL["pixel_values"], rtol=0)
    return pixel_values


def frames_of(case, run):
    """The frames of the real clip as our media stage makes them: (T, S, S, 3) uint8."""
    geometry = golden_engine(case).geometry
    path = media(runs_of(case)[run]["media"])
    num_frames = len(tensors_of(case, run)["frame_indices"])
    frames = read_frames(str(path), "video", num_frames=num_frames)
    return np.stack([fit_frame(image, geometry) for image in frames.images])


def features_of(case, run):
    """What our tower makes of the stored pixels: (T, N, C)."""
    engine = golden_engine(case)
    (features,) = engine.frontend.vision_features([pixels_of(case, run)])
    is_image = runs_of(case)[run]["modal"] == "image"
    return engine.model.repeat_image(features) if is_image else features


def _find(relative, folders):
    for folder in folders:
        if (folder / relative).exists():
            return folder / relative
    pytest.skip(
        f"no '{relative}': set VLA2_SHARED to the folder with golden/, media/ and spec/",
        allow_module_level=True,
    )
