"""`vla2 plan` as it is typed: what it says, what it leaves alone, the command it ends with."""

import inspect
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tiny import tiny_hub
from vla2_models.miniature import MODEL_ID
from vla2cli.cli import ask, caption, main, plan

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path_factory):
    for name in ("VLA2_DEBUG", "VLA2_JSON", "VLA2_QUIET", "VLA2_PROMPT", "VLA2_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLA2_MODEL", MODEL_ID)
    monkeypatch.setenv("VLA2_HUB_DIR", str(tiny_hub()))
    monkeypatch.setenv("VLA2_MAX_NEW_TOKENS", "6")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """Run the command line; give exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def folder(tmp_path):
    """Three clips, two of them the same, a picture, and a file that is no video."""
    folder = tmp_path / "my clips"
    folder.mkdir()
    for name, source in (("a.mp4", "01"), ("b.mp4", "02"), ("c.mp4", "01")):
        shutil.copy(EXAMPLES / f"{source}.mp4", folder / name)
    shutil.copy(EXAMPLES / "09.png", folder / "p.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def contents(folder):
    return {
        path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def test_plan_says_what_is_there_and_what_it_will_take(said, folder, tmp_path):
    before = contents(tmp_path)
    code, out, err = said("plan", folder, "-o", "out.jsonl")
    assert code == 0
    (line,) = out.splitlines()
    found = json.loads(line)
    files = found["files"]
    assert (files["videos"], files["images"], files["probed"]) == (4, 1, 5)
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert files["size_bytes"] == size_bytes
    assert [bad["id"] for bad in found["unreadable"]] == ["broken.mp4"]
    assert found["unreadable"][0]["path"] == str(folder / "broken.mp4")
    assert found["unreadable"][0]["kind"] == "decode"
    assert found["duplicates"] == [["a.mp4", "c.mp4"]]
    assert found["records"] == {"todo": 5, "done": 0, "failed": 0}
    assert found["tried"]["records"] == 4
    predicted = found["predicted"]
    assert 0 < predicted["low_s"] < predicted["seconds"] < predicted["high_s"]
    assert predicted["memory_bytes"] > 10**8
    assert "trying the model on some of 4 files" in err
    assert contents(tmp_path) == before  # no ledger, no lock, nothing


def test_size_of_the_ledger_is_that_of_the_run(said, folder, tmp_path):
    _, out, _ = said("plan", folder, "-o", "out.jsonl")
    found = json.loads(out)
    assert said(*shlex.split(found["command"])[1:])[0] == 3  # the broken file
    size_bytes = (tmp_path / "out.jsonl").stat().st_size
    assert found["predicted"]["ledger_bytes"] == pytest.approx(size_bytes, rel=0.05)


def test_json_has_the_same_names_whatever_is_found(said, folder, tmp_path):
    names = {
        *("task", "files", "unreadable", "unlisted_folders", "unreadable_files", "duplicates"),
        *("not_compared", "records", "tried", "predicted", "command"),
    }
    for arguments in ([], ["--calibrate", "0"], ["--question", "What moves?"]):
        code, out, _ = said("plan", folder, *arguments, "--json")
        assert code == 0
        assert json.loads(out).keys() == names
    _, out, _ = said("plan", folder, "--calibrate", "0")
    assert (json.loads(out)["tried"], json.loads(out)["predicted"]) == (None, None)


def test_what_a_ledger_holds_is_done_and_its_lock_is_not_asked_for(said, folder, tmp_path):
    assert said("caption", folder / "a.mp4", folder / "b.mp4", "-o", "out.jsonl")[0] == 0
    (tmp_path / "out.jsonl.lock").write_text("")
    before = contents(tmp_path)
    code, out, _ = said("plan", folder, "-o", "out.jsonl", "--calibrate", "0")
    assert code == 0
    assert json.loads(out)["records"] == {"todo": 3, "done": 2, "failed": 0}
    _, out, _ = said("plan", folder, "-o", "out.jsonl", "--calibrate", "0", "--force")
    assert json.loads(out)["records"] == {"todo": 5, "done": 0, "failed": 0}
    assert contents(tmp_path) == before


def test_nothing_found_and_nothing_readable_are_exit_4(said, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, err = said("plan", "empty")
    assert (code, out) == (4, "")
    assert "'empty' holds no video, image or audio file" in err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.mp4").write_bytes(b"no video")
    code, out, _ = said("plan", "bad")
    assert code == 4
    found = json.loads(out)
    assert [bad["id"] for bad in found["unreadable"]] == ["a.mp4"]
    assert found["predicted"] is None


def test_a_model_that_fails_on_all_it_is_tried_on_is_exit_4(said, folder):
    code, out, _ = said("plan", folder / "a.mp4", "--start", "900")
    assert code == 4
    found = json.loads(out)
    assert (found["tried"]["errors"], found["predicted"]) == (1, None)


def test_command_has_the_flags_that_were_typed_quoted(said, folder, monkeypatch):
    flags = ["--question", "What's new?", "--question", "Why?", "--no-overlap", "--batch", "2"]
    own = ["--calibrate", "0", "--json", "-q"]
    _, out, _ = said("plan", folder, *flags, "-m", MODEL_ID, *own)
    words = shlex.split(json.loads(out)["command"])
    assert words[:3] == ["vla2", "ask", str(folder)]
    given = words[3:]
    assert sorted(given) == sorted([*flags, "--model", MODEL_ID])
    assert [given[i + 1] for i, word in enumerate(given) if word == "--question"] == [
        "What's new?",
        "Why?",
    ]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_shell_reads_the_names_of_the_command_as_they_are(said, folder):
    names = [b"new\nline1.mp4", b"bad\xff\xfename.mp4", b"it's\ta tab.mp4", "é und ' .mp4".encode()]
    paths = [bytes(folder) + b"/" + name for name in names]
    for path in paths:
        Path(os.fsdecode(path)).symlink_to(folder / "a.mp4")
    _, out, _ = said("plan", *map(os.fsdecode, paths), "--calibrate", "0", "--json")
    command = json.loads(out)["command"]
    assert command.isprintable()
    script = command.replace("vla2 caption", "printf '%s\\0'", 1)
    found = subprocess.run(["bash", "-c", script], check=True, capture_output=True).stdout
    assert found.split(b"\0")[: len(paths)] == paths


def test_manifest_is_planned_as_asked(said, folder, tmp_path):
    lines = [
        {"path": f"{folder.name}/{name}", "question": q}
        for name in ("a.mp4", "p.png")
        for q in "AB"
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, out, _ = said("plan", "--manifest", "asked.jsonl", "--calibrate", "0")
    found = json.loads(out)
    assert (found["task"], found["records"]["todo"]) == ("ask", 4)
    assert found["command"] == "vla2 ask --manifest asked.jsonl"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "expected PATH..., or --manifest FILE"),
        (["x.mp4", "--question", "A", "--prompt", "B"], "--prompt is of caption"),
        (["x.mp4", "--then", "A"], "they need --question"),
        (["x.mp4", "--choices", "A|B"], "they need --question"),
        (["x.mp4", "--calibrate", "-1"], "-1"),
        (["x.mp4"], "'x.mp4' does not exist"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line_and_exit_2(said, arguments, line):
    code, out, err = said("plan", *arguments)
    assert (code, out) == (2, "")
    assert line in err
    assert err.startswith("vla2: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [caption, ask], ids=lambda command: command.__name__)
def test_plan_takes_every_flag_of_what_it_plans(command):
    has, wants = (inspect.signature(of).parameters for of in (plan, command))
    assert set(wants) - {"dry_run"} <= set(has)
