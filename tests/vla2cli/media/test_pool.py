import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla2cli.errors import InputError
from vla2cli.media.frames import read_frames
from vla2cli.media.patience import NICENESS
from vla2cli.media.pool import ClipRequest, DecodePool
from vla2cli.preprocess import FrameGeometry, fit_frame

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

GEOMETRY = FrameGeometry(28, 28, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def folder(tmp_path):
    """A clip of three frames, without any codec."""
    path = tmp_path / "clip"
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(path / f"{i}.png")
    return str(path)


def request(path, **kwargs):
    return ClipRequest(str(path), kwargs.pop("kind", "video"), GEOMETRY, num_frames=3, **kwargs)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def stopped_worker(pool, folder):
    """Start the only worker and freeze it: whatever it is given next hangs."""
    pool.submit_probe(folder, "video").result(20)
    (pid,) = pool.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_file_is_hashed_once_until_its_size_or_time_changes(tmp_path):
    path = tmp_path / "a.bin"

    def hashed(content, time_ns):
        path.write_bytes(content)
        os.utime(path, ns=(time_ns, time_ns))
        return pool.submit_hash(str(path)).result(20).sha256

    with DecodePool(1) as pool:
        first = hashed(b"one", 1)
        assert first == hashlib.sha256(b"one").hexdigest()
        assert hashed(b"two", 1) == first  # nothing tells that it was read again
        assert hashed(b"two", 2) == hashlib.sha256(b"two").hexdigest()
        assert hashed(b"three", 2) == hashlib.sha256(b"three").hexdigest()


@pytest.fixture
def long_file(tmp_path):
    """A file that takes a moment to hash, and its hash; it has no blocks on the disk."""
    path = tmp_path / "long.bin"
    with path.open("wb") as file:
        file.truncate(300_000_000)
    with path.open("rb") as file:
        return str(path), hashlib.file_digest(file, "sha256").hexdigest()


def num_read(pids):
    """Count the bytes that processes have read."""
    lines = [Path(f"/proc/{pid}/io").read_text().splitlines()[0] for pid in pids]
    return sum(int(line.removeprefix("rchar: ")) for line in lines)


def test_file_that_several_workers_want_is_hashed_by_one(folder, long_file):
    path, sha256 = long_file
    with DecodePool(3) as pool:
        everyone = threading.Barrier(3)
        for future in [pool.submit(request(folder), lambda _: everyone.wait(20)) for _ in range(3)]:
            future.result(20)
        before = num_read(pool.worker_pids())
        states = [future.result(20) for future in [pool.submit_hash(path) for _ in range(9)]]
        assert num_read(pool.worker_pids()) - before < 1.5 * 300_000_000
    assert {state.sha256 for state in states} == {sha256}


def test_hash_that_fails_is_tried_by_who_waits_for_it(long_file):
    path, sha256 = long_file
    with DecodePool(2) as pool:
        first = pool.submit_hash(path)
        wait_until(lambda: len(pool.worker_pids()) == 1)
        (pid,) = pool.worker_pids()
        wait_until(lambda: num_read([pid]) > 20_000_000)
        os.kill(pid, signal.SIGSTOP)
        second = pool.submit_hash(path)
        wait_until(lambda: len(pool.worker_pids()) == 2)
        seen = {*pool.worker_pids()}
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: {*pool.worker_pids()} - seen)
        (again,) = {*pool.worker_pids()} - seen
        os.kill(again, signal.SIGKILL)
        with pytest.raises(InputError) as caught:
            first.result(20)
        assert caught.value.kind == "worker-died"
        assert second.result(20).sha256 == sha256
        assert pool.submit_hash(path).result(20).sha256 == sha256


