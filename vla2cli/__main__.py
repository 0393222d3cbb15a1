"""The way in, `vla2` or `python -m vla2cli`: here Ctrl-C is one line from the first import on."""

import os
import signal
from types import FrameType


def main() -> None:
    """Import the command line, which takes a while, and run it."""
    # a run in the background may have been told to take no notice of it
    is_obeyed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_obeyed:
        signal.signal(signal.SIGINT, _leave)
    from vla2cli.cli import main as run

    if is_obeyed:
        signal.signal(signal.SIGINT, _interrupt)
    run()


def _leave(_signum: int, _frame: FrameType | None) -> None:
    # an exception would be lost where a library that is just being imported catches them all
    _say()
    os._exit(130)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    _say()
    raise KeyboardInterrupt  # what is half made is taken away; then typer exits with 130


def _say() -> None:
    os.write(2, b"vla2: ended by SIGINT\n")


if __name__ == "__main__":
    main()
