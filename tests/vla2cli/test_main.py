"""Ctrl-C before there is a run: while modules are imported, and in a command that has no run."""

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# sends the signal in the middle of an import, which no waiting would hit
CODE = """
import os, runpy, signal, sys

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

moment = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupter())
runpy.run_module("vla2cli", run_name="__main__", alter_sys=True)
"""


def interrupted(moment, *arguments, before=None):
    """Run vla2 and press Ctrl-C when it begins to import a module."""
    return subprocess.run(
        [sys.executable, "-c", CODE, moment, *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=before,
    )


@pytest.mark.parametrize(
    "moment", ["vla2cli.cli", "typer", "vla2cli.world.command", "vla2cli.verify"]
)
def test_ctrl_c_while_modules_are_imported_is_one_line_and_exit_130(moment, tmp_path):
    done = interrupted(moment, "verify", str(tmp_path / "captions.jsonl"))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "vla2: ended by SIGINT\n"


@pytest.mark.parametrize("moment", ["typer", "vla2cli.verify"])
def test_run_in_the_background_that_ignores_ctrl_c_goes_on(moment, tmp_path):
    (tmp_path / "captions.jsonl").touch()
    done = interrupted(
        moment,
        "verify",
        str(tmp_path / "captions.jsonl"),
        before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 0
    assert done.stderr.endswith("0 findings\n")


def test_installed_command_is_the_module_itself():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"vla2": "vla2cli.__main__:main"}
