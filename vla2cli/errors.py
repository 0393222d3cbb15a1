"""Everything that can go wrong for a user, each with its exit code.

Vla2Error                1  could not go on
├── UsageError           2  the command line asks for something that cannot be
├── NoInputError         4  nothing to work on
├── ModelError           1  a checkpoint is refused
├── FrontendError        1  a fast front-end cannot be made or run
├── LedgerError          1  the output cannot be written or is not a ledger
│   └── LedgerBusyError  5  another run holds the output
└── InputError           -  one file cannot be used: it becomes an error record
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vla2cli.media.records import FileState


class Vla2Error(Exception):
    """A user's problem: printed as one line `vla2: message`, without a traceback."""

    exit_code = 1


class UsageError(Vla2Error):
    """The command line asks for something that cannot be."""

    exit_code = 2


class NoInputError(Vla2Error):
    """Nothing to work on was found, or every item failed."""

    exit_code = 4


class ModelError(Vla2Error):
    """A checkpoint cannot be found, read or trusted."""


class FrontendError(Vla2Error):
    """A front-end cannot be exported, or its export cannot be run."""


class LedgerError(Vla2Error):
    """The output cannot be written, or is not a ledger of ours."""


class LedgerBusyError(LedgerError):
    """Another run holds this output's lock."""

    exit_code = 5


class RunBusyError(Vla2Error):
    """Another process trains in this run's folder."""

    exit_code = 5


class InputError(Vla2Error):
    """One file cannot be used; in a batch it costs one error record.

    Args:
        message: one line, what is wrong and what to do; the file's name is added where it is shown.
        kind: a short, stable word for scripts, such as `decode` or `timeout`.
        stage: where it happened: `open`, `decode`, `preprocess`, `encode` or `generate`.
    """

    def __init__(self, message: str, *, kind: str, stage: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.stage = stage
        # the file as it was when it was looked at, as far as that is known
        self.state: FileState | None = None


def why(error: OSError) -> str:
    """Return the reason in lower case, without number and file name."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether there was no memory left, of the machine or of a GPU."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in str(error)
    # what PyTorch raises on the CPU has no class of its own, and oneDNN gives no reason
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "can't allocate memory" in text or text == "could not create a primitive"
