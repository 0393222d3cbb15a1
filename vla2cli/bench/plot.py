"""Rows as a picture: times beside shares of the limit; PNG, or one page of HTML with the table."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vla2cli.bench.report import HEADER, LEGEND, NUM_NAMES, cells, number, ratio
from vla2cli.bench.rows import Row
from vla2cli.errors import UsageError, why

ROW_HEIGHT = 0.34  # inches
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
STYLE = (
    "body{font:15px sans-serif;margin:2em;color:#222}svg{max-width:100%;height:auto}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;"
    f"border-bottom:1px solid #ddd}}tr>:nth-child(-n+{NUM_NAMES}){{text-align:left}}"
    "p{color:#555;margin:.3em 0}"
)


def write_plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the rows into a file whose ending, .png or .html, says how.

    Raises:
        UsageError: the file cannot be written.
    """
    content = PLOTS[path.suffix.lower()](rows, title)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"'--plot {path}': {why(error)}") from error


def check_plot(path: Path) -> None:
    """Refuse an ending that names no kind of picture.

    Raises:
        UsageError: naming it.
    """
    if path.suffix.lower() not in PLOTS:
        raise UsageError(f"'--plot {path}': expected a name that ends in {' or '.join(PLOTS)}")


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Draw the rows as bars, those of a stage beside each other."""
    figure = Figure(figsize=(11, 1.6 + ROW_HEIGHT * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    times, shares = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    colours = _colours(rows)
    places = range(len(rows), 0, -1)  # the first on top
    for axes, values, write in (
        (times, [row.ms for row in rows], number),
        (shares, [row.share_of_limit for row in rows], ratio),
    ):
        axes.barh(places, [value or 0 for value in values], color=colours, height=0.7)
        for row, place, value in zip(rows, places, values, strict=True):
            axes.annotate(
                _label(row, write(value)) if axes is times else write(value),
                (value or 0, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.spines[["top", "right"]].set_visible(False)
    _scale_times(times, rows)
    times.set_yticks(list(places), [_name(row) for row in rows], fontsize=8)
    shares.set_xlim(0, max(1.1, *(1.15 * (row.share_of_limit or 0) for row in rows)))
    shares.axvline(1, color="#888", linewidth=0.8, linestyle="--")
    shares.set_xlabel("share of the limit: a product; generate: a copy")
    return figure


def _scale_times(axes: Axes, rows: Sequence[Row]) -> None:
    # a logarithm: a token takes a thousandth of a clip's tower
    axes.set_xscale("log")
    axes.set_xlim(min(row.ms for row in rows) / 3, max(row.ms for row in rows) * 12)
    axes.set_xlabel("ms, median; x: times as fast as eager float32")


def _label(row: Row, ms: str) -> str:
    faster = row.ratio_to_eager_fp32
    return f"{ms} ms" if faster is None else f"{ms} ms, {ratio(faster)}x"


def _name(row: Row) -> str:
    return " ".join(part for part in (row.stage, row.frontend, row.dtype) if part)


def _colours(rows: Sequence[Row]) -> list[str]:
    """Give each pair of front-end and dtype a colour of its own."""
    kinds = list(dict.fromkeys((row.frontend, row.dtype) for row in rows))
    return [COLOURS[kinds.index((row.frontend, row.dtype)) % len(COLOURS)] for row in rows]


def _png(rows: Sequence[Row], title: str) -> bytes:
    content = io.BytesIO()
    draw(rows, title).savefig(content, format="png", dpi=130)
    return content.getvalue()


def _html(rows: Sequence[Row], title: str) -> bytes:
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        _svg(rows, title),
        "<table>",
        _table_row(HEADER, "th"),
        *(_table_row(cells(row), "td") for row in rows),
        "</table>",
        *(f"<p>{html.escape(line)}</p>" for line in LEGEND),
        "</body></html>",
    ]
    return "\n".join(lines).encode()


def _svg(rows: Sequence[Row], title: str) -> str:
    content = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": "vla2"}):  # the same rows, the same bytes
        draw(rows, title).savefig(content, format="svg", metadata=nothing)
    text = content.getvalue()
    return text[text.index("<svg") :]  # inside a page stands no XML declaration


def _table_row(texts: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


PLOTS: Mapping[str, Callable[[Sequence[Row], str], bytes]] = {".png": _png, ".html": _html}
