"""One run at a time in a folder: a second would take back what the first is writing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla2cli.errors import RunBusyError, UsageError, why

LOCK = ".lock"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder, on the first of the processes that train in it together.

    The lock is the process's own: it ends with it, and no reader that it forks keeps it.

    Raises:
        RunBusyError: another process holds it.
        UsageError: it cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":  # set by the launcher
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UsageError(f"output '{folder}' cannot be written: {why(error)}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunBusyError(
                f"output '{folder}' is held by another run; wait for its end, or give a new folder"
            ) from error
        yield
