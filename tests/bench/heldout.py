"""Make the table of what a model says of clips that it never saw, beside what it cannot know.

    python tests/bench/heldout.py [--model M] [--seed S] [--quick | --count N | --write-card]

Each step is a command in a process of its own: `vla2 world` writes mp4 files, `vla2 ask --manifest`
answers through the loader of all videos, `vla2 world score` compares word for word.

    held-out   clips with a combination that no training clip has
    seen       other clips of combinations as in training
    muted      the held-out clips without their sound
    shuffled   the held-out clips, their frames in a random order
    chance     how often the most frequent answer is right; of choices, any of them

Each kind of question is asked of the first 300 clips that it fits; by default so many clips are
written that there are 300 for each. The seed is drawn at run time and printed. With the same one a
run that was ended goes on: what is on the disk, clips and answers, is not made again.
"""
# ruff: noqa: T201  it prints a table for people

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from vla2_models.hub import BUILTIN, BUILTIN_FOLDER
from vla2cli.world.write import CHOICE, MANIFEST, World, manifest_entries

NUM_CLIPS = 300  # that each kind of question is asked of
NUM_QUICK = 40
KINDS = (
    *("caption", "scene", "object", "colour", "shape", "place", "count"),
    *("motion", "direction", "order", "is-sound", "sound", "when", CHOICE),
)
SEEDS = (2**21, 2**31)  # to draw from: beyond all that the recipe trains with
CARD = BUILTIN_FOLDER / "README.md"
ENDLESS = 10**6  # clips
MAX_NEW_TOKENS = 64  # the longest caption has about 25
BATCH = 16

Entry = dict[str, Any]
Scores = dict[str, Entry]  # kind -> what `vla2 world score` says of it


@dataclass(frozen=True)
class Column:
    """One way to write the clips."""

    title: str
    split: str
    controls: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return what its folder and its ledger are called."""
        return "".join([self.split, *self.controls])


COLUMNS = (
    Column("held-out", "heldout"),
    Column("seen", "train"),
    Column("held-out, muted", "heldout", ("--mute",)),
    Column("held-out, shuffled", "heldout", ("--shuffle",)),
)


def main() -> None:
    """Write, ask, score, and print the table."""
    options = parse_options()
    seed = random.SystemRandom().randrange(*SEEDS) if options.seed is None else options.seed
    print(f"seed {seed}; --seed {seed} goes on from what is there", file=sys.stderr)
    place = options.folder / "-".join(str(part) for part in (seed, options.count) if part)
    counts = {split: options.count or count_needed(seed, split) for split in ("heldout", "train")}
    scores = [
        measure(column, World(seed, column.split, counts[column.split]), place, options.model)
        for column in COLUMNS
    ]
    told = [
        f"Seed {seed}: {counts['heldout']:,} held-out clips, {counts['train']:,} of seen "
        f"combinations; each kind is asked of the first {NUM_CLIPS} that it fits. "
        f"Weights {read_weights_hash(place)}.",
        "",
        *table_lines(scores, read_chances(questions_of(place / COLUMNS[0].name))),
    ]
    print("\n".join(told))
    if options.write_card:
        write_card(CARD, "\n".join(told))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default=BUILTIN, help="as vla2 takes it; default: %(default)s")
    parser.add_argument("--seed", type=int, help="of the clips; default: drawn and printed")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--count", type=int, help="clips of each column; default: what it takes")
    size.add_argument(
        "--quick", dest="count", action="store_const", const=NUM_QUICK, help=f"{NUM_QUICK} clips"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(".train/heldout"), help="default: %(default)s"
    )
    parser.add_argument("--write-card", action="store_true", help=f"put the table into {CARD}")
    options = parser.parse_args()
    if options.count is not None and options.count < 1:
        parser.error("--count is from 1")
    if options.write_card and options.count is not None:
        parser.error(f"--write-card is of {NUM_CLIPS} clips a kind: leave --quick, --count out")
    return options


def count_needed(seed: int, split: str) -> int:
    """Count the clips it takes until each kind of question fits `NUM_CLIPS` of them."""
    clips: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for entry in manifest_entries(World(seed, split, ENDLESS)):
        clips[entry["kind"]].add(entry["path"])
        if all(len(of_kind) >= NUM_CLIPS for of_kind in clips.values()):
            return int(Path(entry["path"]).stem) + 1
    raise AssertionError(f"{ENDLESS} clips are not enough")


def measure(column: Column, world: World, place: Path, model: str) -> Scores:
    """Do what is left of one column."""
    clips, ledger = place / column.name, place / f"{column.name}.jsonl"
    size = ("--count", world.count, "--seed", world.seed, "--split", world.split)
    if not (clips / MANIFEST).exists():  # it is written last
        run("world", "-o", clips, *size, *column.controls, "--force")
    questions = questions_of(clips)
    # av: in a file without a track, silence is heard, as the manifest says
    settings = ("--modality", "av", "--max-new-tokens", MAX_NEW_TOKENS, "--batch", BATCH)
    run("ask", "--manifest", questions, "-o", ledger, "--model", model, *settings)
    printed = run("world", "score", ledger, questions, "--json", "--quiet", is_read=True)
    return {row["kind"]: row for row in map(json.loads, printed.splitlines())}


def run(*arguments: object, is_read: bool = False) -> str:
    """Run one command of vla2; where it fails, this script ends as well."""
    command = [sys.executable, "-m", "vla2cli", *map(str, arguments)]
    stdout = subprocess.PIPE if is_read else None
    ended = subprocess.run(command, stdout=stdout, text=True, check=False)
    if ended.returncode:
        sys.exit(f"vla2 {' '.join(command[3:])} ended with {ended.returncode}")
    return ended.stdout or ""


def questions_of(clips: Path) -> Path:
    """Write down what is asked of a folder of clips: each kind, of the first that it fits."""
    asked: dict[str, set[str]] = defaultdict(set)
    lines = []
    for entry in read_lines(clips / MANIFEST):
        of_kind = asked[entry["kind"]]
        if len(of_kind) < NUM_CLIPS or entry["path"] in of_kind:
            of_kind.add(entry["path"])
            lines.append(json.dumps(entry, ensure_ascii=False))
    questions = clips / "questions.jsonl"
    questions.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return questions


def read_chances(questions: Path) -> dict[str, float]:
    """Say for each kind how often one and the same answer would be right."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    guesses = []
    for entry in read_lines(questions):
        answers[entry["kind"]][entry["answer"]] += 1
        if entry["kind"] == CHOICE:
            guesses.append(1 / len(entry["choices"]))
    chances = {kind: max(of.values()) / of.total() for kind, of in answers.items()}
    return {**chances, CHOICE: mean(guesses)}


