"""Answers against a manifest: what counts as right, and what is named as missing."""

import json
from pathlib import Path

import pytest

from vla2cli.cli import main
from vla2cli.errors import LedgerError, UsageError
from vla2cli.world.score import format_table, score

MANIFEST = [
    {"path": "a.mp4", "question": "Where?", "answer": "by the blue sea", "kind": "scene"},
    {"path": "b.mp4", "question": "Where?", "answer": "in a gray room", "kind": "scene"},
    {"path": "c.mp4", "question": "Where?", "answer": "in a gray room", "kind": "scene"},
    {"path": "d.mp4", "question": "Where?", "answer": "in a gray room", "kind": "scene"},
    {"path": "a.mp4", "question": "What colour?", "answer": "red", "kind": "colour"},
    {
        "id": "a.mp4#choice",
        "path": "a.mp4",
        "question": "What colour?",
        "answer": "red",
        "kind": "choice",
        "choices": ["blue", "red"],
    },
]


def record(name, question, text, **more):
    return {"id": name, "path": "x", "task": "ask", "question": question, "text": text, **more}


ANSWERS = [
    record("a.mp4", "Where?", "by the blue sea\n"),
    record("b.mp4", "Where?", "in a gray room."),  # not exactly
    {**record("c.mp4", "Where?", ""), "error": {"kind": "decode", "message": "x"}},
    record("a.mp4", "What colour?", "red"),
    record("a.mp4#choice", "What colour?", "blue", choice={"text": "red", "probability": 0.9}),
]


def write(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def manifest(tmp_path):
    return write(tmp_path / "manifest.jsonl", MANIFEST)


def scored(tmp_path, manifest, answers):
    rows = score(write(tmp_path / "ledger.jsonl", answers), manifest)
    return {row.kind: (row.num, row.right, len(row.missing), len(row.errors)) for row in rows}


def test_each_kind_counts_right_missing_and_failed(tmp_path, manifest):
    assert scored(tmp_path, manifest, ANSWERS) == {
        "scene": (4, 1, 1, 1),
        "colour": (1, 1, 0, 0),
        "choice": (1, 1, 0, 0),
    }


def test_last_record_of_a_question_counts(tmp_path, manifest):
    again = [*ANSWERS, record("c.mp4", "Where?", "in a gray room"), record("a.mp4", "Where?", "?")]
    assert scored(tmp_path, manifest, again)["scene"] == (4, 1, 1, 0)


def test_answers_to_something_else_do_not_count(tmp_path, manifest):
    turn = {"question": "Why?", "text": "So."}
    others = [
        record("d.mp4", "Where?", "in a gray room", history=[turn]),
        record("d.mp4", "Where?", "in a gray room", segment={"start_s": 1.0, "end_s": None}),
        {**record("d.mp4", "Where?", "in a gray room"), "task": "features"},
        record("d.mp4", "Where is it?", "in a gray room"),
        record("e.mp4", "Where?", "in a gray room"),
    ]
    assert scored(tmp_path, manifest, ANSWERS + others)["scene"] == (4, 1, 1, 1)


def test_part_of_a_clip_is_answered_by_the_record_of_that_part(tmp_path):
    table = tmp_path / "manifest.csv"
    rows = ["path,question,answer,kind,start_s,end_s", "a.mp4,Where?,at sea,scene,,0:02"]
    table.write_text(
        "\n".join([*rows, "a.mp4,Where?,in a room,scene,2,", "a.mp4,Who?,a cat,x,1,2"])
    )
    answers = [
        record("a.mp4", "Where?", "in a room"),
        record("a.mp4", "Where?", "at sea", segment={"start_s": None, "end_s": 2.0}),
        record("a.mp4", "Where?", "at sea", segment={"start_s": 2.0, "end_s": None}),
        record("a.mp4", "Who?", "a cat", segment={"start_s": 1.0, "end_s": None}),
    ]
    assert scored(tmp_path, table, answers) == {"scene": (2, 1, 0, 0), "x": (1, 0, 1, 0)}


def test_whole_clips_and_captions_count(tmp_path, manifest):
    whole = {"start_s": None, "end_s": None}
    more = record("d.mp4", "Where?", "in a gray room", segment=whole)
    assert scored(tmp_path, manifest, [*ANSWERS, {**more, "task": "caption"}])["scene"][1] == 2


@pytest.mark.parametrize("choice", [None, "red", {"text": None}, {}, {"text": "blue"}])
def test_choice_without_the_right_text_is_wrong(tmp_path, manifest, choice):
    answers = [record("a.mp4#choice", "What colour?", "red", choice=choice)]
    assert scored(tmp_path, manifest, answers)["choice"] == (1, 0, 0, 0)


def test_lines_of_a_ledger_that_are_none_are_left_out(tmp_path, manifest):
    ledger = write(tmp_path / "ledger.jsonl", ANSWERS)
    with ledger.open("a", encoding="utf-8") as file:
        file.write('{"broken\n[1]\n{"id": "d.mp4", "task": "ask", "ques')
    assert [row.right for row in score(ledger, manifest)] == [1, 1, 1]


def test_table_has_a_line_for_each_kind(tmp_path, manifest):
    rows = score(write(tmp_path / "ledger.jsonl", ANSWERS), manifest)
    head, *lines = format_table(rows).splitlines()
    assert head.split() == ["kind", "num", "right", "share", "missing", "errors"]
    assert lines[0].split() == ["scene", "4", "1", "25.0%", "1", "1"]
    assert len({len(line) for line in (head, *lines)}) == 1


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["world", "score", *map(str, arguments)])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_command_prints_rows_and_names_what_is_missing(tmp_path, manifest, capsys):
    ledger = write(tmp_path / "ledger.jsonl", ANSWERS)
    code, out, err = run(capsys, ledger, manifest)
    assert code == 3
    scene, *_ = [json.loads(line) for line in out.splitlines()]
    assert scene == {
        "kind": "scene",
        "num": 4,
        "right": 1,
        "share": 0.25,
        "missing": 1,
        "errors": 1,
    }
    assert err.splitlines() == [
        "missing: d.mp4: Where?",
        "errors: c.mp4: Where?",
        f"{ledger}: 3 of 6 exactly right, 50.0%",
    ]


