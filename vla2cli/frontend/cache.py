"""The export that a run needs: found in the store, or made and put there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vla2_models.checkpoint import Checkpoint
from vla2_models.files import UNFINISHED
from vla2cli.console import Say
from vla2cli.frontend.origin import origin_of
from vla2cli.frontend.store import cache_root, find_problem, held_alone, held_with_others
from vla2cli.stop import cleaning_up

if TYPE_CHECKING:
    import torch

    from vla2cli.frontend.onnx import OnnxFrontend


def open_frontend(
    checkpoint: Checkpoint,
    precision: str,
    device: torch.device,
    dtype: torch.dtype,
    say: Say,
    *,
    use_tensorrt: bool = False,
) -> OnnxFrontend:
    """Open the export of a checkpoint, which is made first where there is none.

    Args:
        checkpoint: from `open_checkpoint`.
        precision: one of `PRECISIONS`.
        device: where it runs.
        dtype: of its tokens.
        say: told what is waited for.
        use_tensorrt: on CUDA, run on it what TensorRT can take.

    Raises:
        FrontendError: it cannot be made, kept or run.
    """
    from vla2cli.frontend.onnx import OnnxFrontend

    with cached_export(checkpoint, precision, say) as folder:
        return OnnxFrontend(folder, device, dtype, use_tensorrt=use_tensorrt)


@contextmanager
def cached_export(
    checkpoint: Checkpoint, precision: str, say: Say, *, is_anew: bool = False
) -> Iterator[Path]:
    """Give the folder of a usable export; nobody removes or replaces it meanwhile.

    Args:
        checkpoint: from `open_checkpoint`.
        precision: one of `PRECISIONS`.
        say: told what is waited for, and why one that is there cannot be used.
        is_anew: make it again, though there is one.

    Raises:
        FrontendError: it cannot be made or kept.
        CheckpointError: the weights cannot be read.
    """
    folder, key = _place_of(checkpoint, precision, say)

    def wait() -> None:
        say(f"waiting for another process that is at work on '{folder}' …")

    if not is_anew:
        with held_with_others(folder, wait):
            if find_problem(folder, key, say) is None:
                yield folder
                return
    with held_alone(folder, wait):
        problem = find_problem(folder, key, say)
        if problem is not None or is_anew:
            if problem is not None and folder.exists():
                say(f"{problem}; exporting anew")
            _make(checkpoint, folder, precision, say)
        yield folder


def find_export(checkpoint: Checkpoint, precision: str, say: Say) -> Path | None:
    """Return the folder of a usable export; None where there is none. It may be gone any time."""
    if not any(cache_root().glob(f"{precision}-*")):
        return None  # before the weights are hashed
    folder, key = _place_of(checkpoint, precision, say)
    return folder if find_problem(folder, key, say) is None else None


def _place_of(checkpoint: Checkpoint, precision: str, say: Say) -> tuple[Path, str]:
    key = origin_of(checkpoint, precision, say).key
    return cache_root() / f"{precision}-{key[:32]}", key


def _make(checkpoint: Checkpoint, folder: Path, precision: str, say: Say) -> None:
    # only now: the exporter takes a second to load
    from vla2cli.frontend.export import export_checkpoint

    for left in folder.parent.glob(f"{UNFINISHED}{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed: the lock is ours
    with cleaning_up(say):
        export_checkpoint(checkpoint, folder, precision, say)
