"""The output: one writer, a disk that is full, a reader that leaves."""

import os
import shutil
import signal
import subprocess
from functools import partial

import pytest

from tests.e2e.conftest import together

BASH = shutil.which("bash")


def test_second_run_on_one_output_names_the_first_and_leaves(
    vla2, make_clips, tmp_path, read_ledger, wait_until
):
    folder, ledger = make_clips(24), tmp_path / "captions.jsonl"
    first = vla2.start("caption", folder, "-o", ledger, "--overlap", "--batch", "4")
    wait_until(lambda: read_ledger(ledger))
    first.send(signal.SIGSTOP)
    second = vla2("caption", folder, "-o", ledger, "-q")
    first.send(signal.SIGCONT)
    assert second.code == 5
    assert second.stdout == ""
    holder = f"process {first.pid} on host {os.uname().nodename} since "
    assert second.stderr.startswith(f"vla2: '{ledger}' is being written by {holder}")
    assert second.stderr.count("\n") == 1
    assert first.wait().code == 0
    assert len(read_ledger(ledger)) == len(ledger.read_bytes().splitlines()) == 24
    assert not (tmp_path / "captions.jsonl.lock").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 48 kB, and how to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root may mount a small disk")
    mounted = _mount("-t", "tmpfs", "-o", "size=48k", "vla2-test", folder)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder, lambda: _mount("-o", "remount,size=4m", folder).check_returncode()
    subprocess.run(["umount", folder], check=True)


def _mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


def test_full_disk_leaves_a_whole_ledger_that_is_taken_up(
    vla2, make_clips, small_disk, read_ledger
):
    folder, (disk, enlarge) = make_clips(40), small_disk
    ledger = disk / "captions.jsonl"
    full = vla2("caption", folder, "-o", ledger)
    assert full.code == 1
    assert full.stderr.splitlines()[-1] == (
        f"vla2: cannot write '{ledger}': no space left on device; it is whole, free some space "
        "and run the same command again"
    )
    num_done = len(read_ledger(ledger))
    assert 5 < num_done < 40
    enlarge()
    done = vla2("caption", folder, "-o", ledger)
    assert done.code == 0
    assert f"{num_done} of 40 done before; {40 - num_done} to do" in done.stderr
    assert len(read_ledger(ledger)) == len(ledger.read_bytes().splitlines()) == 40
    assert not (disk / "captions.jsonl.torn").exists()


def test_reader_that_leaves_early_sees_no_traceback(vla2):
    script = f"set -o pipefail; {vla2.program} caption examples/ -q | head -n 1"
    done = vla2("-c", script, program=BASH)
    assert len(done.records) == 1
    assert done.records[0]["text"]
    assert done.code == 1
    assert done.stderr == ""


def test_output_that_cannot_be_written_is_refused_and_left_alone(vla2, make_clips, tmp_path):
    clips = make_clips(1)
    (tmp_path / "notes.txt").write_text("buy milk\n")
    refusals = {
        "gone/captions.jsonl": (2, "gone'; create it or choose another -o"),
        "notes.txt": (1, "is not a vla2 ledger: line 1 "),
    }
    calls = [partial(vla2, "caption", clips, "-o", tmp_path / name, "-q") for name in refusals]
    for done, (code, message) in zip(together(*calls), refusals.values(), strict=True):
        assert (done.code, done.stdout) == (code, "")
        assert done.stderr.startswith("vla2: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "buy milk\n"


def test_full_standard_output_is_one_line(vla2):
    done = vla2("-c", f"{vla2.program} --help > /dev/full", program=BASH)
    assert done.code == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
