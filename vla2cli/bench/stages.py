"""The stages from a file to words, each as cases that can be run in turns.

    read, preprocess          one clip through a decoding process, as a batch command reads it
    tower, connector, beats   the front: every front-end in every dtype, plain fp32 always
    prefill, generate         the language model, in every dtype; generate is one token

What stands in one line is measured together and then let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from vla2_models.config import CheckpointConfig
from vla2_models.loading import build_empty
from vla2_models.packed import can_pack, pack_in_place
from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.bench.frontends import FRONTENDS, Variant, weights_dtype
from vla2cli.bench.networks import Networks
from vla2cli.bench.rounds import Case, timed
from vla2cli.bench.work import (
    Work,
    connector_flops,
    frame_shape,
    prefill_flops,
    sound_flops,
    token_bytes,
    tower_flops,
)
from vla2cli.config import GenerationSettings
from vla2cli.engine import DTYPES
from vla2cli.engines.base import Generation, Request, run
from vla2cli.engines.hf import HFEngine
from vla2cli.errors import InputError, ModelError, UsageError
from vla2cli.frontend.base import Frontend
from vla2cli.inputs import Item
from vla2cli.media.pool import DecodePool
from vla2cli.plan import Sampling
from vla2cli.preprocess import FrameGeometry, fbank, normalise

MEDIA = ("read", "preprocess")
FRONT = ("tower", "connector", "beats")
LANGUAGE = ("prefill", "generate")
STAGES = (*MEDIA, *FRONT, *LANGUAGE)

NUM_WORDS = 40  # of the prompt, beside the media
NUM_STEPS = 8  # tokens after the first, of which generate is the mean
MEL_MEAN, MEL_STD = 15.4, 6.6  # of sound, so that BEATs is given what it is used to


def media_cases(config: CheckpointConfig, num_frames: int, video: str) -> Iterator[list[Case]]:
    """Read and fit one clip, with its sound where the model has ears.

    Raises:
        UsageError: the file cannot be used.
    """
    geometry = FrameGeometry.from_config(dict(config.preprocessor))
    window = config.audio.window if config.audio else None
    request = Sampling(num_frames).request(Item("clip", video, "video"), geometry, window)

    def run() -> dict[str, float]:
        clip = pool.submit(request).result()
        assert clip.frames is not None, "a video has frames"
        started = time.perf_counter()
        normalise(clip.frames, geometry)
        if clip.sound is not None:
            assert clip.sound.waveform is not None, "just read"
            fbank(clip.sound.waveform)
        here_s = time.perf_counter() - started
        read_s, fitted_s = (clip.timings_s[stage] for stage in MEDIA)
        return {"read": read_s, "preprocess": fitted_s + here_s}

    with DecodePool(1) as pool:
        try:
            pool.submit(request).result()  # starts the process, whose memory is looked at
        except InputError as error:
            raise UsageError(f"'--video {video}': {error}") from error
        [pid] = pool.worker_pids()
        yield [Case(Variant(), run, dict.fromkeys(MEDIA, Work()), pid=pid)]


def front_cases(
    networks: Networks, variants: Sequence[Variant], stages: Sequence[str], num_frames: int
) -> Iterator[list[Case]]:
    """Run towers and connectors, stage after stage; the weights of a dtype are held once."""
    works = _front_work(networks.config, stages, num_frames)
    models: dict[str, VideoLLaMA2] = {}
    frontends: dict[Variant, Frontend] = {}
    for variant in variants:
        assert variant.frontend is not None, "the front has front-ends"
        assert variant.dtype is not None, "a front-end has a dtype"
        dtype = weights_dtype(variant.dtype)
        if dtype not in models:
            models[dtype] = networks.front(DTYPES[dtype])
        make = FRONTENDS[variant.frontend].make
        frontends[variant] = make(models[dtype], variant.dtype)
    for stage in stages:
        yield [
            _front_case(stage, variant, frontend, networks, num_frames, works[stage])
            for variant, frontend in frontends.items()
        ]


def _front_case(
    stage: str,
    variant: Variant,
    frontend: Frontend,
    networks: Networks,
    num_frames: int,
    work: Work,
) -> Case:
    assert variant.dtype is not None, "a front-end has a dtype"
    dtype = DTYPES[weights_dtype(variant.dtype)]
    seconds = timed(_front_run(stage, frontend, networks, num_frames, dtype), networks.device)
    return Case(variant, lambda: {stage: seconds()}, {stage: work})


def _front_run(
    stage: str, frontend: Frontend, networks: Networks, num_frames: int, dtype: torch.dtype
) -> Callable[[], object]:
    """Give a front-end what it gets in a batch command, made of random numbers."""
    config, generator = networks.config, torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if stage == "tower":
        pixel_values = randn(num_frames, *frame_shape(config))
        return lambda: frontend.vision_features([pixel_values])
    if stage == "connector":
        features = randn(num_frames, config.num_patches, config.mm_hidden_size)
        features = features.to(networks.device, dtype)
        return lambda: frontend.visual_tokens([features])
    assert config.audio is not None, "the checkpoint has no ears"
    rows = randn(1, config.audio.window.num_frames, 128) * MEL_STD + MEL_MEAN
    sound = rows.to(torch.bfloat16)
    return lambda: frontend.listen(sound)


def _front_work(
    config: CheckpointConfig, stages: Sequence[str], num_frames: int
) -> dict[str, Work]:
    model = build_empty(config).to("meta")
    counts: Mapping[str, Callable[[], int]] = {
        "tower": lambda: tower_flops(model, num_frames),
        "connector": lambda: connector_flops(model, num_frames),
        "beats": lambda: sound_flops(model),
    }
    return {stage: Work(gflop=counts[stage]() / 1e9) for stage in stages}


def language_cases(
    networks: Networks, dtypes: Sequence[str], num_frames: int
) -> Iterator[list[Case]]:
    """Run the language model on the tokens of one clip and some words, then for some tokens."""
    config = networks.config
    num_tokens = prompt_tokens(config, num_frames)
    prefill = Work(gflop=prefill_flops(config.language, num_tokens) / 1e9)
    cases = []
    for dtype in dtypes:
        model = networks.language(DTYPES[dtype])
        if can_pack(networks.device, DTYPES[dtype]):  # as in a run
            pack_in_place(model)
        read = token_bytes(config.language, num_tokens, DTYPES[dtype].itemsize)
        work = {"prefill": prefill, "generate": Work(gb=read / 1e9)}
        run = _language_run(model, num_tokens, dtype)
        cases.append(Case(Variant(dtype=dtype), run, work))
    yield cases


def prompt_tokens(config: CheckpointConfig, num_frames: int) -> int:
    """Count the tokens of a prompt about one video, with its sound where there are ears."""
    seen = config.connector.count_tokens(num_frames, config.num_patches)
    heard = config.audio.audio_tokens if config.audio else 0
    return seen + heard + NUM_WORDS


def _language_run(
    model: PreTrainedModel, num_tokens: int, dtype: str
) -> Callable[[], dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(num_tokens, model.config.hidden_size, generator=generator)
    embeds = embeds.to(model.device, model.dtype)
    # no end: the number of tokens has to be known
    settings = GenerationSettings(eos_token_ids=(), max_new_tokens=NUM_STEPS + 1)

    engine = HFEngine(model, 1)

    def say() -> dict[str, float]:
        (generation,) = run(engine, [Request(embeds, settings)])
        assert isinstance(generation, Generation), "nothing is weighed"
        if not generation.is_finite:
            raise ModelError(f"the language model makes no finite numbers in {dtype}")
        return {"prefill": generation.prefill_s, "generate": generation.generate_s / NUM_STEPS}

    return say
