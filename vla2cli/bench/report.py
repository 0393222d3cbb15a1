"""Rows as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from vla2cli.bench.rows import Row

HEADER = (
    *("stage", "front-end", "dtype", "ms", "min-max", "work"),
    *("of limit", "of packed", "x fp32", "peak MB"),
)
NUM_NAMES = 3  # the first columns are words, the others numbers
ABSENT = "-"
LEGEND = (
    "ms: median of the rounds; of generate, for one token",
    "of limit: share of the rate of a large product of the same dtype, of generate of a copy's "
    "bandwidth, both measured in the same rounds",
    "of packed: share of the rate of the same product with a weight laid out for this CPU",
    "x fp32: time of eager float32 over this time; 2 is twice as fast",
    "peak MB: on top of the weights; read with preprocess, and prefill with generate, are one run",
)


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Write the rows below each other, aligned."""
    return align([HEADER, *(cells(row) for row in rows)], NUM_NAMES)


def cells(row: Row) -> tuple[str, ...]:
    """Write one row's cells, in the order of `HEADER`."""
    return (
        row.stage,
        row.frontend or ABSENT,
        row.dtype or ABSENT,
        number(row.ms),
        f"{number(row.ms_min)}-{number(row.ms_max)}",
        f"{number(row.work[0])} {row.work[1]}" if row.work else ABSENT,
        ratio(row.share_of_limit),
        ratio(row.share_of_packed),
        ratio(row.ratio_to_eager_fp32),
        number(row.peak_mb),
    )


def number(value: float | None) -> str:
    """Write a number with three digits or more: `0.00123`, `1.23`, `12.3`, `1,234`."""
    if value is None:
        return ABSENT
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """Write a share or a ratio: `0.88`."""
    return ABSENT if value is None else f"{value:.2f}"


def align(lines: Sequence[Sequence[str]], num_names: int) -> list[str]:
    """Pad cells to columns: the first `num_names` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
