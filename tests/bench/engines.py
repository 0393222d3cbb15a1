"""Compare the engine `hf` with transformers' own generate, on prompts that end at many lengths.

    python tests/bench/engines.py [--dtype bfloat16] [--prompt 160] [--rounds 3]
    python tests/bench/engines.py --size 7b --device cuda --dtype bfloat16 --prompt 1200

A random Mistral of 0.3 B parameters (or 7 B) answers 24 prompts with 8 to 256 tokens each, drawn
with a fixed seed; nothing ends by itself. In turns, each round all of them:

    generate 1   transformers, one prompt at a time
    generate 8   transformers, batches of 8, left-padded and masked, in the order of the prompts
    hf N         the engine with N rows, a free row refilled at once

Only tokens that were asked for count: a batch of generate goes on until its longest text is over.
Rates are tokens per second of processor time on the CPU, of wall clock on CUDA; ratios are of
medians. The last column is the share of the bandwidth of memory that reading the weights, and the
keys and values, takes up while tokens are said: one read of a large tensor is the limit.
"""
# ruff: noqa: T201  it prints a table for people

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from vla2_models.packed import can_pack, pack_in_place
from vla2cli.bench.machine import describe_cpu, describe_device
from vla2cli.bench.work import token_bytes
from vla2cli.config import GenerationSettings
from vla2cli.engines.base import Generation, Request, run
from vla2cli.engines.hf import HFEngine

SIZES = {
    "0.3b": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "7b": {},  # as Mistral-7B
}
NUM_PROMPTS = 24
SHORTEST, LONGEST = 8, 256  # tokens said
READ_BYTES = 2**29


def main(size: str, device: str, dtype: str, num_prompt: int, rows: Sequence[int], rounds: int):
    """Take turns, print the table."""
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        model = MistralForCausalLM(MistralConfig(sliding_window=None, **SIZES[size])).eval()
        torch.set_default_dtype(torch.float32)
    engine_model = copy.deepcopy(model) if can_pack(model.device, model.dtype) else model
    if engine_model is not model:
        pack_in_place(engine_model)
    prompts, lengths = draw(model, num_prompt)
    cases: dict[str, Callable[[], float | None]] = {
        "generate 1": lambda: generate_all(model, prompts, lengths, 1),
        "generate 8": lambda: generate_all(model, prompts, lengths, 8),
    }
    for n in rows:
        cases[f"hf {n}"] = lambda n=n: engine_all(engine_model, prompts, lengths, n)
    seconds = {name: [] for name in cases}
    bandwidth = {name: [] for name in cases}
    limits = []
    for _ in range(rounds):
        limits.append(read_rate(device))
        for name, case in cases.items():
            started = clock(device)
            said_gb_s = case()
            seconds[name].append(clock(device) - started)
            bandwidth[name].append(said_gb_s)
    total = sum(lengths)
    base1, base8 = (median(seconds[name]) for name in ("generate 1", "generate 8"))
    limit = median(limits)
    parameters = sum(p.numel() for p in model.parameters())
    where = describe_cpu() if device == "cpu" else describe_device(torch.device(device))
    print(f"{where}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{parameters / 1e9:.2f} B Mistral, {dtype}; {len(prompts)} prompts of about {num_prompt} "
        f"positions, {total} tokens; memory is read at {limit:.1f} GB/s"
    )
    unit = "CPU-s" if device == "cpu" else "s"
    print(f"{'':12} {unit:>8} {'tok/' + unit:>10} {'x gen 1':>8} {'x gen 8':>8} {'bandwidth':>10}")
    for name, all_s in seconds.items():
        s = median(all_s)
        share = f"{median(bandwidth[name]) / limit:10.0%}" if bandwidth[name][0] else ""
        print(f"{name:12} {s:8.1f} {total / s:10.1f} {base1 / s:8.2f} {base8 / s:8.2f} {share}")


def draw(model: MistralForCausalLM, num_prompt: int) -> tuple[list[Tensor], list[int]]:
    """Draw prompts of different lengths, and how much is said after each."""
    dice = random.Random(0)
    prompts = [
        torch.randn(
            dice.randint(num_prompt * 4 // 5, num_prompt * 6 // 5), model.config.hidden_size
        )
        for _ in range(NUM_PROMPTS)
    ]
    lengths = [min(LONGEST, max(SHORTEST, round(dice.lognormvariate(4.0, 0.8)))) for _ in prompts]
    return [prompt.to(model.device, model.dtype) * 0.02 for prompt in prompts], lengths


@torch.inference_mode()
def generate_all(model, prompts, lengths, batch: int) -> None:
    """Let transformers answer, batch after batch."""
    for first in range(0, len(prompts), batch):
        rows, wanted = prompts[first : first + batch], lengths[first : first + batch]
        longest = max(map(len, rows))
        embeds = torch.stack(
            [torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows]
        )
        mask = torch.ones(len(rows), longest, dtype=torch.long, device=model.device)
        for i, row in enumerate(rows):
            mask[i, : longest - len(row)] = 0
        config = GenerationConfig(
            max_new_tokens=max(wanted), do_sample=False, pad_token_id=0, eos_token_id=None
        )
        said = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
        assert said.shape[1] == max(wanted), "it ended by itself"


def engine_all(model, prompts, lengths, num_rows: int) -> float:
    """Let the engine answer; return the GB/s that were read while tokens were said."""
    engine = HFEngine(model, num_rows)
    settings = [GenerationSettings(eos_token_ids=(), max_new_tokens=n) for n in lengths]
    results = run(engine, [Request(row, how) for row, how in zip(prompts, settings)])
    steps, columns = engine.num_steps, engine.num_columns
    said_s = sum(result.generate_s for result in results if isinstance(result, Generation))
    weights = token_bytes(model.config, 0, model.dtype.itemsize)
    cached = token_bytes(model.config, 1, model.dtype.itemsize) - weights
    return (steps * weights + columns * cached) / 1e9 / said_s


def read_rate(device: str) -> float:
    """Read a large tensor; return GB/s."""
    tensor = torch.ones(READ_BYTES // 4, device=device)
    tensor.sum()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        tensor.sum().item()
        times.append(time.perf_counter() - started)
    return READ_BYTES / 1e9 / median(times)


def clock(device: str) -> float:
    """Return the seconds that count."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.3b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=160)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    main(a.size, a.device, a.dtype, a.prompt, a.rows or [8, 16], a.rounds)
