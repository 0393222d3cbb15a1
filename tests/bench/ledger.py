"""Print what large ledgers cost: seconds and memory of resuming, verifying, merging.

    python tests/bench/ledger.py [NUM_RECORDS ...]

For each number (10,000, 100,000 and 1,000,000) so many records are written, copies of one that the
built-in model made of a clip in examples/, each with an id, path, hash and text of its own; and so
many hard links of that clip, for a run to find. Each job runs in a process of its own. CPU seconds
are what one core takes; memory is the peak of the resident set (Linux) above what the imports took,
for the steps of resuming together.

    find    the items of a folder that holds the links
    open    the ledger, under its lock
    plan    decide for every item that it is done
    verify  with and without a look at the files
    merge   four shards into one ledger
"""
# ruff: noqa: T201  it prints a table for people

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

CLIP = Path(__file__).parents[2] / "examples/01.mp4"
SIZES = (10_000, 100_000, 1_000_000)
LINKS_OF_A_COPY = 10_000  # a file system takes some 65,000
FILES_OF_A_FOLDER = 1_000
NUM_PARTS = 4
JOBS = ("resume", "verify", "verify --no-files", "merge")


def main(sizes: tuple[int, ...]) -> None:
    """Write the ledgers, run each job on each and print the table."""
    print(f"{'records':>9}  {'job':18} {'step':6} {'s':>8} {'CPU s':>8} {'peak MiB':>9}")
    with tempfile.TemporaryDirectory() as name:
        (record,) = run_vla2("caption", CLIP, "--json")
        for size in sizes:
            place = Path(name, str(size))
            fill(place, json.loads(record), size)
            for job in JOBS:
                for step, *figures in measure(job, place):
                    row = "{:8.2f} {:8.2f} {:9.0f}".format(*figures)
                    print(f"{size:9,}  {job:18} {step:6} {row}", flush=True)
            shutil.rmtree(place)


def run_vla2(*arguments: Any) -> list[str]:
    """Run a command and return the lines on its stdout."""
    command = [sys.executable, "-m", "vla2cli", *map(str, arguments), "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def fill(place: Path, record: dict[str, Any], size: int) -> None:
    """Write the ledger `place/ledger.jsonl` and the files below `place/clips` that it is about."""
    (place / "parts").mkdir(parents=True)
    with ExitStack() as stack:
        whole, *parts = (
            stack.enter_context((place / name).open("w", encoding="utf-8"))
            for name in ("ledger.jsonl", *(f"parts/{i}.jsonl" for i in range(NUM_PARTS)))
        )
        for i in range(size):
            id_ = f"{i // FILES_OF_A_FOLDER:04}/{i:07}.mp4"
            path = place / "clips" / id_
            if i % LINKS_OF_A_COPY == 0:
                copy = Path(shutil.copy(CLIP, place / "copy.mp4.new")).replace(place / "copy.mp4")
                mtime_ns = copy.stat().st_mtime_ns
            if i % FILES_OF_A_FOLDER == 0:
                path.parent.mkdir(parents=True)
            path.hardlink_to(copy)
            own = {
                "id": id_,
                "path": str(path),
                "mtime_ns": mtime_ns,
                "sha256": hashlib.sha256(id_.encode()).hexdigest(),
                "text": f"{record['text']} {i} é ☕",
            }
            line = json.dumps({**record, **own}, ensure_ascii=False) + "\n"
            whole.write(line)
            parts[i % NUM_PARTS].write(line)


def measure(job: str, place: Path) -> Iterator[tuple[Any, ...]]:
    """Run a job in a fresh process; yield each step with seconds, CPU seconds and MiB."""
    command = [sys.executable, __file__, "--job", job, str(place)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        step, *figures = line.split("\t")
        yield step, *map(float, figures)


def run_job(job: str, place: Path) -> None:
    """Run a job in this process; print its steps for `measure`."""
    if job == "resume":
        resume(place)
        return
    from vla2cli.merge import merge_ledgers
    from vla2cli.verify import verify

    if job == "merge":
        with step("merge"):
            merge_ledgers(sorted((place / "parts").iterdir()), place / "merged.jsonl")
        return
    with step("verify"):
        check_files = job == "verify"
        verification = verify(place / "ledger.jsonl", check_files=check_files)
        assert not list(verification), "a sound ledger has no findings"


def resume(place: Path) -> None:
    """Find, open and plan as `vla2 caption` does."""
    from vla2_models.checkpoint import open_checkpoint
    from vla2_models.hub import Source
    from vla2cli.config import GenerationChoice
    from vla2cli.engine import Engine
    from vla2cli.inputs import find_items
    from vla2cli.jobs import Job
    from vla2cli.ledger import Ledger
    from vla2cli.media.pool import DecodePool
    from vla2cli.plan import Sampling, Task, usable_items

    engine = Engine(open_checkpoint("builtin", Source(None)), device="cpu")
    sampling = Sampling(engine.checkpoint.config.num_frames)
    settings = engine.settings(GenerationChoice())
    with DecodePool(1) as pool:
        with step("find"):
            found = find_items([str(place / "clips")])
            items = usable_items(found.items, pool, "auto", has_ears=engine.has_ears)
        with step("open"):
            ledger = Ledger.open(place / "ledger.jsonl")
        with ledger, step("plan"):
            job = Job(engine, Task("caption"), sampling, settings, pool, ledger)
            plan = job.plan(items)
    assert (len(plan.todo), len(plan.done)) == (0, len(items)), "all was done before"


@contextmanager
def step(name: str) -> Iterator[None]:
    """Time what is done inside, and print it with the peak since the imports."""
    base = BASE.setdefault("kib", resident("VmRSS"))
    started = time.perf_counter(), time.process_time()
    yield
    ended = time.perf_counter(), time.process_time()
    seconds = "\t".join(str(b - a) for a, b in zip(started, ended))
    print(f"{name}\t{seconds}\t{(resident('VmHWM') - base) / 1024}")


BASE: dict[str, int] = {}


def resident(field: str) -> int:
    """Read the present (VmRSS) or highest (VmHWM) resident set in KiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None, status
    return int(found[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        run_job(sys.argv[2], Path(sys.argv[3]))
    else:
        main(tuple(map(int, sys.argv[1:])) or SIZES)
