"""exam.jsonl -> a picture of what a network could answer while it was trained, kind by kind."""

from __future__ import annotations

import math
from collections import defaultdict
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from vla2cli.train.log import read_lines

COLOURS = {"train": "#b0b0b0", "heldout": "#4c72b0"}
NAMES = {"train": "seen combinations", "heldout": "held-out combinations"}
NUM_COLUMNS = 5
NUM_COLOURS = 32  # of the file: a few, and their edges
_Curve = list[tuple[int, float]]  # step, share


def read_shares(exam: Path) -> dict[str, dict[str, _Curve]]:
    """Read the shares of right answers: kind -> split -> (step, share) in order.

    Args:
        exam: lines of step, split, kind, num and right, as `vla2cli.train.exam` writes them.
    """
    shares: dict[str, dict[str, _Curve]] = defaultdict(lambda: defaultdict(list))
    for line in read_lines(exam):
        share = line["right"] / line["num"]
        shares[line["kind"]][line["split"]].append((line["step"], share))
    return {kind: dict(curves) for kind, curves in shares.items()}


def plot_exam(exam: Path, target: Path) -> None:
    """Draw those shares into a PNG, a field for each kind.

    Raises:
        ValueError: no exam was held.
    """
    shares = read_shares(exam)
    if not shares:
        raise ValueError(f"'{exam}' holds no exam")
    num_rows = math.ceil(len(shares) / NUM_COLUMNS)
    figure = Figure(figsize=(2 * NUM_COLUMNS, 1.7 * num_rows + 0.4), layout="constrained")
    grid = figure.subplots(num_rows, NUM_COLUMNS, sharex=True, sharey=True, squeeze=False)
    fields = list(grid.flat)
    for axes, (kind, curves) in zip(fields, shares.items(), strict=False):
        axes.set_title(kind, fontsize=9)
        for split, curve in curves.items():
            steps, values = zip(*curve, strict=True)
            look = {"color": COLOURS[split], "linewidth": 1.4, "markersize": 3}
            axes.plot(steps, values, ".-", label=NAMES[split], **look)
    for axes in fields:
        axes.set_ylim(0, 1.03)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in fields[len(shares) :]:
        axes.set_axis_off()
    handles, labels = fields[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("share exactly right", fontsize=8)
    whole = BytesIO()
    figure.savefig(whole, dpi=90)
    with Image.open(whole) as picture:  # a third of the bytes: it ships with the package
        picture.convert("RGB").quantize(NUM_COLOURS).save(target, "PNG", optimize=True)
