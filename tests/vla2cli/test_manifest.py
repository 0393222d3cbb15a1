"""A manifest: a file, a question and perhaps options on each line."""

import io
import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import tiny_engine, tiny_hub
from vla2_models.miniature import MODEL_ID
from vla2cli import ask, ask_manifest
from vla2cli.cli import main
from vla2cli.config import GenerationChoice
from vla2cli.engine import Engine
from vla2cli.errors import NoInputError, UsageError
from vla2cli.inputs import Item
from vla2cli.manifest import read_manifest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = GenerationChoice(max_new_tokens=4)
GOOD = {"path": "a.mp4", "question": "What moves?"}
SIDES = ["to the left", "to the right"]


@pytest.fixture
def write(tmp_path):
    """Write a manifest into a folder with two clips and a picture; return its path."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, example in {"a.mp4": "01.mp4", "b.mp4": "02.mp4", "c.png": "09.png"}.items():
        shutil.copy(EXAMPLES / example, folder / name)

    def write(*entries, name="manifest.jsonl"):
        lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries]
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(folder / name)

    return write


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """Run `vla2 ask` with the tiny model; give exit code, records and stderr."""
    for name, value in {"MODEL": MODEL_ID, "HUB_DIR": tiny_hub(), "MAX_NEW_TOKENS": 4}.items():
        monkeypatch.setenv(f"VLA2_{name}", str(value))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["ask", *arguments])
        out, err = capsys.readouterr()
        return ended.value.code, [json.loads(line) for line in out.splitlines()], err

    return run


# what it means


def test_paths_start_from_its_folder_and_are_the_ids(write):
    manifest = read_manifest(write(GOOD, {"path": "sub/ünï.mp4", "question": "Why?"}))
    folder = Path(manifest.name).parent
    assert manifest.items == (
        Item("a.mp4", f"{folder}/a.mp4", "video", asked={"What moves?": ()}),
        Item("sub/ünï.mp4", f"{folder}/sub/ünï.mp4", "video", asked={"Why?": ()}),
    )


def test_an_absolute_path_stays_and_standard_input_starts_from_here():
    lines = io.BytesIO(b'{"path": "/srv/a.wav", "question": "?"}\n\n{"path": "b", "question": "?"}')
    manifest = read_manifest("-", stdin=lines)
    asked = {"?": ()}
    assert manifest.items == (
        Item("/srv/a.wav", "/srv/a.wav", "audio", asked=asked),
        Item("b", "b", "unknown", asked=asked),
    )


def test_lines_about_one_file_are_questions_about_one_item_in_their_order(write):
    about_b = {"path": "b.mp4", "question": "Why?"}
    manifest = read_manifest(
        write(GOOD, about_b, {**GOOD, "question": "Which way?", "choices": SIDES}, GOOD)
    )
    assert [item.id for item in manifest.items] == ["a.mp4", "b.mp4"]
    assert {item.id: item.asked for item in manifest.items} == {
        "a.mp4": {"What moves?": (), "Which way?": tuple(SIDES)},
        "b.mp4": {"Why?": ()},
    }


def test_lines_without_choices_take_those_of_the_command(write):
    manifest = read_manifest(
        write(GOOD, {**GOOD, "question": "Is it?", "choices": ["yes", "no"]}), choices=("a", "b")
    )
    assert manifest.items[0].asked == {"What moves?": ("a", "b"), "Is it?": ("yes", "no")}


def test_an_id_of_its_own_makes_an_item_of_its_own(write):
    entries = [{**GOOD, "id": f"case {i}"} for i in (1, 2)]
    manifest = read_manifest(write(*entries))
    assert [(item.id, Path(item.path).name) for item in manifest.items] == [
        ("case 1", "a.mp4"),
        ("case 2", "a.mp4"),
    ]


def test_files_of_another_modality_are_counted_and_left_out(write):
    manifest = read_manifest(write(GOOD, {"path": "c.png", "question": "What?"}))
    found = manifest.found("image")
    assert [item.id for item in found.items] == ["c.png"]
    assert (found.notes[0].videos, found.notes[0].images, found.notes[0].skipped) == (1, 1, 1)
    with pytest.raises(NoInputError, match="names no file of --modality av"):
        read_manifest(write({"path": "c.png", "question": "What?"})).found("av")


# bad lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("What moves?", "'What moves?' is no JSON"),
        ('{"path": "a.mp4", "quest', "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "[1] is no object with a path and a question"),
        ({"question": "Why?"}, 'has no \'path\': {"question": "Why?"}'),
        ({"path": "a.mp4"}, "has no 'question'"),
        ({**GOOD, "path": 7}, "path is 7, expected text"),
        ({**GOOD, "path": ""}, 'path is "", expected text'),
        ({**GOOD, "path": "a\0.mp4"}, "expected text"),
        ({**GOOD, "question": " "}, 'question is " ", expected text'),
        ('{"path": "a.mp4", "question": "\\ud800"}', 'question is "\\ud800", expected text'),
        ({**GOOD, "id": 1}, "id is 1, expected text"),
        ({**GOOD, "choices": "yes|no"}, 'choices is "yes|no", expected a list of two texts'),
        ({**GOOD, "choices": ["yes"]}, 'choices is ["yes"], expected a list of two texts'),
        ({**GOOD, "choices": ["yes", "yes"]}, "expected a list of two texts or more, each once"),
        ({**GOOD, "choices": ["yes", 1]}, "expected a list of two texts or more, each once"),
        ({**GOOD, "choices": []}, "expected a list of two texts or more, each once"),
        (
            {"path": "b.mp4", "question": "Why?", "id": "a.mp4"},
            "id 'a.mp4' is of 'b.mp4' here and of another path in line 1",
        ),
        ({**GOOD, "choices": ["yes", "no"]}, "with other choices in line 1; give one of them an"),
    ],
    ids=range(19),
)
def test_a_bad_line_is_refused_by_its_number_and_value(write, line, message):
    with pytest.raises(UsageError) as caught:
        read_manifest(write(GOOD, "", line))
    text = str(caught.value)
    assert "manifest.jsonl: line 3: " in text
    assert message in text
    assert "\n" not in text
    assert len(text) < 400


def test_an_empty_manifest_is_no_input_and_an_absent_one_wrong_usage(write, tmp_path):
    with pytest.raises(NoInputError, match="holds no line with a path and a question"):
        read_manifest(write("", " "))
    with pytest.raises(UsageError, match=r"gone\.jsonl' cannot be read: no such file"):
        read_manifest(str(tmp_path / "gone.jsonl"))


def test_bytes_that_are_no_utf_8_are_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"path": "caf\xe9.mp4", "question": "?"}\n')
    with pytest.raises(UsageError, match=r"line 1: .* is no JSON"):
        read_manifest(str(tmp_path / "latin.jsonl"))


# runs


def test_each_line_is_answered_as_ask_answers_it_by_itself(write):
    entries = [
        {"path": "a.mp4", "question": "What moves?", "answer": "a car", "kind": "object"},
        {"path": "c.png", "question": "Why?"},
        {"path": "a.mp4", "question": "Which way?"},
        {"path": "b.mp4", "question": "What moves?"},
    ]
    path = write(*entries)
    records = list(ask_manifest(path, tiny_engine(), generation=SHORT, batch=3))
    found = {(record["id"], record["question"]): record["text"] for record in records}
    assert found.keys() == {(entry["path"], entry["question"]) for entry in entries}
    for (name, question), text in found.items():
        (alone,) = ask(Path(path).parent / name, question, tiny_engine(), generation=SHORT)
        assert alone["text"] == text


def test_a_file_is_decoded_and_encoded_once_for_all_its_questions(write, monkeypatch):
    encoded = []
    encode = Engine.encode
    monkeypatch.setattr(
        Engine, "encode", lambda engine, clips: encoded.extend(clips) or encode(engine, clips)
    )
    about_b = {"path": "b.mp4", "question": "Why?"}
    entries = [GOOD, about_b, *({**GOOD, "question": f"What is {i}?"} for i in range(4))]
    records = list(ask_manifest(write(*entries), tiny_engine(), generation=SHORT))
    assert (len(records), len(encoded)) == (6, 2)


def test_a_second_run_asks_only_what_is_new(write, tmp_path):
    ledger = tmp_path / "answers.jsonl"

    def run(*entries):
        path = write(*entries)
        found = ask_manifest(path, tiny_engine(), generation=SHORT, output=ledger)
        return [(record["id"], record["question"]) for record in found]

    chosen = {**GOOD, "question": "Which way?", "choices": SIDES}
    assert run(GOOD, chosen) == [("a.mp4", "What moves?"), ("a.mp4", "Which way?")]
    assert run(GOOD, chosen) == []
    assert run(GOOD, {**chosen, "choices": SIDES[::-1]}) == [("a.mp4", "Which way?")]
    assert run({**GOOD, "id": "other"}, GOOD) == [("other", "What moves?")]


def test_choices_of_lines_are_chosen_from(write):
    entries = [{**GOOD, "choices": SIDES}, {**GOOD, "question": "Why?"}]
    chosen, spoken = ask_manifest(write(*entries), tiny_engine(), generation=SHORT, batch=2)
    assert chosen["text"] in SIDES
    assert set(chosen["choice"]["all"]) == set(SIDES)
    assert spoken["choice"] is None
    assert "choices" not in spoken["generation"]


def test_command_runs_previews_and_goes_on(write, said):
    path = write(
        GOOD, {**GOOD, "question": "Why?"}, {"path": "gone.mp4", "question": "Why?", "id": "x"}
    )
    code, lines, err = said("--manifest", path, "--dry-run")
    assert (code, [line["action"] for line in lines]) == (0, ["ask", "unreadable"])
    assert "2 to do, 0 done, 1 unreadable; nothing was run" in err
    code, records, err = said("--manifest", path, "--choices", "a ball|a car")
    assert code == 3
    assert {(r["id"], r["question"], "error" in r) for r in records} == {
        ("a.mp4", "What moves?", False),
        ("a.mp4", "Why?", False),
        ("x", "Why?", True),
    }
    assert all(r["text"] in ("a ball", "a car") for r in records if "error" not in r)
    assert "manifest.jsonl: 2 videos" in err
    assert said("--manifest", path, "-o", "answers.jsonl")[:2] == (3, [])
    code, _, err = said("--manifest", path, "-o", "answers.jsonl")
    assert code == 3
    assert "nothing to do: 2 done, 1 error" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--manifest", "m.jsonl", "a.mp4", "Why?"), "--manifest has its own paths and questions"),
        (("--manifest", "m.jsonl", "--question", "Why?"), "--manifest has its own paths and"),
        (("--manifest", "m.jsonl", "--then", "Why?"), "--manifest has its own paths and questions"),
        ((), "expected PATH... QUESTION, or --manifest FILE"),
        (("a.mp4", "Which?", "--choices", "left"), "'--choices left': expected two options or"),
        (("a.mp4", "Which?", "--choices", "a|b", "--then", "Why?"), "--choices are of one answer"),
    ],
    ids=range(6),
)
def test_what_does_not_go_together_is_refused_before_anything_is_run(said, arguments, message):
    code, records, err = said(*arguments)
    assert (code, records) == (2, [])
    assert message in err
    assert err.count("\n") == 1


def test_a_question_that_holds_the_placeholder_is_refused(write, said):
    code, records, err = said("--manifest", write(GOOD, {**GOOD, "question": "Is <video> it?"}))
    assert (code, records) == (2, [])
    assert "the question 'Is <video> it?' holds '<video>'" in err