def test_clip_is_what_the_readers_give(folder):
    with DecodePool(2) as pool:
        clip = pool.submit(request(folder, start_s=0.0, end_s=1.0)).result(20)
        state = pool.submit_hash(folder + "/1.png").result(20)
    frames = read_frames(folder, "video", num_frames=3, start_s=0.0, end_s=1.0)
    expected = np.stack([fit_frame(image, GEOMETRY) for image in frames.images])
    assert np.array_equal(clip.frames, expected)
    assert (clip.indices, clip.timestamps_s) == (frames.indices, frames.timestamps_s)
    assert (clip.kind, clip.num_total, clip.fps, clip.flags) == ("video", 3, 3.0, ())
    assert set(clip.timings_s) == {"read", "preprocess"}
    content = Path(folder, "1.png").read_bytes()
    assert (state.size_bytes, state.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert state.mtime_ns == Path(folder, "1.png").stat().st_mtime_ns


def test_name_of_any_bytes_reaches_the_worker(folder, tmp_path):
    path = os.fsdecode(bytes(tmp_path) + b"/odd \xff\n\xc3\xa9.png")
    Path(folder, "0.png").rename(path)
    with DecodePool(1) as pool:
        clip = pool.submit(request(path, kind="unknown")).result(20)
    assert (clip.kind, len(clip.frames)) == ("image", 1)


def test_bad_files_raise_their_kind_and_cost_no_worker(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with DecodePool(1) as pool:
        pool.submit_probe(folder, "video").result(20)
        before = pool.worker_pids()
        for name, kind in [("pipe", "not-a-file"), ("text", "decode"), ("none", "missing")]:
            with pytest.raises(InputError) as caught:
                pool.submit(request(tmp_path / f"{name}.mp4")).result(20)
            assert caught.value.kind == kind
        assert pool.worker_pids() == before


def test_hanging_worker_times_out_and_the_next_file_gets_another(folder):
    with DecodePool(1, timeout_s=0.5) as pool:
        pid = stopped_worker(pool, folder)
        start = time.monotonic()
        with pytest.raises(InputError, match=r"took longer than 0\.5 s") as caught:
            pool.submit(request(folder)).result(20)
        assert caught.value.kind == "timeout"
        assert time.monotonic() - start < 5
        assert not is_alive(pid)
        assert len(pool.submit(request(folder)).result(20).frames) == 3


def test_workers_give_way_to_the_model(folder):
    with DecodePool(1) as pool:
        pool.submit_probe(folder, "video").result(20)
        (pid,) = pool.worker_pids()
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, pid) == max(own, NICENESS)


def test_killed_worker_is_replaced_and_the_file_tried_again(folder):
    with DecodePool(1) as pool:
        pid = stopped_worker(pool, folder)
        future = pool.submit(request(folder))
        time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        assert len(future.result(20).frames) == 3
        assert pool.worker_pids() != [pid]


def test_file_that_kills_two_workers_is_refused(folder):
    with DecodePool(1) as pool:
        first = stopped_worker(pool, folder)
        future = pool.submit(request(folder))
        os.kill(first, signal.SIGKILL)
        # the second may be caught while it starts: a death is a death
        wait_until(lambda: pool.worker_pids() and pool.worker_pids() != [first])
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(InputError, match="SIGKILL") as caught:
            future.result(20)
        assert caught.value.kind == "worker-died"
        assert len(pool.submit(request(folder)).result(20).frames) == 3


def test_memory_beyond_the_limit_is_refused(tmp_path):
    Image.new("RGB", (5000, 5000)).save(tmp_path / "large.png")
    with DecodePool(1, memory_bytes=50 * 2**20) as pool:
        with pytest.raises(InputError) as caught:
            pool.submit(request(tmp_path / "large.png", kind="image")).result(30)
        assert caught.value.kind == "memory"
    with DecodePool(1) as pool:
        assert (
            len(pool.submit(request(tmp_path / "large.png", kind="image")).result(30).frames) == 1
        )


def test_known_file_is_hashed_and_not_read(folder):
    seen = []
    with DecodePool(1) as pool:
        found = pool.submit(request(folder), lambda state: seen.append(state) or "known").result(20)
        assert found == "known"
        assert seen == [pool.submit_hash(folder).result(20)]


def test_file_that_is_not_known_is_read(folder):
    with DecodePool(1) as pool:
        clip = pool.submit(request(folder), lambda state: None).result(20)
        assert len(clip.frames) == 3


def test_file_that_changes_between_hash_and_end_is_not_steady(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 60)).save(path)

    def touch(state):
        os.utime(path, ns=(0, state.mtime_ns + 1))

    with DecodePool(1) as pool:
        assert pool.submit(request(path), lambda state: None).result(20).is_steady
        assert not pool.submit(request(path), touch).result(20).is_steady
        with pytest.raises(InputError) as raised:
            pool.submit(request(path), lambda state: path.unlink()).result(20)
    assert raised.value.kind == "missing"


