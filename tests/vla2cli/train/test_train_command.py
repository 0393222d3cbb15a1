"""`vla2 train` as it is typed, with files of samples and clips that are read."""

import json
from pathlib import Path

import pytest

from tests.tiny import write_tiny
from tests.vla2cli.train.students import NUM_FRAMES
from vla2cli.cli import main
from vla2cli.train.log import read_lines

CLIP = Path(__file__).parents[3] / "examples/01.mp4"
FASTER = ["num_frames=2", "workers=0", "gradient_checkpointing=false", "precision=float32"]


@pytest.fixture
def typed(capsys, tmp_path, monkeypatch):
    """Run `vla2 train` on a file of samples; give exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLA2_DEBUG", raising=False)
    write_tiny(tmp_path / "hub", num_frames=NUM_FRAMES)
    samples = [
        {
            "id": name,
            "video": name,
            "conversations": [
                {"from": "human", "value": "<video>\nWhat moves?"},
                {"from": "gpt", "value": "a red car"},
            ],
        }
        for name in (CLIP.name, "absent.mp4")
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    (tmp_path / "run.yaml").write_text(
        "model: vla2/miniature-7B\nstage: video-pretrain\noutput: out\nbatch: 2\nmax_steps: 1\n"
        f"data: [{{file: data.json, folder: {json.dumps(str(CLIP.parent))}}}]\n"
    )

    def run(*settings, flags=()):
        given = [part for setting in (*FASTER, *settings) for part in ("--set", setting)]
        with pytest.raises(SystemExit) as ended:
            main(["train", "run.yaml", "--hub-dir", "hub", *given, *flags])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def test_a_run_is_saved_and_not_done_twice(typed, tmp_path):
    code, out, err = typed()
    assert (code, out) == (0, "")
    assert "step 1 of 1: loss " in err
    (line,) = read_lines(tmp_path / "out/log.jsonl")
    assert (line["step"], line["samples"], line["skipped"]) == (1, 1, 1)
    (skipped,) = read_lines(tmp_path / "out/skipped.jsonl")
    assert skipped["id"] == "absent.mp4"
    assert "no such file" in skipped["reason"]
    assert "1 sample skipped; 'out/skipped.jsonl' names them" in err
    assert (tmp_path / "out/mm_projector.bin").exists()
    code, _, err = typed()
    assert code == 0
    assert "out is done already" in err
    code, _, err = typed("learning_rate=1e-4")
    assert code == 2
    assert "was begun with learning_rate 0.001, not 0.0001; give a new folder" in err
    assert typed("log_steps=5")[0] == 0  # which changes no weight


def test_a_record_of_an_earlier_version_is_gone_on_with_and_an_odd_one_refused(typed, tmp_path):
    assert typed()[0] == 0
    path = tmp_path / "out/train.json"
    record = json.loads(path.read_text())
    del record["muon_learning_rate"]
    path.write_text(json.dumps(record))
    assert typed()[0] == 0
    for text in (json.dumps({**record, "speed": 2}), "{"):
        path.write_text(text)
        code, _, err = typed(flags=["-q"])
        assert code in (1, 2)
        assert err.count("\n") == 1
        assert "train.json" in err or "was begun with speed 2" in err


def test_a_dry_run_tells_what_would_be_trained_and_writes_nothing(typed, tmp_path):
    code, out, _ = typed("connector=linear", flags=["--dry-run"])
    assert code == 0
    plan = json.loads(out)
    assert plan["train"] == ["mm_projector"]
    assert plan["parameters"]["mm_projector"] == {"trained": 48 * 32 + 32, "all": 48 * 32 + 32}
    assert plan["parameters"]["language_model"]["trained"] == 0
    assert (plan["samples"], plan["steps"]) == ({"data.json": 2}, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "code", "line"),
    [
        (["batches=2"], 2, "'batches' is no setting; did you mean 'batch'?"),
        (["batch"], 2, "'--set batch': expected key=value"),
        (["data=[]"], 2, "no data is given"),
        (["data=[{file: no.json}]"], 2, "'no.json'"),
        (
            ["data=[{file: data.json, folder: gone}]"],
            2,
            "'gone', the folder of 'data.json', is none",
        ),
        (["model=acme/none", "seed=1"], 1, "acme/none"),
        (["stage=joint"], 2, "has no audio tower"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_cannot_be_trained_is_one_line(typed, settings, code, line):
    found, out, err = typed(*settings, flags=["-q", "--offline"])
    assert (found, out) == (code, "")
    assert line in err
    assert err.count("\n") == 1


def test_a_run_that_learned_nothing_saves_nothing(typed, tmp_path):
    (tmp_path / "empty").mkdir()
    nothing = ("data=[{file: data.json, folder: empty}]",)
    for _ in range(2):  # the same command goes on to the same end
        code, out, err = typed(*nothing)
        assert (code, out) == (4, "")
        assert "nothing was learned: all 2 samples were skipped" in err
        assert "skipped.jsonl" in err
        assert not (tmp_path / "out/config.json").exists()


def test_half_a_character_in_a_sample_is_named(typed, tmp_path):
    path = tmp_path / "data.json"
    good, bad = json.loads(path.read_text())
    odd = {**good, "id": "cat \ud83d", "conversations": [{"from": "gpt", "value": "\ud83d"}]}
    path.write_text(json.dumps([good, odd, {**bad, "id": "gone", "video": "\ud83d.mp4"}]))
    code, _, err = typed("max_steps=2")
    assert code == 0, err
    reasons = {line["id"]: line["reason"] for line in read_lines(tmp_path / "out/skipped.jsonl")}
    assert "'value' has '\\ud83d', which is no character" in reasons["cat \ud83d"]
    assert reasons["gone"]


def test_what_has_changed_below_a_key_is_named_alone(typed):
    assert typed("stage=video-finetune", "lora.r=2")[0] == 0
    code, _, err = typed("stage=video-finetune", "lora.r=4")
    assert code == 2
    assert "was begun with lora.r 2, not 4; give a new folder" in err


def test_a_folder_with_another_model_is_left_alone(typed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    code, _, err = typed()
    assert code == 2
    assert "output 'out' holds a model already; give a new folder" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
