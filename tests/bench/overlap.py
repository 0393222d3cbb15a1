"""Compare a run whose stages overlap with its stages alone, and with one clip at a time.

    python tests/bench/overlap.py [--clips 200] [--rounds 3] [--folder DIR] [--model builtin]

Clips of the drawn world (or those of DIR) are captioned by commands of `vla2`, in turns: as they
come, and with `--batch 1 --no-overlap`. Between them, in processes of their own, each stage works
alone on the same clips: decoding, towers and connectors, the language model. Times are without
imports and loading, as `--stats` counts them; CPU-seconds are those of all processes of a run.
"""
# ruff: noqa: T201  it prints a table for people

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

STAGES = ("decode", "tower", "language")
RUNS = {"overlap": (), "one by one": ("--batch", "1", "--no-overlap")}


def main(clips: Path, model: str, rounds: int) -> None:
    """Take turns, print the table."""
    seen: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for _ in range(rounds):
            for run, flags in RUNS.items():
                seen.setdefault(run, []).append(run_command(clips, model, flags, place))
            for stage in STAGES:
                command = [sys.executable, __file__, "--stage", stage, "--folder", str(clips)]
                found = subprocess.run(
                    [*command, "--model", model], check=True, capture_output=True, text=True
                )
                seen.setdefault(stage, []).append(json.loads(found.stdout))
    num_clips = round(seen["overlap"][0]["records"])
    middle = {
        run: {key: median(row[key] for row in rows) for key in ("elapsed_s", "cpu_s")}
        for run, rows in seen.items()
    }
    print(f"{'':12} {'s':>8} {'clips/s':>8} {'CPU-s':>8} {'ms a clip':>10} {'cores busy':>11}")
    for run, row in middle.items():
        busy = row["cpu_s"] / row["elapsed_s"] / len(os.sched_getaffinity(0))
        print(
            f"{run:12} {row['elapsed_s']:8.1f} {num_clips / row['elapsed_s']:8.1f} "
            f"{row['cpu_s']:8.1f} {row['cpu_s'] / num_clips * 1e3:10.1f} {busy:11.1%}"
        )
    alone = sum(middle[stage]["cpu_s"] for stage in STAGES)
    print(
        f"CPU-seconds over the sum of the stages alone: {middle['overlap']['cpu_s'] / alone:.2f}; "
        "one by one over overlap, time: "
        f"{middle['one by one']['elapsed_s'] / middle['overlap']['elapsed_s']:.2f}, CPU: "
        f"{middle['one by one']['cpu_s'] / middle['overlap']['cpu_s']:.2f}"
    )


def run_command(clips: Path, model: str, flags: Sequence[str], place: Path) -> dict[str, float]:
    """Caption all clips by the command; return what `--stats` says."""
    stats, ledger = place / "stats.json", place / "captions.jsonl"
    command = [sys.executable, "-m", "vla2cli", "caption", str(clips), "-m", model, "-q"]
    command += ["-o", str(ledger), "--force", "--stats", str(stats), *flags]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(stats.read_text())
    return {**found, "records": sum(1 for _ in ledger.open())}


def run_stage(stage: str, clips: Path, model: str) -> dict[str, float]:
    """Let one stage work on all clips, the others before it uncounted."""
    import torch

    from vla2cli.config import DEFAULT_BATCH, GenerationChoice
    from vla2cli.engine import Engine
    from vla2cli.flow import InTurn
    from vla2cli.inputs import find_items
    from vla2cli.jobs import Job
    from vla2cli.media.pool import DecodePool, default_num_workers
    from vla2cli.plan import Sampling, Task

    # alone on a core, as in an overlapping run
    torch.set_num_threads(1)
    engine = Engine.load(model)
    settings = engine.settings(GenerationChoice())

    def job(pool: DecodePool) -> Job:
        sampling = Sampling(engine.checkpoint.config.num_frames)
        return Job(engine, Task("caption"), sampling, settings, pool, batch=DEFAULT_BATCH)

    def never() -> bool:
        return False

    pool = DecodePool(default_num_workers())
    made = job(pool)
    works = made.plan(find_items([str(clips)]).items).todo
    made.stats.start()
    decoded = list(made.clips(works, should_stop=never))
    made.stats.stop()
    pool.close()
    if stage == "decode":
        return made.stats.summary()
    pairs = [pair for batch in decoded for pair in batch]
    made.stats.start()
    encoded = [
        ready
        for first in range(0, len(pairs), DEFAULT_BATCH)
        for ready in made.encode_clips(pairs[first : first + DEFAULT_BATCH])
    ]
    made.stats.stop()
    if stage == "tower":
        return made.stats.summary()
    made.stats.start()
    for _ in made.asking().run(InTurn(iter(encoded)), never):
        pass
    made.stats.stop()
    return made.stats.summary()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--stage", choices=STAGES, help="run this alone and print its figures")
    a = parser.parse_args()
    if a.stage:
        print(json.dumps(run_stage(a.stage, a.folder, a.model)))
    elif a.folder:
        main(a.folder, a.model, a.rounds)
    else:
        with tempfile.TemporaryDirectory() as name:
            world = ["world", "-o", name, "--count", str(a.clips), "-q"]
            subprocess.run([sys.executable, "-m", "vla2cli", *world], check=True)
            main(Path(name), a.model, a.rounds)
