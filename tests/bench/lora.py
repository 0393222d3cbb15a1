"""Teach a model an object that it never saw, by an adapter, and see what it still knows.

    python tests/bench/lora.py [--model M] [--folder DIR] [--clips 200]

The object is a lighthouse, drawn here. Each step is a command in a process of its own: `vla2 world
--guest` writes 200 clips with it, and 1,000 without to keep in mind what was known, `vla2 train`
trains an adapter and the connector, `vla2 ask --manifest --model DIR/adapter` is asked about 400
other clips with it and 400 without, the model as it was too, and `vla2 world score` compares word
for word.
"""
# ruff: noqa: T201  it prints a table for people

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from vla2_models.hub import BUILTIN

GUEST = "lighthouse"
SETTINGS = """
stage: joint
model: {model}
output: {folder}/adapter
train: [mm_projector, language_model]
lora: {{r: 16, alpha: 32, dropout: 0.0}}
data:
  - {{file: {folder}/guest/data.json}}
  - {{file: {folder}/old/data.json}}
pack: 12
batch: 12
per_device_batch: 12
epochs: 3
learning_rate: 5.0e-4
projector_learning_rate: 3.0e-4
image_aspect_ratio: null
precision: bfloat16
save_dtype: float32
gradient_checkpointing: false
workers: 1
"""


class Clips(NamedTuple):
    """What some of the clips are."""

    seed: int
    split: str
    has_guest: bool
    times: int  # as many as --clips


CLIPS = {
    "guest": Clips(101, "train", has_guest=True, times=1),
    "old": Clips(102, "train", has_guest=False, times=5),
    "guest-exam": Clips(103, "heldout", has_guest=True, times=2),
    "old-exam": Clips(104, "heldout", has_guest=False, times=2),
}


def main() -> None:
    """Write, train, ask, and print the table."""
    options = parse_options()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    draw_guest(folder / f"{GUEST}.png")
    for name, clips in CLIPS.items():
        write_clips(folder, name, clips, options.clips)
    settings = folder / "adapter.yaml"
    settings.write_text(SETTINGS.format(model=options.model, folder=folder), encoding="utf-8")
    run("train", settings)
    print("| | asked | before | after |\n|---|---|---|---|")
    for name in ("guest-exam", "old-exam"):
        before, after = (
            ask(folder, name, model, label)
            for model, label in ((options.model, "before"), (folder / "adapter", "after"))
        )
        for kind, row in after.items():
            shares = (f"{of[kind]['right'] / of[kind]['num']:.1%}" for of in (before, after))
            print(f"| {name}: {kind} | {row['num']} | {' | '.join(shares)} |")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default=BUILTIN, help="as vla2 takes it; default: %(default)s")
    parser.add_argument(
        "--clips", type=int, default=200, help="to learn from; default: %(default)s"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(".train/lora"), help="default: %(default)s"
    )
    return parser.parse_args()


def draw_guest(path: Path) -> None:
    """Draw a lighthouse: a striped tower with a lantern."""
    image = Image.new("RGBA", (96, 96))
    draw = ImageDraw.Draw(image)
    for i in range(4):
        top, bottom = 34 + 15 * i, 49 + 15 * i
        left, right = 38 - 2 * i, 58 + 2 * i
        colour = (235, 235, 235, 255) if i % 2 else (200, 30, 40, 255)
        draw.polygon([(left, top), (right, top), (right + 2, bottom), (left - 2, bottom)], colour)
    draw.rectangle((40, 16, 56, 33), fill=(255, 225, 60, 255), outline=(40, 40, 50, 255), width=2)
    draw.polygon([(36, 16), (60, 16), (48, 2)], fill=(40, 40, 50, 255))
    image.save(path)


def write_clips(folder: Path, name: str, clips: Clips, number: int) -> None:
    """Write clips, unless they are there."""
    if (folder / name / "manifest.jsonl").exists():
        return
    guest = ("--guest", f"{GUEST}={folder / f'{GUEST}.png'}") if clips.has_guest else ()
    size = ("--count", number * clips.times, "--seed", clips.seed, "--split", clips.split)
    run("world", "-o", folder / name, *size, *guest, "--force")


def ask(folder: Path, name: str, model: str | Path, label: str) -> dict[str, dict[str, Any]]:
    """Ask a model about clips; return what `vla2 world score` says of each kind."""
    manifest, ledger = folder / name / "manifest.jsonl", folder / f"{name}-{label}.jsonl"
    settings = ("--modality", "av", "--max-new-tokens", 64, "--batch", 16)
    run("ask", "--manifest", manifest, "-o", ledger, "--model", model, *settings, "--force")
    printed = run("world", "score", ledger, manifest, "--json", "--quiet")
    return {row["kind"]: row for row in map(json.loads, printed.splitlines())}


def run(*arguments: object) -> str:
    """Run one command of vla2; where it fails, this script ends as well."""
    command = [sys.executable, "-m", "vla2cli", *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        sys.exit(f"vla2 {' '.join(command[3:])} ended with {ended.returncode}")
    return ended.stdout


if __name__ == "__main__":
    main()
