"""Killed at any moment and started again: the records of an undisturbed run.

The killed runs work on several things at a time, every other one with a cache of clips; the
undisturbed one does one thing after the other.

Set VLA2_KILLS for more kills than the default.
"""

import os
import random
import signal
import time
from functools import partial

import pytest

NUM_KILLS = int(os.environ.get("VLA2_KILLS", "8"))
NUM_CLIPS = 20 + 4 * NUM_KILLS  # so that the last kill still finds work in hand
ASK = ("--question", "What moves?", "--then", "Which way?")
BATCHES = (1, 3, 5)
RECORD_BYTES = 1400  # about
MAY_DIFFER = ("created", "timings_s", "logprob_mean")


def test_killed_and_taken_up_again_leaves_the_records_of_an_undisturbed_run(
    vla2, make_clips, tmp_path, read_ledger, wait_until
):
    rng = random.Random(0)
    folder = make_clips(NUM_CLIPS)
    start = partial(vla2.start, "ask", folder, *ASK, "-o")

    whole = tmp_path / "whole.jsonl"
    started = time.monotonic()
    undisturbed = start(whole, "--no-overlap")
    wait_until(lambda: read_ledger(whole))
    load_s = time.monotonic() - started
    assert undisturbed.wait().code == 0
    expected = read_ledger(whole)
    assert len(expected) == 2 * NUM_CLIPS

    ledger = tmp_path / "killed.jsonl"
    num_killed = 0
    for i in range(NUM_KILLS):
        cached = ("--cache", tmp_path / "tokens") if i % 2 else ()
        run = start(ledger, "--overlap", "--batch", str(rng.choice(BATCHES)), *cached)
        if i % 4 < 2:  # while it loads, or a little later
            time.sleep(rng.uniform(0, 1.1 * load_s))
        else:  # after a few records
            wait_until(partial(_has_grown_or_ended, ledger, _size(ledger), rng.randint(1, 3), run))
            time.sleep(rng.uniform(0, 0.05))
        if i % 2:
            run.send_group(signal.SIGKILL)
        else:
            run.send(signal.SIGKILL)
        num_killed += run.wait(10).code == 137
        wait_until(lambda: not vla2.workers(), 5)
    assert num_killed == NUM_KILLS

    assert start(ledger, "--overlap", "--cache", tmp_path / "tokens").wait().code == 0
    records = read_ledger(ledger)
    assert records.keys() == expected.keys()
    for key, record in records.items():
        assert _fixed(record) == _fixed(expected[key])
        assert record["logprob_mean"] == pytest.approx(expected[key]["logprob_mean"], abs=1e-3)


def _has_grown_or_ended(ledger, size, num_records, run):
    return _size(ledger) > size + RECORD_BYTES * (num_records - 1) or run.process.poll() is not None


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _fixed(record):
    return {name: value for name, value in record.items() if name not in MAY_DIFFER}
