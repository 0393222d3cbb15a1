"""Print what hearing costs, clip by clip, beside what looking costs.

    python tests/bench/sound.py [VIDEO]

Every pair is measured side by side in this process, interleaved, medians of several runs:

    read       a decoding process reads VIDEO with and without its sound, 16 frames of it;
               VIDEO is by default one of ten seconds that is made here, H.264 and AAC
    fbank      the sound that was read, to log-mel energies
    towers     BEATs at its public size on 30 s of sound, beside SigLIP so400m at 384 pixels on one
               frame, of which a clip has 16; both as a share of a large product's FLOP/s
    prefill    one decoder layer of Qwen2-7B on a prompt with 1,496 audio tokens and without

Weights are random. Times are this machine's; the ratios are what can be compared.
"""
# ruff: noqa: T201  it prints a table for people

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vla2_models.beats import BEATs
from vla2_models.sizes import BEATS, LANGUAGE_MODELS, TOWERS
from vla2_models.sound import SAMPLE_RATE, SoundWindow
from vla2cli.bench.clip import make_video
from vla2cli.inputs import Item
from vla2cli.media.pool import DecodePool
from vla2cli.media.records import Clip, Sound
from vla2cli.plan import Sampling
from vla2cli.preprocess import FrameGeometry, fbank

NUM_FRAMES = 16
GEOMETRY = FrameGeometry(384, 384, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
WINDOW = SoundWindow()
SIGLIP = SiglipVisionConfig(
    **{**TOWERS["google/siglip-so400m-patch14-384"].config, "num_hidden_layers": 26},
    vision_use_head=False,  # and the last of its 27 layers is not run
)
QWEN2_LAYER = Qwen2Config(
    **{**LANGUAGE_MODELS["Qwen/Qwen2-7B-Instruct"], "num_hidden_layers": 1, "vocab_size": 8}
)
VISUAL_TOKENS, AUDIO_TOKENS, WORDS = 1352, 1496, 40
PRODUCT = 2048  # edge of the matrices that the FLOP/s are measured with

Seconds = Callable[[], float]


def main(video: str | None = None) -> None:
    """Measure and print every pair."""
    with tempfile.TemporaryDirectory() as folder:
        path = video or make_video(Path(folder) / "clip.mp4")
        sound = print_reading(path)
    waveform = sound.waveform
    fbank_s = measure(lambda: fbank(waveform), num=7)
    print(f"fbank    {1e3 * fbank_s:8.1f} ms for {WINDOW.duration_s:g} s")
    with torch.inference_mode():
        print_towers()
        print_prefill()


def print_reading(path: str) -> Sound:
    """Compare a decoding process with and without sound; return the sound."""
    item = Item("clip", path, "video")
    clips: dict[str, Clip] = {}
    with DecodePool(1) as pool:

        def read(modality: str) -> float:
            request = Sampling(NUM_FRAMES, modality=modality).request(item, GEOMETRY, WINDOW)
            clips[modality] = pool.submit(request).result()
            return clips[modality].timings_s["read"]

        seen, both = interleave(lambda: read("video"), lambda: read("av"), num=9)
    print(
        f"read     {1e3 * seen:8.1f} ms pictures, {1e3 * both:.1f} ms with sound "
        f"(x {both / seen:.2f}); {clips['av'].duration_s:.1f} s of video"
    )
    assert clips["av"].sound is not None, "av hears every video"
    return clips["av"].sound


def print_towers() -> None:
    """Compare BEATs with a frame of SigLIP, and both with a large product."""
    torch.manual_seed(0)
    beats, siglip = BEATs(BEATS).eval(), SiglipVisionModel(SIGLIP).eval()
    sound = torch.randn(1, WINDOW.num_frames, 128)
    frame = torch.randn(1, 3, 384, 384)
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    heard, seen, product = interleave(
        timed(lambda: beats(sound)), timed(lambda: siglip(frame)), timed(lambda: a @ b), num=5
    )
    limit = 2 * PRODUCT**3 / product
    shares = [
        flops(tower, tokens) / time_s / limit
        for tower, tokens, time_s in (
            (beats, AUDIO_TOKENS, heard),
            (siglip, 27 * 27, seen),
        )
    ]
    print(
        f"towers   {heard:8.2f} s BEATs ({shares[0]:.0%} of {limit / 1e9:.0f} GFLOP/s), "
        f"{seen:.2f} s for one frame ({shares[1]:.0%}): a sound costs "
        f"{heard / seen:.2f} frames, {heard / (NUM_FRAMES * seen):.1%} of {NUM_FRAMES}"
    )


def print_prefill() -> None:
    """Compare one decoder layer on a prompt with and without audio tokens."""
    layer = Qwen2ForCausalLM(QWEN2_LAYER).eval().model
    short, long = (
        torch.randn(1, num_tokens, QWEN2_LAYER.hidden_size)
        for num_tokens in (VISUAL_TOKENS + WORDS, VISUAL_TOKENS + AUDIO_TOKENS + WORDS)
    )
    seen, both = interleave(
        timed(lambda: layer(inputs_embeds=short)), timed(lambda: layer(inputs_embeds=long)), num=3
    )
    print(
        f"prefill  {seen:8.2f} s a layer for {short.shape[1]} tokens, {both:.2f} s for "
        f"{long.shape[1]} with sound (x {both / seen:.2f})"
    )


def flops(tower: torch.nn.Module, num_tokens: int) -> float:
    """Count a tower's work: its products with weights, and of tokens with tokens."""
    linears = [module for module in tower.modules() if isinstance(module, torch.nn.Linear)]
    config = (BEATS.num_layers, BEATS.hidden_size)
    if isinstance(tower, SiglipVisionModel):
        config = (SIGLIP.num_hidden_layers, SIGLIP.hidden_size)
    attention = 4 * config[0] * num_tokens**2 * config[1]
    return 2 * num_tokens * sum(linear.weight.numel() for linear in linears) + attention


def interleave(*runs: Seconds, num: int) -> list[float]:
    """Return the median seconds of each, taken in turns after one that does not count."""
    rounds = [[run() for run in runs] for _ in range(num + 1)][1:]
    return [median(times) for times in zip(*rounds, strict=True)]


def measure(run: Callable[[], object], *, num: int) -> float:
    """Return the median seconds of one."""
    return interleave(timed(run), num=num)[0]


def timed(run: Callable[[], object]) -> Seconds:
    """Make a function that says how long another took."""

    def seconds() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return seconds


if __name__ == "__main__":
    assert WINDOW.num_samples == 30 * SAMPLE_RATE
    main(*sys.argv[1:2])
