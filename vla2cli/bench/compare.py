"""Two benches beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vla2cli.bench.report import ABSENT, align, number, ratio
from vla2cli.bench.rows import Row

# facts that make times comparable; of the first row, since a run has them in common
FACTS = (
    "model",
    "random_weights",
    "frames",
    "layers",
    "prompt_tokens",
    "device",
    "cpu",
    "threads",
    "versions",
)
HEADER = ("stage", "front-end", "dtype", "A ms", "B ms", "A / B", "")
NUM_NAMES = 3


def compare(a: Sequence[Row], b: Sequence[Row]) -> list[dict[str, Any]]:
    """Pair the rows of two runs by stage, dtype and front-end, in A's order.

    Returns:
        For each pair `stage, dtype, frontend, a_ms, b_ms, ratio, only_in`; the ratio is A's time
        over B's: 2 where B is twice as fast.
    """
    of_a, of_b = ({row.key: row for row in rows} for rows in (a, b))
    pairs = []
    for key in dict.fromkeys([*of_a, *of_b]):
        stage, dtype, frontend = key
        a_ms, b_ms = (rows[key].ms if key in rows else None for rows in (of_a, of_b))
        pairs.append(
            {
                "stage": stage,
                "dtype": dtype,
                "frontend": frontend,
                "a_ms": a_ms,
                "b_ms": b_ms,
                "ratio": round(a_ms / b_ms, 4) if a_ms and b_ms else None,
                "only_in": None if a_ms and b_ms else "A" if a_ms else "B",
            }
        )
    return pairs


def table_lines(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Write the pairs below each other, aligned."""
    return align([HEADER, *map(_cells, pairs)], NUM_NAMES)


def _cells(pair: dict[str, Any]) -> tuple[str, ...]:
    return (
        pair["stage"],
        pair["frontend"] or ABSENT,
        pair["dtype"] or ABSENT,
        number(pair["a_ms"]),
        number(pair["b_ms"]),
        ratio(pair["ratio"]),
        f"only in {pair['only_in']}" if pair["only_in"] else "",
    )


def differences(a: Sequence[Row], b: Sequence[Row], paths: tuple[Path, Path]) -> Iterator[str]:
    """Say what else differs between two runs, a line each."""
    facts_a, facts_b = a[0].facts, b[0].facts
    for name in FACTS:
        one, other = facts_a.get(name), facts_b.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            names = [key for key in {**one, **other} if one.get(key) != other.get(key)]
            one, other = (", ".join(f"{n} {d.get(n)}" for n in names) for d in (one, other))
        yield f"{name} differs: {one} in '{paths[0]}', {other} in '{paths[1]}'"
