"""What `vla2 bench` puts out: one row for each stage, dtype and front-end, as JSON or read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from vla2cli.errors import UsageError, why

if TYPE_CHECKING:
    from vla2cli.bench.rounds import Measured


@dataclass(frozen=True)
class Row:
    """One stage, run one way."""

    stage: str
    dtype: str | None  # None: the stage computes with no weights
    frontend: str | None  # None: the stage is in front of the front-ends, or behind them
    ms: float  # median of the rounds; of generate, for one token
    gflop: float | None  # 10**9 operations needed; None where bytes or nothing known is the limit
    share_of_limit: float | None  # 1: as fast as the limit, measured in the same rounds
    ratio_to_eager_fp32: float | None  # time of eager float32 over time of this; None: not measured
    peak_mb: float | None  # 10**6 bytes at the worst moment, on top of weights and all else held
    ms_min: float
    ms_max: float
    gb: float | None  # 10**9 bytes that have to be read
    limit: str | None  # product: rate of a large GEMM of this dtype; copy: bandwidth of a copy
    limit_per_s: float | None  # that rate: GFLOP/s or GB/s
    # as share_of_limit, of a product of the same size whose weight is packed: on some CPUs twice as
    # fast as a plain one; None where there is no such product
    share_of_packed: float | None
    facts: Mapping[str, Any] = field(default_factory=dict)  # model, machine and settings

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        """What tells it from the other rows of one run."""
        return self.stage, self.dtype, self.frontend

    @property
    def work(self) -> tuple[float, str] | None:
        """What has to be done, and its unit; None where that is not known."""
        if self.gb is not None:
            return self.gb, "GB"
        return None if self.gflop is None else (self.gflop, "GFLOP")

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in JSON: no level within."""
        return {name: getattr(self, name) for name in NAMES} | dict(self.facts)


NAMES = tuple(each.name for each in fields(Row) if each.name != "facts")


def make_rows(
    results: Sequence[Measured],
    rates: Mapping[str, float],
    stages: Sequence[str],
    facts: Mapping[str, Any],
) -> list[Row]:
    """Turn times into rows, stage by stage.

    Args:
        results: of cases that were measured together.
        rates: of the limits measured with them: `copy`, and `product` with a dtype.
        stages: those asked for; a case may have run another on the way.
        facts: about the run.
    """
    rows = []
    for stage in stages:
        of_stage = [result for result in results if stage in result.seconds]
        baselines = [median(r.seconds[stage]) for r in of_stage if _is_baseline(r)]
        rows += [
            _row(r, stage, rates, baselines[0] if baselines else None, facts) for r in of_stage
        ]
    return rows


def _is_baseline(result: Measured) -> bool:
    variant = result.case.variant
    return variant.dtype == "float32" and variant.frontend in (None, "eager")


def _row(
    result: Measured,
    stage: str,
    rates: Mapping[str, float],
    baseline_s: float | None,
    facts: Mapping[str, Any],
) -> Row:
    variant, work = result.case.variant, result.case.work[stage]
    times = result.seconds[stage]
    time_s = median(times)
    limit = limit_name(work.limit, variant.dtype)
    rate = rates.get(limit) if limit else None
    packed = rates.get(f"packed {limit}")
    amount = work.gb if work.limit == "copy" else work.gflop
    return Row(
        stage=stage,
        dtype=variant.dtype,
        frontend=variant.frontend,
        ms=round(1e3 * time_s, 4),
        gflop=_round(work.gflop, 6),
        share_of_limit=_round(amount / time_s / rate, 4) if amount and rate else None,
        ratio_to_eager_fp32=_round(baseline_s / time_s, 4) if baseline_s else None,
        peak_mb=_round(result.peak_bytes / 1e6, 1) if result.peak_bytes is not None else None,
        ms_min=round(1e3 * min(times), 4),
        ms_max=round(1e3 * max(times), 4),
        gb=_round(work.gb, 6),
        limit=work.limit if rate else None,
        limit_per_s=_round(rate, 2),
        share_of_packed=_round(amount / time_s / packed, 4) if amount and packed else None,
        facts=facts,
    )


def limit_name(limit: str | None, dtype: str | None) -> str | None:
    """Name the limit among those measured: a product has a dtype, a copy has none."""
    return f"product {dtype}" if limit == "product" else limit


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def read_rows(path: Path) -> list[Row]:
    """Read what `vla2 bench --json` wrote: JSON Lines, or one array.

    Where a row stands twice, as after two runs into one file, the last one counts.

    Raises:
        UsageError: the file cannot be read, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {why(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(_foreign(path, "it is no text")) from error
    try:
        if text.lstrip().startswith("["):
            found = json.loads(text)
        else:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UsageError(_foreign(path, f"{error}")) from error
    if not found:
        raise UsageError(_foreign(path, "it is empty"))
    rows = [_parse(path, number, each) for number, each in enumerate(found, 1)]
    return list({row.key: row for row in rows}.values())


def _parse(path: Path, number: int, found: Any) -> Row:
    missing = [name for name in NAMES if not isinstance(found, dict) or name not in found]
    if missing:
        raise UsageError(_foreign(path, f"object {number} has no '{missing[0]}'"))
    known = {name: found[name] for name in NAMES}
    numbers = [known[name] for name in ("ms", "ms_min", "ms_max")]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in numbers):
        raise UsageError(_foreign(path, f"object {number} has {known['ms']!r} for a time"))
    facts = {name: value for name, value in found.items() if name not in NAMES}
    return Row(**known, facts=facts)


def _foreign(path: Path, reason: str) -> str:
    return f"'{path}' is not what vla2 bench --json writes: {reason}"