def test_command_names_ten_of_many_and_all_with_verbose(tmp_path, manifest, capsys):
    lines = [{**MANIFEST[0], "path": f"{idx}.mp4"} for idx in range(25)]
    manifest, ledger = write(manifest, lines), write(tmp_path / "ledger.jsonl", ANSWERS)
    _, _, err = run(capsys, ledger, manifest)
    assert err.count("missing: ") == 11
    assert "missing: 15 more, which -v names\n" in err
    assert run(capsys, ledger, manifest, "-v")[2].count("missing: ") == 25
    assert run(capsys, ledger, manifest, "-q")[2] == ""


def test_command_ends_well_where_nothing_is_missing(tmp_path, capsys):
    manifest = write(tmp_path / "m.jsonl", MANIFEST[:2])
    code, out, _ = run(capsys, write(tmp_path / "l.jsonl", ANSWERS), manifest, "--json")
    assert code == 0
    assert json.loads(out)["share"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a question"),
        ("\n\n", "is empty; expected a question"),
        ('{"path": "a', 'line 1: \'{"path": "a\' is no JSON'),
        ("[" * 100_000, "[' is no JSON"),
        ('"a.mp4"', 'line 1: "a.mp4" is no object'),
        ('{"path": "a", "question": "b", "answer": "c"}', "line 1: has no 'kind'"),
        ('{"path": "a", "question": "b", "answer": 1, "kind": "d"}', "answer is 1, expected text"),
        ('{"question": "b", "answer": "c", "kind": "d"}', "line 1: has no 'path'"),
        ('{"path": 1, "question": "b", "answer": "c", "kind": "d"}', "line 1: path is 1"),
        ('{"id": "a", "question": "b", "answer": "c", "kind": "d"}', "line 1: has no 'path'"),
        (json.dumps(MANIFEST[0]) + "\n{}", "line 2: has no 'path'"),
    ],
)
def test_broken_manifest_is_refused_with_its_line(tmp_path, capsys, text, message):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(text)
    code, out, err = run(capsys, write(tmp_path / "l.jsonl", ANSWERS), manifest)
    assert (code, out) == (2, "")
    assert str(manifest) in err
    assert message in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_ledger_is_refused(tmp_path, manifest):
    ledger = tmp_path / "clip.mp4"
    ledger.write_bytes(b"\x00\x00\x00 ftyp\n[1]\n")
    with pytest.raises(LedgerError, match=r"clip\.mp4' has no record in its lines"):
        score(ledger, manifest)
    ledger.write_bytes(b"")  # nothing was answered yet
    assert all(len(row.missing) == row.num for row in score(ledger, manifest))


def test_files_that_cannot_be_read_are_named(tmp_path, manifest):
    with pytest.raises(LedgerError, match=r"cannot read '.*gone\.jsonl'"):
        score(tmp_path / "gone.jsonl", manifest)
    with pytest.raises(UsageError, match=r"cannot read '.*gone\.jsonl'"):
        score(write(tmp_path / "l.jsonl", ANSWERS), tmp_path / "gone.jsonl")
    manifest.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"line 1: .* is no JSON"):
        score(write(tmp_path / "l.jsonl", ANSWERS), manifest)


def test_line_breaks_within_texts_end_no_line(tmp_path):
    entry = {**MANIFEST[0], "question": "Where\u2028is\x85it?"}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    answers = [record("a.mp4", entry["question"], entry["answer"])]
    assert scored(tmp_path, manifest, answers) == {"scene": (1, 1, 0, 0)}
