"""Print how near `vla2 plan` comes to the true time, on a folder of drawn clips and on a mixed one.

    python tests/bench/plan.py [--count 400] [--mixed FOLDER] [--rounds 3] [--keep DIR] [FLAGS...]

In each round and for each folder `vla2 plan --json` runs, and right after it the command that it
printed. FLAGS are given to `plan`, such as `--model M --batch 16`. `start` is what of both times is
not spent on files, `cores` how much of the processor plan and run were given: they may share it.
`work` is the ratio of seconds times cores, which is what is left of `ratio` when that is even.
"""
# ruff: noqa: T201  it prints a table for people

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vla2cli.inputs import find_items

EXAMPLES = Path(__file__).parents[2] / "examples"
VLA2 = str(Path(sys.executable).with_name("vla2"))
HEAD = "folder    predicted  (between)        true   ratio  start     cores      work memory ledger"
GOOD = 0.25  # of the true time


def main() -> None:
    """Plan and run both folders, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=400, help="files of each folder")
    parser.add_argument("--mixed", type=Path, default=EXAMPLES, help="what the second is made of")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="where the folders are made, and stay")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        place = args.keep or Path(name)
        place.mkdir(parents=True, exist_ok=True)
        folders = [draw(place / "drawn", args.count), mix(place / "mixed", args.mixed, args.count)]
        print(HEAD)
        ratios: list[float] = []
        for _ in range(args.rounds):
            for folder in folders:
                ratios.append(compare(folder, Path(name) / "ledger.jsonl", flags))
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    near = sum(abs(ratio - 1) <= GOOD for ratio in ratios)
    middle = statistics.median(ratios)
    print(f"{near} of {len(ratios)} within {GOOD:.0%}; median {middle:.2f}, worst {worst:.2f}")


def draw(folder: Path, count: int) -> Path:
    """Write clips of the drawn world."""
    if not folder.exists():
        vla2("world", "-o", str(folder), "--count", str(count), "--seed", "3", "-q")
    return folder


def mix(folder: Path, source: Path, count: int) -> Path:
    """Link the media of a folder under `count` names."""
    files = [Path(item.path).absolute() for item in find_items([str(source)]).items]
    folder.mkdir(exist_ok=True)
    for i in range(count):
        link = folder / f"{i:05}{files[i % len(files)].suffix}"
        if not link.is_symlink():
            link.symlink_to(files[i % len(files)])
    return folder


def compare(folder: Path, ledger: Path, flags: list[str]) -> float:
    """Plan, run what was printed, print a row; return predicted over true seconds."""
    ledger.unlink(missing_ok=True)
    planned, _, plan_cores = vla2("plan", str(folder), "-o", str(ledger), "--json", "-q", *flags)
    plan = json.loads(planned)
    predicted = plan["predicted"]
    program, *arguments = shlex.split(plan["command"])
    assert program == "vla2"
    stats = ledger.with_name("stats.json")
    _, true_s, true_cores = vla2(*arguments, "-q", "--stats", str(stats))
    summary = json.loads(stats.read_text())
    start_s = true_s - summary["elapsed_s"]
    memory = predicted["memory_bytes"] / summary["peak_memory_bytes"]
    size = predicted["ledger_bytes"] / ledger.stat().st_size
    ratio: float = predicted["seconds"] / true_s
    between = f"{predicted['low_s']:.0f} to {predicted['high_s']:.0f}"
    print(
        f"{folder.name:<9} {predicted['seconds']:7.1f} s  {between:>10} s  {true_s:7.1f} s  "
        f"{ratio:5.2f}  {predicted['start_s']:4.1f}, {start_s:4.1f}  "
        f"{plan_cores:4.2f}, {true_cores:4.2f}  "
        f"{ratio * plan_cores / true_cores:5.2f}  {memory:6.2f}  {size:6.3f}",
        flush=True,
    )
    return ratio


def vla2(*arguments: str) -> tuple[str, float, float]:
    """Run the command; return its stdout, its seconds, and how many cores it had."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([VLA2, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    after, elapsed_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started
    if done.returncode not in (0, 3):  # 3: a file that cannot be read
        raise SystemExit(f"vla2 {shlex.join(arguments)}: exit code {done.returncode}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, elapsed_s, cpu_s / elapsed_s


if __name__ == "__main__":
    main()
