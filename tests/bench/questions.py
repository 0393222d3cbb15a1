"""Compare ten questions about one clip with one, and with ten that find the clip in a cache.

    python tests/bench/questions.py [--rounds 5] [--video CLIP]

A random checkpoint of VideoLLaMA 2's layout, with 845 visual tokens and a language model of 0.1 B
parameters, answers with 16 tokens each. Each round asks one question, ten questions, and ten again
from a cache, in one process, each by `vla2cli.ask`; decoding included, loading left out.
"""
# ruff: noqa: T201  it prints a table for people

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from vla2_models import miniature
from vla2cli.cache import TokenCache
from vla2cli.config import GenerationChoice
from vla2cli.engine import Engine
from vla2cli.inputs import find_items
from vla2cli.jobs import Job
from vla2cli.media.pool import DecodePool, default_num_workers
from vla2cli.plan import Sampling, Task

EXAMPLE = Path(__file__).parents[2] / "examples" / "01.mp4"
NUM_QUESTIONS = 10
NUM_TOKENS = 16
# the words that the miniature's tokenizer knows
WORDS = [
    "a",
    "red",
    "car",
    "moves",
    "to",
    "the",
    "right",
    "on",
    "the",
    "green",
    "meadow",
    "while",
    "the",
    "sun",
    "sets",
    "behind",
]
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "mm_hidden_size": 256,
}
TOWER = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "image_size": 336}


def main(video: Path, rounds: int) -> None:
    """Take turns, print the table."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        engine = Engine.load(str(write_checkpoint(Path(name))), hub_dir=name, device="cpu")
        cache = TokenCache.open(Path(name) / "kept", 10**9)
        seconds: dict[str, list[float]] = {}
        counts = {}
        with DecodePool(default_num_workers()) as pool:
            run(engine, pool, video, NUM_QUESTIONS, cache)  # fills the cache, starts the processes
            for _ in range(rounds):
                for case, number, kept in (
                    ("one question", 1, None),
                    ("ten questions", NUM_QUESTIONS, None),
                    ("ten, cached", NUM_QUESTIONS, cache),
                ):
                    started = time.perf_counter()
                    counts[case], num_visual = run(engine, pool, video, number, kept)
                    seconds.setdefault(case, []).append(time.perf_counter() - started)
    one = median(seconds["one question"])
    print(f"{num_visual} visual tokens, {NUM_TOKENS} new tokens for each question")
    print(f"{'':14} {'s':>7} {'x one':>6} {'decoded':>8} {'encoded':>8} {'recalled':>9}")
    for case, all_s in seconds.items():
        found = [counts[case][what] for what in ("decoded", "encoded", "recalled")]
        print(f"{case:14} {median(all_s):7.3f} {median(all_s) / one:6.2f} {found[0]:8} ", end="")
        print(f"{found[1]:8} {found[2]:9}")


def run(engine, pool, video, number, cache):
    """Ask so many questions about one clip; return the counts and its visual tokens."""
    questions = tuple((f"what happens {' '.join(WORDS[: 3 + i])}?",) for i in range(number))
    choice = GenerationChoice(max_new_tokens=NUM_TOKENS)
    job = Job(
        engine,
        Task("ask", questions),
        Sampling(8),
        engine.settings(choice),
        pool,
        batch=NUM_QUESTIONS,
        cache=cache,
    )
    records = list(job.run(job.plan(find_items([str(video)]).items).todo))
    assert len(records) == number, f"{len(records)} answers to {number} questions"
    assert all(record["tokens"]["new"] == NUM_TOKENS for record in records), "it ended by itself"
    return job.stats.counts, records[0]["tokens"]["visual"]


def write_checkpoint(hub_dir: Path) -> Path:
    """Write a miniature with as many patches as the public tower."""
    edge = TOWER["image_size"]
    miniature.TOWER |= TOWER
    miniature.PREPROCESSOR |= {
        "size": {"shortest_edge": edge},
        "crop_size": {"height": edge, "width": edge},
    }
    return miniature.write_miniature(hub_dir, **SIZES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--video", type=Path, default=EXAMPLE)
    a = parser.parse_args()
    main(a.video, a.rounds)
