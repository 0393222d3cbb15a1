"""How long a worker is waited for, on a machine that may have no core for it."""

import select
import socket
import time
from contextlib import suppress
from pathlib import Path

NICENESS = 10  # of workers: decoding ahead is never as urgent as what the model is at
# times the limit, however busy the machine: beside one other process on its core, which is not
# nice, a worker has a tenth of it
MOST = 10
LEAST_S = 60.0  # that a busy machine may take for it, however short the limit


def wait_answer(sock: socket.socket, pid: int, limit_s: float) -> None:
    """Wait until a process has something to say.

    Args:
        sock: where it comes from.
        pid: of the process.
        limit_s: seconds; those in which it waited for a core do not count.

    Raises:
        TimeoutError: it had its time and said nothing.
    """
    poll = select.poll()  # unlike `select` it takes any number
    poll.register(sock, select.POLLIN)
    started, before, queued_s = time.monotonic(), queued_seconds(pid), 0.0
    while True:
        left_s = started + limit_s + queued_s - time.monotonic()
        if poll.poll(max(0.0, left_s) * 1e3):
            return
        # threads wait for each other as well: the one that had to wait longest tells
        longest_s = max((s - before.get(i, 0.0) for i, s in queued_seconds(pid).items()), default=0)
        more_s = min(longest_s, max((MOST - 1) * limit_s, LEAST_S))
        if more_s <= queued_s:
            raise TimeoutError
        queued_s = more_s


def queued_seconds(pid: int) -> dict[str, float]:
    """Tell for how long each thread of a process has waited for a core; empty but on Linux."""
    found = {}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread ends at any time
                found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return found
