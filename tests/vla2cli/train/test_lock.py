"""A run's folder is one process's at a time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vla2cli.errors import RunBusyError, UsageError
from vla2cli.train.lock import hold_folder

REPOSITORY = Path(__file__).parents[3]
HOLD = """
import sys, time
from pathlib import Path
from vla2cli.train.lock import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(int(sys.argv[2]))
"""
PATH = os.pathsep.join(str(REPOSITORY / name) for name in (".", "models"))
VARIABLES = {**os.environ, "PYTHONPATH": PATH}


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), "60"],
        env=VARIABLES,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_holds_is_refused_until_that_is_gone(holder, tmp_path):
    held = pytest.raises(RunBusyError, match="is held by another run")
    with held as refused, hold_folder(tmp_path / "run"):
        pass
    assert refused.value.exit_code == 5
    holder.kill()  # no chance to give it back
    holder.wait()
    with hold_folder(tmp_path / "run"):
        pass


def test_a_child_that_outlives_its_parent_does_not_keep_the_folder(tmp_path):
    with hold_folder(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        command = [sys.executable, "-c", HOLD, str(tmp_path), "0"]
        subprocess.run(command, env=VARIABLES, check=True)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_processes_that_train_together_take_it_once(holder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with hold_folder(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(UsageError, match="cannot be written: not a directory")
    with refused, hold_folder(tmp_path / "file/run"):
        pass
