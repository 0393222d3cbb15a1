"""`vla2 export` as it is typed: what goes to stdout, what to stderr, and the exit code."""

import json
import shutil

import pytest

from tests.exports import tiny_export
from tests.tiny import tiny_av_engine, write_tiny
from vla2_models.miniature import MODEL_ID, WITH_EARS_ID
from vla2cli.cli import main
from vla2cli.frontend.manifest import Manifest


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("VLA2_MODEL", "VLA2_DEBUG", "VLA2_HUB_DIR", "VLA2_JSON", "VLA2_QUIET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache/vla2/frontends"


@pytest.fixture
def kept(root):
    """A cache with the tiny checkpoint's export; its folder there."""
    key = Manifest.read(tiny_export()).origin.key
    return shutil.copytree(tiny_export(), root / f"fp32-{key[:32]}")


@pytest.fixture
def said(capsys):
    """Run the command line; give exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["export", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def hub_of(engine):
    return engine.checkpoint.folder.parents[1]


def test_export_writes_a_folder_and_says_what_it_waits_for(said, tmp_path, root):
    hub, out = tmp_path / "hub", tmp_path / "new/out"
    write_tiny(hub, mm_projector_type="linear")
    code, stdout, stderr = said(MODEL_ID, "-o", out, "--precision", "int8", "--hub-dir", hub)
    assert code == 0
    (found,) = map(json.loads, stdout.splitlines())
    assert found["path"] == str(out)
    assert (found["model"], found["precision"]) == (MODEL_ID, "int8")
    assert found["usable"]
    assert found["graphs"].keys() == {"tower", "connector"}
    assert found["size_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    worst = f"{found['graphs']['tower']['max_abs']:.1e}"
    lines = stderr.splitlines()
    assert lines[0] == f"looking at '{MODEL_ID}' …"
    assert lines[1] == f"exporting the front-end of {MODEL_ID} to ONNX in int8, once …"
    assert lines[2] == "exporting tower.onnx …"
    assert lines[3].startswith(f"tower: at most {worst} from PyTorch in float32, relative ")
    assert len(lines) == 6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert not root.exists()


def test_export_that_is_there_is_not_made_again(said, kept):
    hub = hub_of(tiny_av_engine())
    code, stdout, stderr = said(WITH_EARS_ID, "--hub-dir", hub)
    assert code == 0
    assert json.loads(stdout)["path"] == str(kept)
    assert "exporting" not in stderr
    assert said(WITH_EARS_ID, "--hub-dir", hub, "--quiet")[2] == ""


def test_list_and_clean_print_what_there_is_and_what_went(said, kept):
    broken = shutil.copytree(kept, kept.with_name(f"int8-{'1' * 32}"))
    (broken / "sound.onnx").unlink()
    size = sum(path.stat().st_size for path in kept.iterdir())
    code, stdout, stderr = said("--list")
    one, other = map(json.loads, stdout.splitlines())
    assert (code, one["path"], one["size_bytes"], one["usable"]) == (0, str(kept), size, True)
    assert (other["usable"], other["why"]) == (False, f"'{broken / 'sound.onnx'}' is missing")
    assert stderr.startswith("2 exports, ")
    code, stdout, stderr = said("--clean")
    assert (code, json.loads(stdout)["path"]) == (0, str(broken))
    assert stderr.startswith("1 export removed, ")
    code, stdout, _ = said("--clean", "--force", "-q")
    assert (code, json.loads(stdout)["path"]) == (0, str(kept))
    assert said("--list") == (0, "", f"0 exports, 0.0 MB, in {kept.parent}\n")


def test_list_at_a_terminal_is_a_line_each(said, kept, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, stdout, _ = said("--list")
    id = tiny_av_engine().checkpoint.located.id
    assert stdout.startswith(f"{kept}  {id}  fp32  ")
    assert stdout.endswith(" MB  usable\n")
    assert json.loads(said("--list", "--json")[1])["precision"] == "fp32"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no MODEL: give a folder or a hub id, or --list"),
        (["--list", "--clean"], "each stands alone"),
        (["--list", "a/b"], "each stands alone"),
        (["--clean", "-o", "x"], "each stands alone"),
        (["a/b", "-o", "x", "--force"], "with -o, give a new folder"),
        (["a/b", "--precision", "fp8"], "'fp8' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_2(said, arguments, line):
    code, stdout, stderr = said(*arguments)
    assert (code, stdout) == (2, "")
    assert line in stderr
    assert stderr.startswith("vla2: ")
    assert stderr.count("\n") == 1


def test_folder_that_holds_something_is_refused_before_anything_is_exported(said, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, stdout, stderr = said(WITH_EARS_ID, "-o", tmp_path, "--hub-dir", hub_of(tiny_av_engine()))
    assert (code, stdout) == (1, "")
    assert f"vla2: '{tmp_path}' exists already" in stderr
    assert "exporting" not in stderr


def test_model_that_is_nowhere_is_one_line_and_exit_1(said):
    code, stdout, stderr = said("no/such", "--offline")
    assert (code, stdout) == (1, "")
    assert "vla2: 'no/such' is not in the hub cache" in stderr
