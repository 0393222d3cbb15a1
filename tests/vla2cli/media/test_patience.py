import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from vla2cli.media import patience
from vla2cli.media.patience import MOST, queued_seconds, wait_answer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

LIMIT_S = 0.1


@pytest.fixture
def ends():
    """A socket to wait at, and the other end."""
    pair = socket.socketpair()
    with pair[0], pair[1]:
        yield pair


def queued_by(monkeypatch, *threads):
    """Let what each thread has waited for a core be a function of the seconds from now on."""
    began = time.monotonic()
    monkeypatch.setattr(
        patience,
        "queued_seconds",
        lambda pid: {str(i): f(time.monotonic() - began) for i, f in enumerate(threads)},
    )


def waited(ends):
    """How long nothing was waited for."""
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        wait_answer(ends[0], os.getpid(), LIMIT_S)
    return time.monotonic() - began


def test_process_that_has_its_core_and_says_nothing_is_late_at_the_limit(ends, monkeypatch):
    queued_by(monkeypatch, lambda s: 7.0)
    assert LIMIT_S <= waited(ends) < 2 * LIMIT_S


def test_seconds_without_a_core_are_waited_for_once_more(ends, monkeypatch):
    queued_by(monkeypatch, lambda s: 5 + min(s, 2 * LIMIT_S), lambda s: min(s, LIMIT_S))
    assert 3 * LIMIT_S <= waited(ends) < 4.5 * LIMIT_S


@pytest.mark.parametrize(("least", "last"), [(0, MOST), (14, 15)])
def test_process_that_never_gets_a_core_is_late_at_the_last(ends, monkeypatch, least, last):
    monkeypatch.setattr(patience, "LEAST_S", least * LIMIT_S)
    queued_by(monkeypatch, lambda s: s)
    assert last * LIMIT_S <= waited(ends) < (last + 3) * LIMIT_S


@pytest.mark.parametrize("end", ["something", "nothing"])
def test_what_is_said_or_that_all_is_over_ends_the_waiting(ends, monkeypatch, end):
    queued_by(monkeypatch, lambda s: s)
    told = ends[1].close if end == "nothing" else lambda: ends[1].send(b"x")
    later = threading.Timer(2.5 * LIMIT_S, told)
    later.start()
    wait_answer(ends[0], os.getpid(), LIMIT_S)
    later.join()


def test_process_that_shares_its_core_is_seen_to_wait_for_it():
    core = {min(os.sched_getaffinity(0))}
    spin = [sys.executable, "-c", "while True: pass"]
    both = [subprocess.Popen(spin) for _ in range(2)]
    try:
        for process in both:
            os.sched_setaffinity(process.pid, core)
        deadline = time.monotonic() + 20
        while sum(queued_seconds(both[0].pid).values()) < 0.1:
            assert time.monotonic() < deadline, "neither waits for the other"
            time.sleep(0.05)
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert queued_seconds(both[0].pid) == {}
