"""Print the peak of memory while a sharded checkpoint of at least 2 GB is loaded.

    python tests/bench/loading.py [GIGABYTES]

Random checkpoints of Mistral's and Mixtral's kind, GIGABYTES (2) in bfloat16, are written in shards
of an eighth and loaded, each in a process of its own, as they are stored and as float32. The peak
is the resident set that /proc shows (Linux) beyond what the imports took; pages of the mapped files
count. The limit is the loaded model and one shard. Exits with 1 where a peak is above it.
"""
# ruff: noqa: T201  it prints a table for people

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vla2_models.checkpoint import Checkpoint, open_checkpoint
from vla2_models.hub import Source
from vla2_models.loading import load_model
from vla2_models.miniature import write_miniature
from vla2_models.saving import save_checkpoint

WIDTHS = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
FAMILIES = {
    "mistral": {"model_type": "videollama2_mistral"},
    "mixtral": {
        "model_type": "videollama2_mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BASE_BYTES = 500 * 10**6  # connector, embeddings and tower at these widths, in bfloat16
NUM_SHARDS = 8
SLACK_BYTES = 100 * 10**6  # what the allocator and the loader's own objects take


def main(gigabytes: float = 2.0) -> int:
    """Write, load and print; return the exit code."""
    print(f"{'family':8} {'loaded as':9} {'stored':>8} {'shard':>8} {'model':>8} {'peak':>8}  GB")
    code = 0
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            checkpoint = write_large(Path(name), family, gigabytes)
            sizes = [path.stat().st_size for path in checkpoint.weight_files()]
            for dtype in DTYPES:
                size = sum(sizes) * (2 if dtype == "float32" else 1)
                peak = measure(checkpoint, dtype)
                columns = (sum(sizes), max(sizes), size, peak)
                print(f"{family:8} {dtype:9}", *(f"{n / 1e9:8.2f}" for n in columns), flush=True)
                code |= peak > size + max(sizes) + SLACK_BYTES
    return code


def write_large(place: Path, family: str, gigabytes: float) -> Checkpoint:
    """Write a checkpoint of the family, at least so large, in shards."""
    fields = WIDTHS | FAMILIES[family]
    num_matrices = 3 * fields.get("num_local_experts", 1)
    layer_bytes = 2 * num_matrices * fields["hidden_size"] * fields["intermediate_size"]
    num_layers = -(-int(gigabytes * 1e9 - BASE_BYTES) // layer_bytes)
    folder = write_miniature(place / "hub", num_hidden_layers=num_layers, **fields)
    whole = open_checkpoint(str(folder), Source(place / "hub"))
    model = load_model(whole, dtype=torch.bfloat16)
    shard_bytes = int(gigabytes * 1e9 / NUM_SHARDS)
    save_checkpoint(model, whole, place / "sharded", max_shard_bytes=shard_bytes)
    (folder / "model.safetensors").unlink()
    return open_checkpoint(str(place / "sharded"), Source(place / "hub"))


def measure(checkpoint: Checkpoint, dtype: str) -> int:
    """Load in a fresh process; return the bytes that its peak is above its start."""
    hub = checkpoint.folder.parent / "hub"
    command = [sys.executable, __file__, "--load", str(checkpoint.folder), str(hub), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def load(folder: str, hub: str, dtype: str) -> None:
    """Load in this process and print the bytes that its peak is above its start."""
    checkpoint = open_checkpoint(folder, Source(Path(hub)))
    before = resident("VmRSS")
    model = load_model(checkpoint, dtype=DTYPES[dtype])
    assert model.dtype == DTYPES[dtype]
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Read the present (VmRSS) or highest (VmHWM) resident set in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None, status
    return int(found[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(*sys.argv[2:])
    else:
        sys.exit(main(*map(float, sys.argv[1:])))
