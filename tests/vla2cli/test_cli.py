"""What the command line refuses before it loads anything, and how it says so."""

import subprocess
import sys

import pytest

from vla2_models import hub
from vla2cli.cli import main
from vla2cli.console import format_duration, format_rate, printable


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in ("VLA2_MODEL", "VLA2_DEBUG", "VLA2_HUB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "BUILTIN_FOLDER", tmp_path / "no-builtin")


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """Run the command line in a folder with one clip; give exit code, stdout and stderr."""
    (tmp_path / "a.mp4").write_bytes(b"no video")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ask", "a.mp4", "x" * 5000], "no model: give --model FOLDER"),
        (["ask", "a.mp4", ""], "the question is empty"),
        (["ask", "a.mp4", "Why?", "--then", " "], "the question is empty"),
        (["caption", "a.mp4", "--prompt", ""], "--prompt is empty"),
        (["ask", "a.mp4", "--question", "A", "--question", "B", "--then", "C"], "--then goes on"),
        (["-v", "caption", "a.mp4"], "-v goes behind the command: vla2 caption -v"),
        (["caption", "a.mp4", "--frames", "33"], "'--frames 33': the model takes at most 32"),
        (["caption", "a.mp4", "--end", "0"], "'--end 0': the range ends before it begins"),
        (["caption", "a.mp4", "--start", "1:xx"], "'1:xx' is no time"),
        (["caption", "a.mp4", "--force"], "need -o FILE"),
        (["features", "a.mp4"], "they need a folder: -o FOLDER"),
        (["caption", "a.mp4", "-o", ""], "'-o' is empty"),
        (["caption", "a.mp4", "--hub-dir", "nope"], "'nope' does not exist"),
        (["caption", "a.mp4", "--stats", "a.mp4"], "'--stats a.mp4' exists and holds no stat"),
        (["caption", "a.mp4", "--stats", "no/s.json"], "'--stats no/s.json': there is no folder"),
        (["ask", "a.mp4", "A?", "-o", "l", "--stats", "l.lock"], "belongs to the output 'l'"),
        (["ask", "--manifest", "."], "'.' is a folder; --manifest takes a file"),
        (["caption", "--manifest", "./"], "'./' is a folder; --manifest takes a file"),
        (["ask", "a.mp4", "--questions", "."], "'.' is a folder; --questions takes a file"),
        (["caption", "a.mp4", "--cache-size", "0"], "'--cache-size 0': expected a size like 20GB"),
        (["caption", "a.mp4", "--cache-size", "1KB"], "or 500MB, and at least 1MB"),
        (["caption", "b.mp4"], "'b.mp4' does not exist; did you mean 'a.mp4'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_usage_is_one_line_and_exit_2(said, arguments, line):
    code, out, err = said(*arguments)
    assert (code, out) == (2, "")
    assert line in err
    assert err.startswith("vla2: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("no/such.jsonl", "'no/such.jsonl': there is no folder '"),
        (".", "'.' is a folder; -o takes a file"),
        ("/dev/null", "'/dev/null' is not a regular file; -o - writes to stdout"),
    ],
    ids=["missing folder", "folder", "device"],
)
def test_wrong_output_is_wrong_usage_before_a_model_is_looked_for(said, output, line):
    code, out, err = said("caption", "a.mp4", "-o", output, "-m", "x")
    assert (code, out) == (2, "")
    assert err.startswith(f"vla2: {line}")
    assert err.count("\n") == 1


def test_yaml_takes_one_question_without_a_list(said, tmp_path):
    (tmp_path / "run.yaml").write_text("question: What?\nmodel: nowhere/at-all\noffline: true\n")
    code, _, err = said("ask", "a.mp4", "--config", "run.yaml")
    assert code == 1
    assert "'nowhere/at-all' is not in the hub cache" in err


@pytest.mark.parametrize("line", ["frames: true", "model: {a: b}", "batch: {}"])
def test_yaml_value_of_a_wrong_kind_is_refused(said, tmp_path, line):
    (tmp_path / "run.yaml").write_text(line + "\n")
    code, _, err = said("caption", "a.mp4", "--config", "run.yaml")
    assert code == 2
    assert f"sets '{line.split(':')[0]}' to " in err


def test_traceback_is_shown_only_where_it_is_asked_for(said, monkeypatch):
    monkeypatch.setenv("VLA2_DEBUG", "0")
    assert said("caption", "b.mp4")[0] == 2
    monkeypatch.setenv("VLA2_DEBUG", "1")
    with pytest.raises(Exception, match="does not exist"):
        main(["caption", "b.mp4"])


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_crash(closed):
    command = f"'{sys.executable}' -m vla2cli caption no/such/file.mp4 {closed}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == (0 if "2>" in closed else 1)


def test_name_that_would_command_the_terminal_is_spelled_out():
    assert printable("e\x1b[31mvil\nname é ☕") == "e\\x1b[31mvil\\nname é ☕"


@pytest.mark.parametrize(
    ("value", "text"),
    [(6.14, "6.1/s"), (0.5, "30.0/min"), (0.001, "3.6/h")],
)
def test_rate_is_in_the_unit_that_reads_best(value, text):
    assert format_rate(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.84, "0.8 s"), (151, "2:31"), (3751, "1:02:31"), (59.99, "60.0 s")]
)
def test_duration_is_written_as_people_read_it(seconds, text):
    assert format_duration(seconds) == text
