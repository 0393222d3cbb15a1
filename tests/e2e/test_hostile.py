"""Bad files, bad luck and signals: one record each, nothing hangs, nothing is left behind."""

import os
import shutil
import signal
import struct
import time
from functools import partial

import pytest

from tests.e2e.conftest import EXAMPLES, together

SLOW = ("--max-new-tokens", "4000", "--batch", "8")  # a batch takes many seconds


def _without_moov(data):
    """Drop the box that says where the frames are."""
    kept, start = b"", 0
    while start < len(data):
        size, name = struct.unpack(">I4s", data[start : start + 8])
        if name != b"moov":
            kept += data[start : start + size]
        start += size
    assert kept != data
    return kept


@pytest.fixture
def hostile(tmp_path):
    """A folder of all that should not be there; and what it leads to: id -> kind of error."""
    folder = tmp_path / "videos"
    folder.mkdir()
    clip = (EXAMPLES / "01.mp4").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("This is not a video.\n" * 50)
    (folder / "truncated.mp4").write_bytes(clip[: len(clip) // 3])
    (folder / "headless.mp4").write_bytes(_without_moov(clip))
    (folder / "text.png").write_text("nor is this a picture")
    (folder / "gone.mp4").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    shutil.copy(EXAMPLES / "02.mp4", folder / "folder.mp4/inner.mp4")
    kinds = {
        "empty.mp4": "empty-file",
        "text.mp4": "decode",
        "headless.mp4": "decode",
        "text.png": "decode",
        "gone.mp4": "missing",
        "pipe.mp4": "not-a-file",
    }
    return folder, kinds


@pytest.fixture
def media(request):
    """Real clips where they are at hand, else the drawn ones."""
    try:
        return request.getfixturevalue("shared") / "media"
    except pytest.skip.Exception:
        return EXAMPLES


def test_every_file_costs_one_record_and_a_killed_worker_none(
    vla2, hostile, media, tmp_path, read_ledger, wait_until
):
    folder, kinds = hostile
    good = []
    for path in sorted(media.iterdir()):
        if path.suffix in (".mp4", ".jpg", ".png"):
            (folder / f"good-{path.name}").symlink_to(path)
            good.append(f"good-{path.name}")
    for path in sorted(EXAMPLES.glob("*.mp4")) * 4:  # so that each batch holds good and bad ones
        good.append(f"more-{len(good):02}.mp4")
        (folder / good[-1]).symlink_to(path)
    ledger = tmp_path / "captions.jsonl"
    options = ("--workers", "2", "--overlap", "--batch", "8")
    run = vla2.start("caption", folder, "-o", ledger, *options)
    for _ in range(2):
        # one that works by now: the file in its hands is tried again
        victim = wait_until(lambda: [pid for pid in vla2.workers() if _is_ready(pid)])[0]
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.3)
    done = run.wait()
    assert done.code == 3, done.stderr
    records = {record["id"]: record for record in read_ledger(ledger).values()}
    assert set(records) == {*kinds, *good, "truncated.mp4", "folder.mp4/inner.mp4"}
    assert len(ledger.read_bytes().splitlines()) == len(records)
    errors = {name: r["error"]["kind"] for name, r in records.items() if "error" in r}
    errors.pop("truncated.mp4", None)  # what can be read of it is used
    assert errors == kinds
    truncated = records["truncated.mp4"]
    assert "error" in truncated or "partial-video" in truncated["flags"]
    assert all("\n" not in r["error"]["message"] for r in records.values() if "error" in r)
    assert "Traceback" not in done.stderr
    for name in kinds:
        assert f"{folder}/{name}: " in done.stderr


def _is_ready(pid):
    """Tell whether a worker has set itself up: it ignores SIGINT from then on."""
    try:
        with open(f"/proc/{pid}/status") as file:  # noqa: PTH123
            ignored = next(line.split()[1] for line in file if line.startswith("SigIgn"))
    except (OSError, StopIteration):
        return False
    return bool(int(ignored, 16) >> (signal.SIGINT - 1) & 1)


def test_worker_that_hangs_costs_one_record(vla2, make_clips, tmp_path, read_ledger, wait_until):
    ledger = tmp_path / "captions.jsonl"
    run = vla2.start(
        "caption", make_clips(24), "-o", ledger, "--workers", "1", "--decode-timeout", "3"
    )
    wait_until(lambda: read_ledger(ledger))
    (worker,) = vla2.workers()
    os.kill(worker, signal.SIGSTOP)
    done = run.wait()
    assert done.code == 3, done.stderr
    records = read_ledger(ledger)
    assert len(records) == len(ledger.read_bytes().splitlines()) == 24
    (error,) = [record["error"] for record in records.values() if "error" in record]
    assert error["kind"] == "timeout"
    assert "took longer than 3" in error["message"]  # hashing has a little more


def test_run_in_which_every_file_fails_says_so_and_its_dry_run_too(vla2, tmp_path, read_ledger):
    folder, ledger = tmp_path / "videos", tmp_path / "captions.jsonl"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.mp4").write_text("no video")
    dry = partial(vla2, "caption", folder, "-o", ledger, "--dry-run")
    before, piped = together(dry, partial(vla2, "caption", folder / "a.mp4"))
    assert before.code == 4
    assert "0 to do, 0 done, 3 unreadable; nothing was run" in before.stderr
    assert not ledger.exists()
    done = vla2("caption", folder, "-o", ledger)
    assert done.code == 4
    assert "3 items: 0 captions, 3 errors" in done.stderr
    assert all(record["error"]["kind"] == "decode" for record in read_ledger(ledger).values())
    assert piped.code == 4
    assert piped.records[0]["error"]["kind"] == "decode"
    after = dry()
    assert after.code == 4
    assert [line["why"] for line in after.records] == ["error"] * 3


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_stopped_run_keeps_its_records_and_is_taken_up(
    vla2, make_clips, tmp_path, read_ledger, wait_until, signum, code
):
    ledger = tmp_path / "captions.jsonl"
    run = partial(vla2.start, "caption", make_clips(40), "-o", ledger)
    stopped = run()
    wait_until(lambda: len(read_ledger(ledger)) >= 3)
    stopped.send(signum)
    stopped.send_group(signum)  # as `timeout` does
    done = stopped.wait(10)
    assert done.code == code
    num_done = len(read_ledger(ledger))
    assert 3 <= num_done < 40
    assert "stopping after the record in hand …" in done.stderr
    assert f"{num_done} of 40 done, {ledger} is whole; run the same command to go on" in done.stderr
    assert "Traceback" not in done.stderr
    if signum == signal.SIGTERM:  # from here on it is the same
        return

    again = run().wait()
    assert again.code == 0
    assert f"{num_done} of 40 done before; {40 - num_done} to do" in again.stderr
    records = read_ledger(ledger)
    assert len(records) == len(ledger.read_bytes().splitlines()) == 40
    assert all("text" in record for record in records.values())


def test_second_ctrl_c_leaves_at_once(vla2, make_clips, tmp_path, read_ledger, wait_until):
    ledger = tmp_path / "captions.jsonl"
    run = vla2.start("caption", make_clips(16), "-o", ledger, "--verbose", *SLOW)
    wait_until(lambda: run.says("read in"))
    time.sleep(2)  # by now the first batch is in hand
    run.send(signal.SIGINT)
    wait_until(lambda: run.says("stopping after the record in hand"), 5)
    time.sleep(0.5)
    assert run.process.poll() is None  # it waits for the batch
    run.send(signal.SIGINT)
    done = run.wait(2)
    assert done.code == 130
    assert "Traceback" not in done.stderr
    assert read_ledger(ledger) == {}


@pytest.mark.parametrize("delay_s", [0.3, 0.45, 0.6, 1.0, 2.0])
def test_ctrl_c_while_loading_is_obeyed(vla2, make_clips, tmp_path, delay_s):
    run = vla2.start("caption", make_clips(8), "-o", tmp_path / "captions.jsonl")
    time.sleep(delay_s)
    run.send_group(signal.SIGINT)
    done = run.wait()
    assert done.code == 130, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("vla2: ended")
