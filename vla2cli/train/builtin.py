"""Train the built-in model from nothing, stage after stage: `make train-builtin`.

Each stage is a configuration in builtin/recipe, run by `vla2 train`. What an interrupted run has
done is kept in .train/, and the same command goes on from there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from vla2_models.builtin_design import write_untrained
from vla2_models.checkpoint import open_checkpoint
from vla2_models.hub import BUILTIN_FOLDER, Source
from vla2_models.loading import load_model
from vla2_models.saving import save_checkpoint
from vla2cli.train.curves import plot_exam
from vla2cli.train.exam import EXAM
from vla2cli.train.log import LOG, PLOT
from vla2cli.world.clip import WorldClip

RECIPE = BUILTIN_FOLDER / "recipe"
WORK = Path(".train")
NUM_CLIPS = 1500  # whose words the tokenizer is made of
FIRST_SEED = 77  # of those
LOGS = BUILTIN_FOLDER / "logs"


def main() -> None:
    """Run what is left of the recipe, and put its end in the place of the built-in model."""
    untrained = WORK / "0-untrained"
    if not untrained.exists():
        aside = WORK / "untrained"
        shutil.rmtree(aside, ignore_errors=True)
        write_untrained(aside, list(_texts()), seed=0)
        aside.rename(untrained)
    stages = sorted(RECIPE.glob("*.yaml"))
    for stage in stages:
        run_stage(stage)
    publish(WORK / stages[-1].stem)
    shutil.rmtree(LOGS, ignore_errors=True)  # of other weights
    LOGS.mkdir()
    for stage in stages:
        keep_log(WORK / stage.stem)


def run_stage(stage: Path) -> None:
    """Run one stage; where it does not come to its end, neither does this process."""
    process = subprocess.Popen([sys.executable, "-m", "vla2cli", "train", str(stage)])
    while process.poll() is None:
        with suppress(KeyboardInterrupt):  # the stage was told too, and ends behind a checkpoint
            process.wait()
    if process.returncode:
        sys.exit(process.returncode)


def keep_log(run: Path) -> None:
    """Put what a run said of itself beside the weights, with the curves of its exams if any."""
    names = [LOG, PLOT]
    if (run / EXAM).exists():
        names.append(EXAM)
        plot_exam(run / EXAM, LOGS / f"{run.name}-exam.png")
    for name in names:
        shutil.copyfile(run / name, LOGS / f"{run.name}-{name}")


def publish(folder: Path) -> None:
    """Write a trained checkpoint in half precision where the package has its built-in model."""
    aside = WORK / "published"
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint = open_checkpoint(str(folder), Source(None, True))
    save_checkpoint(load_model(checkpoint, dtype=torch.float16), checkpoint, aside)
    shutil.copytree(aside, BUILTIN_FOLDER, dirs_exist_ok=True)


def _texts() -> Iterator[str]:
    for index in range(NUM_CLIPS):
        clip = WorldClip(FIRST_SEED, index, "train", apart=index % 2)
        for medium in ("av", "video", "audio"):
            for question in clip.questions(medium):
                yield from (question.text, question.text.replace("video", "image"), question.answer)


if __name__ == "__main__":
    main()
