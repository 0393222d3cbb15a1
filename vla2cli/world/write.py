"""A folder of clips with what is true of them: to train on, to ask about, to look at.

00000.mp4 …      the clips
data.json        questions and answers in the public training format, one question an entry
manifest.jsonl   the same as `vla2 ask --manifest` takes them and `vla2 world score` judges them

Muted or shuffled clips are controls: what can no longer be told from them stays in the manifest, to
see how often it is right all the same, and there is no data.json, from which one would learn lies.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vla2cli.errors import UsageError, Vla2Error, why
from vla2cli.plan import DEFAULT_PROMPT
from vla2cli.world.clip import WorldClip
from vla2cli.world.encode import encode
from vla2cli.world.facts import Thing
from vla2cli.world.words import Question, caption

DATA = "data.json"
MANIFEST = "manifest.jsonl"
CHOICE = "choice"  # the kind of a question that is asked by the log-probability of its choices
MARK = ".vla2-world"  # in a folder of ours, from before its first clip on
_OURS = re.compile("|".join([r"\d{5,}\.mp4", *map(re.escape, (DATA, MANIFEST, MARK))]))


@dataclass(frozen=True)
class World:
    """A collection of clips, as one command makes it."""

    seed: int  # 0 or more
    split: str  # train | heldout
    count: int  # at least 1
    is_muted: bool = False  # the sound is replaced by silence
    is_shuffled: bool = False  # the frames come in a random order
    guest: Thing | None = None  # an object of a picture of its own, in every clip

    @property
    def is_control(self) -> bool:
        """Whether something that is said of a clip cannot be told from its file."""
        return self.is_muted or self.is_shuffled

    def clips(self) -> Iterator[tuple[str, WorldClip]]:
        """Yield each clip with the name of its file."""
        for index in range(self.count):
            yield f"{index:05}.mp4", WorldClip(self.seed, index, self.split, self.guest)


def write_world(
    world: World, folder: Path, *, workers: int = 1, force: bool = False
) -> Generator[str, None, None]:
    """Write all clips, then what is true of them.

    Args:
        world: the same one gives the same files.
        folder: must not exist, or be empty.
        workers: processes that draw and encode; above 1 they are started anew, so that a script
            that calls this needs `if __name__ == "__main__"`.
        force: remove the files of such a folder first; others stay.

    Yields:
        The name of each clip once it is written, in order.

    Raises:
        UsageError: the folder holds something, or is none.
        Vla2Error: a file cannot be written; what was written is taken away.
    """
    with _prepared(folder, force=force):
        yield from _encode_all(world, folder, workers)
        if not world.is_control:
            _write_text(folder / DATA, _listed(training_entries(world)))
        _write_text(folder / MANIFEST, "".join(f"{_line(e)}\n" for e in manifest_entries(world)))


def manifest_entries(world: World) -> Iterator[dict[str, Any]]:
    """Yield the lines of the manifest: all questions, those with choices once more with them.

    A question with choices has an id of its own: in a ledger, the id and the question tell a record
    from others.
    """
    for name, clip in world.clips():
        for question in ask_clip(clip):
            yield _manifest_entry(name, question)
        for question in ask_clip(clip):
            if question.choices:
                entry = _manifest_entry(name, question)
                yield {
                    "id": f"{name}#{CHOICE}",
                    **entry,
                    "kind": CHOICE,
                    "choices": list(question.choices),
                }


def training_entries(world: World) -> Iterator[dict[str, Any]]:
    """Yield the questions in the public training format, one an entry, so that they can be packed.

    Source: upstream VideoLLaMA2@c0bb03a, README, "Data structure".
    """
    for name, clip in world.clips():
        for number, question in enumerate(ask_clip(clip)):
            yield {
                "id": f"{Path(name).stem}-{number}",
                "video": name,
                "conversations": [
                    {"from": "human", "value": f"<video>\n{question.text}"},
                    {"from": "gpt", "value": question.answer},
                ],
            }


def ask_clip(clip: WorldClip) -> list[Question]:
    """List what a clip is asked: the default prompt of `vla2 caption`, then each other question."""
    default = DEFAULT_PROMPT.format(medium="video")
    others = [question for question in clip.questions() if question.text != default]
    return [Question("caption", default, caption(clip.facts)), *others]


def _manifest_entry(name: str, question: Question) -> dict[str, Any]:
    return {
        "path": name,
        "question": question.text,
        "answer": question.answer,
        "kind": question.kind,
    }


@contextmanager
def _prepared(folder: Path, *, force: bool) -> Iterator[None]:
    """Make an empty folder; take away what was written where the work does not end well."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if force and (folder / MARK).exists():
            _remove_ours(folder)
        elif force and (other := _find_like_ours(folder)):
            raise UsageError(
                f"'{folder}' has a '{other}' that was not written by vla2 world; give a new folder"
            )
        elif not force and any(folder.iterdir()):
            raise UsageError(
                f"'{folder}' is not empty; give a new folder, or --force to replace the clips in it"
            )
        (folder / MARK).touch()
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written: {why(error)}") from error
    try:
        yield
    except BaseException:
        _remove_ours(folder)
        if is_new:
            with suppress(OSError):  # what went wrong first is what counts
                folder.rmdir()
        raise


def _find_like_ours(folder: Path) -> str | None:
    """Name a file that would be replaced or taken for a clip."""
    names = (path.name for path in folder.iterdir())
    return min(filter(_OURS.fullmatch, names), default=None)


def _remove_ours(folder: Path) -> None:
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and not path.is_dir():
            path.unlink()


def _encode_all(world: World, folder: Path, workers: int) -> Iterator[str]:
    make = partial(encode, is_muted=world.is_muted, is_shuffled=world.is_shuffled)
    if workers == 1:
        for name, clip in world.clips():
            make(clip, folder / name)
            yield name
        return
    # spawned: a fork of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker) as pool:
        try:
            names, clips = zip(*world.clips())
            paths = [folder / name for name in names]
            for name, _ in zip(names, pool.map(make, clips, paths), strict=True):
                yield name
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Vla2Error(f"cannot write '{path}': {why(error)}") from error


def _listed(entries: Iterable[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(map(_line, entries)) + "\n]\n"


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False)