def test_failure_to_recall_fails_that_file_alone(folder):
    def fail(state):
        raise ValueError("no")

    with DecodePool(1) as pool:
        bad, good = pool.submit(request(folder), fail), pool.submit(request(folder))
        with pytest.raises(ValueError, match="no"):
            bad.result(20)
        assert len(good.result(20).frames) == 3


def test_worker_starts_only_when_needed_and_takes_no_lock_along(folder, tmp_path):
    with (tmp_path / "lock").open("w") as lock, DecodePool(2) as pool:
        assert pool.worker_pids() == []
        os.set_inheritable(lock.fileno(), True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        pool.submit_probe(folder, "video").result(20)
        (pid,) = pool.worker_pids()
        opened = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        assert str(tmp_path / "lock") not in opened
        assert opened.count("/dev/null") == 3


def test_worker_ignores_ctrl_c(folder):
    with DecodePool(1) as pool:
        pool.submit_probe(folder, "video").result(20)
        before = pool.worker_pids()
        os.kill(before[0], signal.SIGINT)
        assert pool.submit_probe(folder, "video").result(20).num_total == 3
        assert pool.worker_pids() == before


def test_worker_is_replaced_after_many_requests(folder, monkeypatch):
    monkeypatch.setattr("vla2cli.media.pool._MAX_REQUESTS", 2)
    with DecodePool(1) as pool:
        pids = set()
        for _ in range(4):
            pool.submit_probe(folder, "video").result(20)
            pids.update(pool.worker_pids())
    assert len(pids) == 2


def test_close_cancels_what_waits_and_ends_a_stuck_worker(folder):
    pool = DecodePool(1)
    pid = stopped_worker(pool, folder)
    futures = [pool.submit(request(folder)) for _ in range(3)]
    wait_until(futures[0].running)
    start = time.monotonic()
    pool.close(cancel=True)
    assert time.monotonic() - start < 3
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)
    assert not Path(f"/proc/{pid}").exists()  # reaped, not a zombie
    assert not any(thread.is_alive() for thread in pool._threads)
    assert pool.worker_pids() == []
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(request(folder))


def test_close_without_cancel_finishes_what_was_submitted(folder):
    pool = DecodePool(2)
    futures = [pool.submit(request(folder)) for _ in range(5)]
    pool.close(cancel=False)
    assert all(len(future.result(0).frames) == 3 for future in futures)


PARENT = """
import os, signal, sys, time
from vla2cli.media.pool import DecodePool
pool = DecodePool(1)
pool.submit_probe(sys.argv[1], "video").result()
(pid,) = pool.worker_pids()
if sys.argv[2] == "stopped":
    os.kill(pid, signal.SIGSTOP)
print(pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "stopped"])
def test_worker_dies_with_its_parent(folder, state):
    command = [sys.executable, "-c", PARENT, folder, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    wait_until(lambda: not is_alive(pid))


def test_interpreter_ends_with_an_open_pool(folder):
    code = PARENT.replace("time.sleep(60)", "")
    done = subprocess.run(
        [sys.executable, "-c", code, folder, "idle"], capture_output=True, timeout=20
    )
    assert done.returncode == 0
    wait_until(lambda: not is_alive(int(done.stdout)))


def test_worker_loads_nothing_heavy():
    code = "import sys, json, vla2cli.media.worker; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    heavy = {"torch", "torchaudio", "transformers", "typer", "rich", "onnxruntime", "decord"}
    assert not heavy & set(json.loads(done.stdout))
