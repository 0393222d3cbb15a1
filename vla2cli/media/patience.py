"""How long a worker is waited for, on a machine that may have no core for it."""

import select
import socket
import time
from contextlib import suppress
from pathlib import Path

MOST = 10  # times the limit, however busy the machine


def wait_answer(sock: socket.socket, pid: int, limit_s: float) -> None:
    """Wait until a process has something to say.

    Args:
        sock: where it comes from.
        pid: of the process.
        limit_s: seconds; those in which a thread of it waited for a core do not count.

    Raises:
        TimeoutError: it had its time and said nothing.
    """
    poll = select.poll()  # unlike `select` it takes any number
    poll.register(sock, select.POLLIN)
    started, before_s, queued_s = time.monotonic(), queued_seconds(pid), 0.0
    while True:
        left_s = started + limit_s + queued_s - time.monotonic()
        if poll.poll(max(0.0, left_s) * 1e3):
            return
        more_s = min(queued_seconds(pid) - before_s, (MOST - 1) * limit_s)
        if more_s <= queued_s:
            raise TimeoutError
        queued_s = more_s


def queued_seconds(pid: int) -> float:
    """Sum what the threads of a process have waited for a core; 0 where nobody counts it."""
    total_ns = 0
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread ends at any time
                total_ns += int((task / "schedstat").read_text().split()[1])
    return total_ns / 1e9
