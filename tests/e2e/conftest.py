"""Real processes: `vla2` as a user runs it, with a miniature model and a clean environment."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from vla2_models.miniature import MODEL_ID, write_miniature

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
MARK = "E2E_MARK"  # an environment variable, by which even an orphan is known as ours
LIMIT_S = 120.0  # a run takes some 6 s, of which 5 go into imports


@dataclass(frozen=True)
class Result:
    """What came out of a process."""

    code: int  # as a shell sees it: 128 + the signal that ended it
    stdout: str
    stderr: str

    @property
    def records(self):
        """The JSON Lines on stdout."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def texts(self):
        """id -> text of the records on stdout."""
        return {record["id"]: record["text"] for record in self.records}


class Running:
    """A process with its output as it comes; leads a process group of its own.

    Args:
        command: what to run.
        terminals: which of stdout and stderr are terminals.
    """

    def __init__(self, command, *, env, cwd, stdin=b"", terminals=()):
        ends = {name: _open_end(name in terminals) for name in ("stdout", "stderr")}
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=ends["stdout"][1],
            stderr=ends["stderr"][1],
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.output = {name: bytearray() for name in ends}
        self.threads = [
            threading.Thread(target=_copy, args=(our_end, self.output[name]))
            for name, (our_end, _) in ends.items()
        ]
        for thread in self.threads:
            thread.start()
        for _, their_end in ends.values():
            os.close(their_end)
        if stdin:
            with self.process.stdin as pipe:
                pipe.write(stdin)

    def wait(self, limit_s=LIMIT_S):
        """Return what came out; a process that does not end in time fails the test."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill_group()
            pytest.fail(f"still there after {limit_s} s; stderr: {self.output['stderr'].decode()}")
        for thread in self.threads:
            thread.join(10)
        out, err = (bytes(self.output[name]).decode() for name in ("stdout", "stderr"))
        return Result(code if code >= 0 else 128 - code, out, err)

    def says(self, text):
        """Tell whether stderr holds a text by now."""
        return text.encode() in self.output["stderr"]

    def send(self, signum):
        """Send a signal to this process alone."""
        self.process.send_signal(signum)

    def send_group(self, signum):
        """Send a signal to the process and its children, as a terminal's Ctrl-C does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def kill_group(self):
        """End everything and reap it."""
        self.send_group(signal.SIGKILL)
        self.process.wait()


def _open_end(is_terminal):
    """Return our end and theirs."""
    if not is_terminal:
        return os.pipe()
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST  # newlines stay as they were written
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    return ours, theirs


def _copy(fd, output):
    with contextlib.suppress(OSError):  # a terminal that was closed reads as an error
        while chunk := os.read(fd, 65536):
            output.extend(chunk)
    os.close(fd)


class Vla2:
    """The installed command. Call it to run it, `start` it to go on beside it.

    The model, its hub folder and 12 new tokens are set through `VLA2_*` variables.
    """

    def __init__(self, hub_dir, home):
        self.hub_dir = hub_dir
        self.mark = uuid4().hex
        self.program = shutil.which("vla2", path=str(Path(sys.executable).parent))
        assert self.program, "vla2 is not installed beside this Python"
        inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        self.env = {
            **inherited,
            "HOME": str(home),
            "TERM": "xterm",
            "COLUMNS": "100",
            "OMP_NUM_THREADS": "1",  # networks this small only wait for each other's threads
            MARK: self.mark,
            "VLA2_HUB_DIR": str(hub_dir),
            "VLA2_MODEL": MODEL_ID,
            "VLA2_MAX_NEW_TOKENS": "12",
        }

    def start(self, *args, env=None, cwd=REPOSITORY, stdin=b"", terminals=(), program=None):
        """Start it; in `env`, None takes a variable away."""
        changed = {k: v for k, v in {**self.env, **(env or {})}.items() if v is not None}
        command = [program or self.program, *map(os.fspath, args)]
        return Running(command, env=changed, cwd=cwd, stdin=stdin, terminals=terminals)

    def __call__(self, *args, limit_s=LIMIT_S, **kwargs):
        """Run it to its end."""
        return self.start(*args, **kwargs).wait(limit_s)

    def processes(self):
        """List our processes that are alive: pid -> command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes()
        return found

    def workers(self):
        """List the decoding processes that are alive, orphans among them."""
        return sorted(pid for pid, line in self.processes().items() if b"media.worker" in line)


def together(*calls):
    """Call several functions, two at a time: most of a run is imports, which use one core."""
    with ThreadPoolExecutor(2) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]


@pytest.fixture(scope="session")
def hub_dir(tmp_path_factory):
    """A local hub with the miniature model."""
    folder = tmp_path_factory.mktemp("hub")
    write_miniature(folder)
    return folder


@pytest.fixture(scope="session")
def vla2(hub_dir, tmp_path_factory):
    """The command, see `Vla2`."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    return Vla2(hub_dir, tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _nothing_left_behind(vla2):
    yield
    deadline = time.monotonic() + 5
    while (left := vla2.processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"left behind: {left}"


@pytest.fixture
def make_clips(tmp_path):
    """Fill a folder with copies of the example clips: `make_clips(30) -> folder`."""

    def make(number, name="clips"):
        folder = tmp_path / name
        folder.mkdir()
        clips = sorted(EXAMPLES.glob("*.mp4"))
        for i in range(number):
            shutil.copy(clips[i % len(clips)], folder / f"{i:03}.mp4")
        return folder

    return make


@pytest.fixture
def wait_until():
    """Wait for something to become true: `wait_until(lambda: ..., limit_s)`."""

    def wait(condition, limit_s=60.0):
        deadline = time.monotonic() + limit_s
        while not (found := condition()):
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.005)
        return found

    return wait


@pytest.fixture
def read_ledger():
    """Read a ledger that must be whole: key -> last record."""

    def read(path):
        data = Path(path).read_bytes() if Path(path).exists() else b""
        assert not data or data.endswith(b"\n"), f"{path} ends in {data[-40:]}"
        records = [json.loads(line) for line in data.splitlines()]
        return {_key(record): record for record in records}

    return read


def _key(record):
    asked = tuple(turn["question"] for turn in record.get("history") or [])
    return record["id"], record["task"], record["question"], str(record["segment"]), asked
