"""The model that is used when none is named."""

import json
from pathlib import Path

import pytest

from tests.tiny import write_with_tower
from vla2_models import hub
from vla2cli.cli import main

CLIP = str(Path(__file__).parents[2] / "examples/01.mp4")
LINES = [
    "vla2: no --model given: using the built-in demonstration model; it knows only its own drawn "
    "world.",
    "For real videos: vla2 caption … --model DAMO-NLP-SG/VideoLLaMA2.1-7B-16F",
]


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    return write_with_tower(tmp_path_factory.mktemp("shipped") / "builtin")


@pytest.fixture
def said(builtin, capsys, tmp_path, monkeypatch):
    """Run the command line with a built-in model; give records and the lines on stderr."""
    for name in ("VLA2_MODEL", "VLA2_DEBUG", "VLA2_HUB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "BUILTIN_FOLDER", builtin)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--offline"])
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        return [json.loads(line) for line in out.splitlines()], err.splitlines()

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("caption", CLIP, "--max-new-tokens", "2"),
        ("ask", CLIP, "What moves?", "--max-new-tokens", "2"),
    ],
    ids=["caption", "ask"],
)
def test_without_a_model_the_built_in_one_speaks_and_says_so_once(said, arguments):
    (record,), lines = said(*arguments)
    assert lines == LINES
    assert record["flags"][0] == "builtin-model"
    assert (record["model"]["id"], record["dtype"]) == ("builtin", "float32")


def test_features_come_from_it_too(said):
    records, lines = said("features", CLIP, "-o", "features")
    assert records == []
    assert lines[:2] == LINES
    assert Path("features/features.jsonl").exists()


def test_quiet_silences_the_lines(said):
    (record,), lines = said("caption", CLIP, "--max-new-tokens", "2", "-q")
    assert lines == []
    assert record["model"]["id"] == "builtin"


def test_a_model_from_a_settings_file_or_a_variable_goes_before_it(said, builtin, monkeypatch):
    Path("settings.yaml").write_text(f"model: {builtin}\nmax-new-tokens: 2\n")
    (record,), lines = said("caption", CLIP, "--config", "settings.yaml")
    assert record["model"]["id"] == str(builtin)
    assert not set(lines) & set(LINES[:1])
    monkeypatch.setenv("VLA2_MODEL", str(builtin))
    (record,), _ = said("caption", CLIP, "--max-new-tokens", "2")
    assert record["model"]["id"] == str(builtin)


def test_it_can_be_named(said):
    (record,), lines = said("caption", CLIP, "-m", "builtin", "--max-new-tokens", "2")
    assert record["model"]["id"] == "builtin"
    assert (
        "vla2: 'builtin' is a demonstration model: what it says of real videos means nothing."
        in (lines)
    )


def test_models_lists_it_and_checks_it(said):
    listed, _ = said("models")
    assert {"id": "builtin", "usable": True}.items() <= {f["id"]: f for f in listed}[
        "builtin"
    ].items()
    (checked,), _ = said("models", "builtin")
    assert checked["tower"] == "./clip-tower"
