"""The way in, `vla2` or `python -m vla2cli`: here Ctrl-C is one line from the first import on."""

import atexit
import gc
import os
import signal
from types import FrameType


def main() -> None:
    """Import the command line, which takes a while, and run it."""
    # a run in the background may have been told to take no notice of it
    is_obeyed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_obeyed:
        signal.signal(signal.SIGINT, _leave)
    # a million objects are imported and stay: to look for garbage among them takes a second, and
    # most of another one at the end, when nothing is left to be written or closed
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
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
