"""Ending on Ctrl-C or SIGTERM without losing what is in hand, or leaving what is half made."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vla2cli.console import Console, Say

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_S = 0.3  # signals that come together are one: `timeout` tells its child, then its child's group


class Stop:
    """SIGINT and SIGTERM during a run: the first ends it after the batch in hand.

    Args:
        console: told so.
        unit: what is in hand.
    """

    def __init__(self, console: Console, unit: str = "record") -> None:
        self.console = console
        self.unit = unit
        self.signum: int | None = None
        self.is_running = False  # until then there is nothing in hand

    def __enter__(self) -> Stop:
        """Take over the signals."""
        self._pid = os.getpid()
        self.before = {s: signal.signal(s, self._take) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __call__(self) -> bool:
        """Tell whether to stop."""
        return self.signum is not None

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a fork of this process, which ends it when its time comes
            return
        now = time.monotonic()
        if self.is_running and self.signum is None:
            self.signum, self._since = signum, now
            if not self.console.quiet:
                _say(f"stopping after the {self.unit} in hand … (once more to end at once)")
            return
        if self.is_running and now < self._since + ONE_S:
            return
        if not self.is_running:
            _say(f"vla2: ended by {signal.Signals(signum).name}; nothing was run")
        # the ledger is whole at any moment and the decoding processes die with this one; an
        # exception would be lost where a library that is just being imported catches them all
        os._exit(128 + signum)


@contextmanager
def cleaning_up(say: Say, outcome: str = "nothing was written") -> Iterator[None]:
    """Let work that is ended from outside take away what it has begun, undisturbed.

    Args:
        say: told what ended it, and the outcome.
        outcome: what that leaves.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    # a run in the background may have been told to take no notice of them
    taken = [s for s in ENDINGS if signal.getsignal(s) is not signal.SIG_IGN]

    def end(signum: int, _frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    before = {signum: signal.signal(signum, end) for signum in taken}
    try:
        yield
    except SystemExit as ended:
        name = signal.Signals(int(str(ended.code)) - 128).name
        say(f"vla2: ended by {name}; {outcome}")
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _say(message: str) -> None:
    # the interrupted code may be in the middle of printing
    os.write(2, f"{message}\n".encode())
