"""Taking turns, and what a run is seen to take of the memory."""

import os

import pytest
import torch

from vla2cli.bench.frontends import Variant
from vla2cli.bench.rounds import Case, Limit, copy, measure, packed_product, product
from vla2cli.bench.rows import make_rows
from vla2cli.bench.work import Work
from vla2cli.memory import can_tell_peak, free_bytes, run_with_peak

CPU = torch.device("cpu")
MB = 10**6


def case(name, turns, seconds, *, dtype="float32"):
    """A case that takes what `seconds` says, without waiting for it."""
    times = iter(seconds)

    def run():
        turns.append(name)
        return {"tower": next(times)}

    return Case(Variant("eager", dtype), run, {"tower": Work(gflop=6.0)})


def test_all_take_turns_and_the_first_round_does_not_count():
    turns = []
    cases = [case("a", turns, [99, 3, 1, 2]), case("b", turns, [99, 6, 5, 4])]
    limit = Limit(10.0, lambda: turns.append("limit") or 2.0)
    results, rates = measure(cases, {"product float32": limit}, 3, CPU)
    assert turns == ["a", "b", "limit"] * 4
    assert [result.seconds["tower"] for result in results] == [[3, 1, 2], [6, 5, 4]]
    assert rates == {"product float32": 5.0}


def test_row_has_medians_and_what_follows_from_them():
    turns = []
    cases = [case("a", turns, [9, 3, 1, 2]), case("b", turns, [9, 1, 1, 0.5], dtype="bfloat16")]
    limits = {
        "product float32": Limit(10.0, lambda: 2.0),
        "packed product float32": Limit(10.0, lambda: 1.0),
        "copy": Limit(1.0, lambda: 1.0),
    }
    results, rates = measure(cases, limits, 3, CPU)
    fp32, bf16 = make_rows(results, rates, ["tower"], {"model": "m"})
    assert (fp32.ms, fp32.ms_min, fp32.ms_max) == (2000, 1000, 3000)
    assert fp32.share_of_limit == pytest.approx(6 / 2 / 5)
    assert fp32.share_of_packed == pytest.approx(6 / 2 / 10)
    assert (fp32.ratio_to_eager_fp32, bf16.ratio_to_eager_fp32) == (1, 2)
    # no product of its dtype was measured
    assert (bf16.limit, bf16.share_of_limit, bf16.share_of_packed) == (None, None, None)


def test_limits_state_their_work_and_do_it():
    assert product(torch.float32, CPU, 100).amount == pytest.approx(2e-3)
    assert copy(CPU, 10**6).amount == pytest.approx(2e-3)
    assert packed_product(torch.float32, 100).amount == pytest.approx(2e-3)
    assert product(torch.bfloat16, CPU, 64).run() > 0
    assert packed_product(torch.float32, 64).run() > 0
    assert copy(CPU, 64).run() > 0


def test_peak_is_what_a_run_takes_on_top_of_what_is_held():
    if not can_tell_peak(CPU):
        pytest.skip("this system does not let a process reset its peak memory")
    held = torch.ones(50 * MB // 4)

    def run():
        return torch.ones(100 * MB // 4).sum() + held[0]

    result, peak = run_with_peak(run, CPU)
    assert result > 0
    assert 95 * MB < peak < 130 * MB
    assert run_with_peak(lambda: None, CPU)[1] < 20 * MB


def test_peak_of_another_process_is_looked_at_by_its_number():
    if not can_tell_peak(CPU):
        pytest.skip("this system does not let a process reset its peak memory")
    _, own = run_with_peak(lambda: torch.ones(50 * MB // 4).sum(), CPU, os.getpid())
    assert own > 45 * MB
    assert run_with_peak(lambda: "done", CPU, 2**30) == ("done", None)


def test_free_memory_of_the_cpu_is_known_on_linux():
    free = free_bytes(CPU)
    assert free is None or free > MB
