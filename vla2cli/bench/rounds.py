"""Taking turns: every case and every limit once in each round, so that noise hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from vla2_models.packed import PackedLinear
from vla2cli.bench.frontends import Variant
from vla2cli.bench.work import Work
from vla2cli.memory import run_with_peak

PRODUCT_EDGE = 4096  # of the matrices whose product sets the limit
CUDA_PRODUCT_EDGE = 8192  # a GPU does a smaller one in hardly more time than it takes to ask for it
COPY_BYTES = 2**28  # beyond any cache


@dataclass(frozen=True)
class Case:
    """One way to run one stage or two, as often as asked."""

    variant: Variant
    run: Callable[[], Mapping[str, float]]  # stage -> seconds
    work: Mapping[str, Work]  # stage -> what it has to do
    pid: int | None = None  # of the process whose memory counts; None: this one


@dataclass(frozen=True)
class Limit:
    """What the machine can do at best, measured by doing it."""

    amount: float  # 10**9 operations or bytes in one run
    run: Callable[[], float]  # seconds


@dataclass
class Measured:
    """What came of one case: seconds by stage, one for each round that counts."""

    case: Case
    peak_bytes: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)


def measure(
    cases: Sequence[Case], limits: Mapping[str, Limit], num_rounds: int, device: torch.device
) -> tuple[list[Measured], dict[str, float]]:
    """Run all in turns, after a round that only warms up and shows the memory.

    Returns:
        The cases as they were given, and the rate of each limit: 10**9 operations or bytes a
        second, from its median time.
    """
    results = [Measured(case) for case in cases]
    for result in results:
        _, result.peak_bytes = run_with_peak(result.case.run, device, result.case.pid)
    for limit in limits.values():
        limit.run()
    limit_s: dict[str, list[float]] = {name: [] for name in limits}
    for _ in range(num_rounds):
        for result in results:
            for stage, seconds in result.case.run().items():
                result.seconds.setdefault(stage, []).append(seconds)
        for name, limit in limits.items():
            limit_s[name].append(limit.run())
    return results, {name: limits[name].amount / median(limit_s[name]) for name in limits}


def product(dtype: torch.dtype, device: torch.device, edge: int | None = None) -> Limit:
    """Multiply two square matrices, into a third that is there already."""
    edge = edge or (CUDA_PRODUCT_EDGE if device.type == "cuda" else PRODUCT_EDGE)
    a, b, out = (torch.randn(edge, edge).to(device, dtype) for _ in range(3))
    return Limit(2 * edge**3 / 1e9, timed(lambda: torch.mm(a, b, out=out), device))


def packed_product(dtype: torch.dtype, edge: int | None = None) -> Limit:
    """Multiply the same matrices on the CPU, the second laid out for it beforehand."""
    edge = edge or PRODUCT_EDGE
    a, b = (torch.randn(edge, edge).to(dtype) for _ in range(2))
    linear = PackedLinear(b)
    run = torch.inference_mode()(lambda: linear(a))
    return Limit(2 * edge**3 / 1e9, timed(run, torch.device("cpu")))


def copy(device: torch.device, num_bytes: int = COPY_BYTES) -> Limit:
    """Copy a stretch of memory; each byte is read and written."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Limit(2 * num_bytes / 1e9, timed(lambda: target.copy_(source), device))


def timed(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Make a function that says how many seconds another took, to its very end on the device."""

    def seconds() -> float:
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - started

    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
