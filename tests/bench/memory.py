"""Print what a run over many files keeps in memory, and what each file costs, as it goes on.

    python tests/bench/memory.py [NUM_ITEMS] [FOLDER]

NUM_ITEMS (500) hard links or copies of the files of FOLDER (examples/) are captioned with a
miniature model, with overlapping stages. Memory is the resident set that /proc shows (Linux), of
this process and summed over its decoding workers; CPU is that of all of them for each file since
the line before.
"""
# ruff: noqa: T201  it prints a table for people

import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from vla2_models.miniature import write_miniature
from vla2cli.config import DEFAULT_BATCH, GenerationChoice
from vla2cli.engine import Engine
from vla2cli.inputs import find_items
from vla2cli.jobs import Job
from vla2cli.ledger import Ledger
from vla2cli.media.pool import DecodePool
from vla2cli.plan import Sampling, Task

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_LINES = 10
WARM = 100  # items until caches and decoders have what they need
NUM_NEW_TOKENS = 24
MIB = 2**20


def main(num_items: int = 500, folder: Path = EXAMPLES) -> None:
    """Caption `num_items` files and print the memory as it goes."""
    torch.set_num_threads(1)  # a network this small only waits for more
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["XDG_CACHE_HOME"] = name
        fill(place / "clips", folder, num_items)
        checkpoint = write_miniature(place / "hub")
        engine = Engine.load(str(checkpoint), hub_dir=place / "hub", device="cpu")
        with (
            Ledger.open(place / "ledger.jsonl") as ledger,
            DecodePool(os.cpu_count() or 1) as pool,
        ):
            settings = engine.settings(GenerationChoice(NUM_NEW_TOKENS))
            job = Job(
                engine, Task("caption"), Sampling(8), settings, pool, ledger, batch=DEFAULT_BATCH
            )
            follow(job, place / "clips")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak of the parent: {peak:.1f} MiB")


def fill(clips: Path, folder: Path, num_items: int) -> None:
    """Link the media of a folder under `num_items` names."""
    items = [item for item in find_items([str(folder)]).items if item.kind != "audio"]
    clips.mkdir()
    for i in range(num_items):
        source = items[i % len(items)].path
        target = clips / f"{i:05}{Path(source).suffix}"
        try:
            target.hardlink_to(source)
        except OSError:  # on another disk, or not ours
            shutil.copyfile(source, target)


def follow(job: Job, clips: Path) -> None:
    """Run the job and print a line now and then, and at last the growth."""
    works = job.plan(find_items([str(clips)]).items).todo
    seen: dict[int, tuple[float, float]] = {}
    num_errors = 0
    every = max(WARM // 2, len(works) // NUM_LINES // WARM * WARM)
    started = time.monotonic()
    before, cpu_before = 0, cpu_seconds(job.pool.worker_pids())
    print(" items   parent  workers (MiB)  CPU ms a file")
    for number, record in enumerate(job.run(works), 1):
        num_errors += record.get("error") is not None
        if number in (WARM, len(works)) or number % every == 0:
            pids = job.pool.worker_pids()
            seen[number] = resident("self"), sum(map(resident, pids))
            cpu_s = cpu_seconds(pids)
            each_ms = (cpu_s - cpu_before) / (number - before) * 1e3
            before, cpu_before = number, cpu_s
            print(
                f"{number:6} {seen[number][0]:8.1f} {seen[number][1]:8.1f} {each_ms:20.1f}",
                flush=True,
            )
    elapsed = time.monotonic() - started
    print(f"{len(works)} items, {num_errors} errors, {elapsed:.0f} s, {len(works) / elapsed:.1f}/s")
    if WARM in seen and len(works) > WARM:
        grown = [last - first for first, last in zip(seen[WARM], seen[len(works)], strict=True)]
        print(
            f"growth from item {WARM} to {len(works)}: "
            f"parent {grown[0]:+.1f} MiB, workers {grown[1]:+.1f} MiB"
        )


def resident(pid: int | str) -> float:
    """Return the resident memory of a process in MiB; 0 when it has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def cpu_seconds(pids: list[int]) -> float:
    """Sum the processor time of this process, of those that have ended, and of some that live."""
    spent = sum(os.times()[:4])
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else 500, Path(arguments[1]) if arguments[1:] else EXAMPLES)
