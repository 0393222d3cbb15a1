"""Time the pass that says one token of each row on a GPU: as it stands, and recorded.

    python tests/bench/passes.py

A random Mistral of 7 B parameters in bfloat16, rows of 1,200 positions each. `attention` is
PyTorch's function, or the two products of `vla2cli.engines.attention`, which recordings use. The
share is that of one read of the weights and of all keys and values.
"""
# ruff: noqa: T201  it prints a table for people

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import MistralConfig, MistralForCausalLM

from vla2cli.bench.machine import describe_device
from vla2cli.bench.work import token_bytes
from vla2cli.engines.graphs import Decode, DecodeGraphs
from vla2cli.engines.passes import Passes

NUM_POSITIONS = 1200
REPEATS = 10
CUDA = torch.device("cuda")


@torch.inference_mode()
def main() -> None:
    """Print a line for each number of rows and each way."""
    with CUDA:
        torch.set_default_dtype(torch.bfloat16)
        model = MistralForCausalLM(MistralConfig(sliding_window=None)).eval()
        torch.set_default_dtype(torch.float32)
    large = torch.ones(2**28, device=CUDA)
    gb_s = large.nbytes / 1e9 / seconds(large.sum)
    del large
    print(f"{describe_device(CUDA)}; torch {torch.__version__}; memory is read at {gb_s:.0f} GB/s")
    print("rows attention   plain ms  recorded   share  ms to record")
    for num_rows in (8, 32):
        weights = token_bytes(model.config, 0, 2)
        cached = num_rows * (token_bytes(model.config, NUM_POSITIONS, 2) - weights)
        passes = filled(model, num_rows)
        ways = {"PyTorch": passes._decode, "products": passes._decode_by_products}
        for name, decode in ways.items():
            plain_s, record_s, recorded_s = measure(decode, passes, num_rows)
            share = (weights + cached) / 1e9 / gb_s / recorded_s
            print(
                f"{num_rows:4} {name:10} {plain_s * 1e3:9.2f} {recorded_s * 1e3:9.2f} "
                f"{share:7.2f} {record_s * 1e3:13.0f}"
            )


def measure(decode: Decode, passes: Passes, num_rows: int) -> tuple[float, float, float]:
    """Return the seconds of a plain pass, of recording it, and of a recorded one."""
    tokens, places = [5] * num_rows, [NUM_POSITIONS] * num_rows
    given, positions = (torch.tensor(n, device=CUDA)[:, None] for n in (tokens, places))
    graphs = DecodeGraphs(decode, passes.cache, CUDA)
    return (
        seconds(lambda: decode(given, positions, NUM_POSITIONS + 1)),
        seconds(lambda: graphs(tokens, places), repeats=1, num_warm=0),
        seconds(lambda: graphs(tokens, places)),
    )


def filled(model: MistralForCausalLM, num_rows: int) -> Passes:
    """Read a random prompt into each row; print how long one takes."""
    passes = Passes(model, num_rows, CUDA)
    shape = (NUM_POSITIONS, model.config.hidden_size)
    prompt = torch.randn(shape, device=CUDA, dtype=torch.bfloat16) * 0.02
    for slot in range(num_rows):
        passes.prefill(slot, [prompt], 0)
    print(f"prefill of one prompt: {seconds(lambda: passes.prefill(0, [prompt], 0)) * 1e3:.1f} ms")
    return passes


def seconds(run: Callable[[], object], repeats: int = REPEATS, num_warm: int = 1) -> float:
    """Return the median time of a call, the GPU's work included."""
    times = []
    for i in range(num_warm + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times += [time.perf_counter() - started] if i >= num_warm else []
    return median(times)


if __name__ == "__main__":
    sys.exit("passes: no CUDA device") if not torch.cuda.is_available() else main()
