"""Prompts for the engine, and what transformers says behind each of them alone."""

import functools

import torch
from transformers import GenerationConfig

from tests.tiny import tiny_language_model
from vla2cli.config import GenerationSettings
from vla2cli.engines.base import Request, Shared

WIDTH = 64  # of `tiny_language_model`
NEVER = 10**6  # an id that nothing says
ENDS = (2, 7, 11, 23, 42, 60, 77, 90)  # so many that texts end early, late and not at all
# a window that is shorter than most prompts, in all layers or in all but one
MODELS = {
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 6}),
    "mixtral": ("mixtral", {}),
    "mixtral, window": ("mixtral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": (
        "qwen2",
        {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    ),
}
SIZES = (9, 1, 33, 10, 2, 70, 31, 12, 5, 140, 8)
LENGTHS = (3, 20, 1, 14, 30, 5, 2, 25, 9, 12, 17)


@functools.cache
def model_of(name):
    """A model of `MODELS`, the same one each time; not to be changed."""
    family, changes = MODELS[name]
    return tiny_language_model(family, **changes)


def random_prompt(size, seed=0):
    """A prompt of no meaning, (size, D)."""
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(1000 * seed + size))


def settings_of(length, **changes):
    return GenerationSettings(**({"eos_token_ids": ENDS, "max_new_tokens": length} | changes))


def ragged(penalty=1.0):
    """Prompts of many lengths whose texts may become of many others."""
    return [
        Request(random_prompt(size, seed), settings_of(length, repetition_penalty=penalty))
        for seed, (size, length) in enumerate(zip(SIZES, LENGTHS, strict=True))
    ]


def sharing(key, num, *, length=50, tail=4, max_new_tokens=6):
    """Prompts that begin alike and end each in its own way."""
    beginning = random_prompt(length, seed=hash(key) % 97)
    return [
        Request(
            torch.cat([beginning, random_prompt(tail, seed=200 + i)]),
            settings_of(max_new_tokens),
            shared=Shared(key, length),
        )
        for i in range(num)
    ]


def by_transformers(model, requests):
    """The ids of transformers' own `generate` for each prompt by itself."""
    found = []
    for request in requests:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=request.settings.max_new_tokens,
            repetition_penalty=request.settings.repetition_penalty,
            eos_token_id=list(request.settings.eos_token_ids) or NEVER,
            pad_token_id=0,
        )
        embeds = request.inputs_embeds[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        with torch.inference_mode():
            ids = model.generate(
                inputs_embeds=embeds, attention_mask=mask, generation_config=config
            )
        found.append(tuple(ids[0].tolist()))
    return found


def logprobs_of(model, embeds, ids):
    """The log-probability of each id by one plain pass over prompt and ids."""
    table = model.get_input_embeddings()
    with torch.inference_mode():
        whole = torch.cat([embeds, table(torch.tensor(ids))])[None]
        logprobs = model(inputs_embeds=whole).logits[0].float().log_softmax(-1)
    before = range(len(embeds) - 1, len(embeds) - 1 + len(ids))
    return [float(logprobs[position, i]) for position, i in zip(before, ids)]


def work_off(engine, requests):
    """Give the engine requests; return what comes back of each in order, exceptions as well."""
    tickets = [engine.submit(request) for request in requests]
    results = {}
    while engine.num_open:
        assert engine.num_wanted >= 0
        results |= dict(engine.step())
    return [results[ticket] for ticket in tickets]


def ids_of(results):
    return [result.ids for result in results]