def read_weights_hash(place: Path) -> str:
    """Return the beginning of the hash of the weights that answered last."""
    *_, record = read_lines(place / f"{COLUMNS[-1].name}.jsonl")
    return str(record["model"]["sha256"])[:12]


def read_lines(path: Path) -> Iterator[Entry]:
    """Read JSON Lines; a string in them may hold other line breaks as they are."""
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        yield json.loads(line)


def table_lines(scores: Sequence[Scores], chances: dict[str, float]) -> list[str]:
    """Lay the table out in Markdown."""
    titles = ["", *(column.title for column in COLUMNS), "chance"]
    rows = [titles, ["---"] * len(titles)]
    for kind in KINDS:
        cells = [_cell(of_column.get(kind)) for of_column in scores]
        rows.append([kind, *cells, f"{chances[kind]:.1%}" if kind in chances else "-"])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(row: Entry | None) -> str:
    return f"{row['right'] / row['num']:.1%} of {row['num']}" if row else "-"


def write_card(card: Path, table: str) -> None:
    """Put the table, and the curves that training has left, at their places in a model card."""
    curves = sorted((card.parent / "logs").glob("*-exam.png"))
    shown = [f"![{curve.stem}](logs/{curve.name})" for curve in curves] or ["No curve yet."]
    text = fill(card.read_text(encoding="utf-8"), "table", table)
    card.write_text(fill(text, "curve", "\n\n".join(shown)), encoding="utf-8")


def fill(text: str, mark: str, content: str) -> str:
    """Replace what stands between <!-- mark --> and <!-- /mark -->."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    filled, times = pattern.subn(lambda _: f"{begin}\n\n{content}\n\n{end}", text)
    assert times == 1, f"{mark!r} is marked {times} times in the card"
    return filled


if __name__ == "__main__":
    main()
