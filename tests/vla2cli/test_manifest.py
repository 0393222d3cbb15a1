"""A manifest: a file or part of one, a question and perhaps options on each line."""

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
from vla2cli.manifest import read_manifest, read_questions
from vla2cli.plan import DEFAULT_PROMPT, Task

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
    """Run `vla2 ask`, or another command, with the tiny model; give exit code, records, stderr."""
    for name, value in {"MODEL": MODEL_ID, "HUB_DIR": tiny_hub(), "MAX_NEW_TOKENS": 4}.items():
        monkeypatch.setenv(f"VLA2_{name}", str(value))
    monkeypatch.chdir(tmp_path)

    def run(*arguments, command="ask"):
        with pytest.raises(SystemExit) as ended:
            main([command, *arguments])
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


def test_ranges_make_items_that_share_an_id_and_are_written_as_for_the_flags(write):
    ranges = [{"start_s": 80}, {"end_s": "1:20"}, {"start_s": "0:01:20.0"}, {"end_s": 80.5}, {}]
    more = {"start_s": None, "end_s": 80, "question": "Why?"}
    manifest = read_manifest(write(*({**GOOD, **part} for part in [*ranges, more])))
    found = [(item.id, item.start_s, item.end_s, list(item.asked)) for item in manifest.items]
    assert found == [
        ("a.mp4", 80.0, None, ["What moves?"]),
        ("a.mp4", None, 80.0, ["What moves?", "Why?"]),
        ("a.mp4", None, 80.5, ["What moves?"]),
        ("a.mp4", None, None, ["What moves?"]),
    ]
    note = manifest.found("auto").notes[0]
    assert (note.videos, note.skipped) == (1, 0)  # of files, not of parts


def test_lines_without_a_question_are_about_what_the_command_asks(write):
    path = write({"path": "a.mp4", "choices": SIDES}, GOOD, {"path": "c.png", "question": None})
    clip, picture = read_manifest(path, needs_question=False).items
    task = Task("ask", (("Which way?",), ("What moves?",)))
    assert task.conversations_about(clip, "video") == (("Which way?",), ("What moves?",))
    assert task.choices_of(clip, "Which way?") == tuple(SIDES)
    assert task.choices_of(clip, "What moves?") == ()
    assert task.conversations_about(picture, "image") == task.conversations
    default = DEFAULT_PROMPT.format(medium="image")
    assert Task("caption").conversations_about(picture, "image") == ((default,),)


# CSV

TABLE = """\
\ufeffpath,id, question ,choices,end_s,start_s,answer
a.mp4,,What moves?,,,,a car

sub/ünï.mp4,x,"Which way,
""left"" or not?",to the left| to the right,2,0:01,
a.mp4,,What moves?,yes|no,,3.5,
,,,,,,
a.mp4,,Why?,,,3.50,"so, here"
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["m.csv", "M.CSV"])
def test_table_says_the_same_as_lines_of_json(write, line_end, name):
    x = {"id": "x", "path": "sub/ünï.mp4", "question": f'Which way,{line_end}"left" or not?'}
    lines = [
        GOOD,
        {**x, "choices": SIDES, "start_s": 1, "end_s": 2},
        {**GOOD, "choices": ["yes", "no"], "start_s": 3.5},
        {**GOOD, "question": "Why?", "start_s": 3.5},
    ]
    table = Path(write(name=name))
    table.write_bytes(TABLE.replace("\n", line_end).encode())
    assert read_manifest(str(table)).items == read_manifest(write(*lines)).items


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "a.mp4,What moves?\n",
            'line 1: ["a.mp4", "What moves?"] is no header; expected the names',
        ),
        ("file,question\na.mp4,?\n", 'line 1: ["file", "question"] is no header'),
        ("path;question\na.mp4;?\n", 'line 1: ["path;question"] is no header'),
        ("path,question,path\na,?,b\n", "line 1: "),
        ("\n\npath,question\na.mp4\n", "line 4: has 1 cells, the header has 2: "),
        ('path,question\n"a\n.mp4",?\na,?,b\n', "line 4: has 3 cells, the header has 2: "),
        ("path,question\na.mp4,\n", "line 2: has no 'question'"),
        ("path,question\n,Why?\n", "line 2: has no 'path'"),
        ('path,question\na.mp4,"Why?\n\n', "line 2: is no CSV: unexpected end of data"),
        ('path,question\n"a".mp4,Why?\n', "line 2: is no CSV: "),
        ("path,question\na.mp4,?\ncaf\xe9,?\n", "line 3: is not UTF-8"),
        ("path,question,choices\na.mp4,?,a|a\n", 'line 2: choices is ["a", "a"], expected a list'),
        ("path,question,start_s\na.mp4,?,soon\n", 'line 2: start_s is "soon", expected seconds'),
        ("path,question,end_s\na.mp4,?,0\n", 'line 2: end_s is "0": the range ends before it'),
    ],
    ids=range(14),
)
def test_a_bad_row_is_refused_by_the_number_of_its_first_line(write, table, message):
    path = Path(write(name="m.csv"))
    path.write_bytes(table.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        read_manifest(str(path))
    assert f"m.csv: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_without_rows_is_no_input(write):
    path = Path(write(name="m.csv"))
    for table in ("", "\n", "path,question\n", "path,question\n,\n"):
        path.write_text(table)
        with pytest.raises(NoInputError, match="holds no line with a path and a question"):
            read_manifest(str(path))


# bad lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("What moves?", "'What moves?' is no JSON"),
        ('{"path": "a.mp4", "quest', "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"path": "a.mp4", "question": "?", "path": "b.mp4"}', '"path" stands there twice'),
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
        ({**GOOD, "start_s": -1}, "start_s is -1, expected seconds like 12.5, or 1:02:03"),
        ({**GOOD, "start_s": "1:-2"}, 'start_s is "1:-2", expected seconds'),
        ({**GOOD, "end_s": True}, "end_s is true, expected seconds"),
        ({**GOOD, "end_s": [1]}, "end_s is [1], expected seconds"),
        ({**GOOD, "end_s": float("nan")}, "end_s is NaN, expected seconds"),
        ({**GOOD, "end_s": float("inf")}, "end_s is Infinity, expected seconds"),
        ({**GOOD, "start_s": "9" * 1000}, 'start_s is "999'),
        ({**GOOD, "start_s": 3, "end_s": 3.0}, "end_s is 3.0: the range ends before it begins"),
        ({**GOOD, "start_s": "1:00", "end_s": 3}, "end_s is 3: the range ends before it begins"),
        ({**GOOD, "path": "c.png", "end_s": 3}, "'c.png' is a picture, which has no start_s and"),
        (
            {"path": "b.mp4", "question": "Why?", "id": "a.mp4", "start_s": 1},
            "id 'a.mp4' is of 'b.mp4' here and of another path in line 1",
        ),
    ],
    ids=range(31),
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


# a list of questions


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_questions_of_a_text_are_read_once_each_in_their_order(tmp_path, line_end):
    lines = ["\ufeffWhich way?", "", "  ", " Wo ist “es”, ü?\t", "Which way?", "A\u2028B", "Why?"]
    data = line_end.join(lines).encode()
    (tmp_path / "q.txt").write_bytes(data)
    expected = ["Which way?", "Wo ist “es”, ü?", "A\u2028B", "Why?"]
    assert read_questions(str(tmp_path / "q.txt")) == expected
    assert read_questions("-", stdin=io.BytesIO(data)) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"q\.txt' holds no question; expected one in each line"),
        (b"\xef\xbb\xbf\r\n \n", "holds no question"),
        (b"Why?\ncaf\xe9?\n", r"q\.txt: line 2: \"caf\ufffd\?\" is no text in UTF-8"),
        ("Why?".encode("utf-16"), "line 1: .* is no text in UTF-8"),
    ],
    ids=["empty", "blank", "latin", "utf-16"],
)
def test_a_text_without_questions_is_wrong_usage(tmp_path, data, message):
    (tmp_path / "q.txt").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_questions(str(tmp_path / "q.txt"))


def test_questions_of_a_text_are_asked_besides_the_others(write, said):
    clip = str(Path(write(GOOD)).parent / "a.mp4")
    Path("q.txt").write_text("What?\n\nWhy?\nWhat?\n")
    flags = ("--question", "Why?", "--questions", "q.txt", "--choices", "a ball|a car")
    code, records, err = said(clip, *flags)
    assert (code, [r["question"] for r in records]) == (0, ["Why?", "What?"])
    assert all(r["text"] in ("a ball", "a car") for r in records)
    assert "2 items: 2 answers" in err
    # of a manifest, only the lines without a question
    path = write(GOOD, {"path": "b.mp4"})
    code, records, _ = said("--manifest", path, "--questions", "q.txt")
    asked = [(r["id"], r["question"]) for r in records]
    assert sorted(asked) == [("a.mp4", "What moves?"), ("b.mp4", "What?"), ("b.mp4", "Why?")]


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
        return sorted((record["id"], record["question"]) for record in found)

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


def test_parts_of_a_table_are_asked_captioned_and_done_once(write, said):
    rows = ["path,question,start_s,end_s", "a.mp4,Why?,,2", "a.mp4,,2,0:04", "c.png,,,"]
    table = write(*rows, name="parts.csv")
    spans = {"Why?": [(None, 2)], "What?": [(2, 4), None]}
    code, records, err = said("--manifest", table, "--question", "What?")
    assert (code, _spans(records)) == (0, spans)
    assert "parts.csv: 1 video, 1 image" in err

    again = ("--manifest", table, "-o", "out.jsonl")
    code, _, err = said(*again, "--prompt", "What?", command="caption")
    assert code == 0
    assert "3 items: 3 captions" in err
    written = Path("out.jsonl").read_text().splitlines()
    assert _spans(map(json.loads, written)) == spans
    code, _, err = said(*again, "--prompt", "What?", command="caption")
    assert "nothing to do: 3 done" in err
    # the default prompt names what the file is
    default = DEFAULT_PROMPT.format(medium="image")
    code, records, _ = said("--manifest", table, command="caption")
    assert {r["question"] for r in records if r["id"] == "c.png"} == {default}

    # what has no range of its own is cut, and so is a range
    code, lines, _ = said("--manifest", table, "--every", "1", "--dry-run", command="caption")
    ends = [tuple(line["segment"].values()) for line in lines if "segment" in line]
    assert (code, ends) == (0, [(0, 1), (1, 2), (2, 3), (3, 4)])


def test_what_is_wrong_with_a_file_is_said_once_for_all_its_records(write, said):
    path = write(
        GOOD,
        *({"path": "bad.mp4", "question": question} for question in ("A?", "B?", "C?")),
        {"path": "bad.mp4", "question": "A?", "start_s": 1},
        *({"path": "a.mp4", "question": q, "start_s": 9 + i} for q in "AB" for i in range(2)),
        {"path": "gone.mp4", "question": "Why?"},
    )
    (Path(path).parent / "bad.mp4").write_text("no video")
    code, records, err = said("--manifest", path)
    failed = [record for record in records if "error" in record]
    assert (code, len(records), len(failed)) == (3, 10, 9)
    folder = Path(path).parent
    lines = sorted(line.removeprefix(f"{folder}/") for line in err.splitlines() if "mp4: " in line)
    long = "the video is 5.00 s long (50 frames) (2 records, going on)"
    first, second, bad, gone = lines
    assert [first, second] == [
        f"a.mp4: no frame between {s} s and the end: {long}" for s in (10, 9)
    ]
    assert bad.startswith("bad.mp4: cannot decode: ")
    assert bad.endswith(" (4 records, going on)")
    assert gone == "gone.mp4: no such file (recorded, going on)"
    assert "10 items: 1 answer, 9 errors" in err
    code, records, err = said(str(folder / "bad.mp4"), "--question", "A?", "--question", "B?")
    assert (code, len(records)) == (4, 2)
    (line,) = (line for line in err.splitlines() if "cannot decode" in line)
    assert line.endswith(" (2 records)")


def _spans(records):
    found = {}
    for record in records:
        span = record["segment"] and tuple(record["segment"].values())
        found.setdefault(record["question"], []).append(span)
    return {question: sorted(spans, key=str) for question, spans in found.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--manifest", "m.jsonl", "a.mp4", "Why?"), "--manifest has its own paths and no --then"),
        (("--manifest", "m.jsonl", "--then", "Why?"), "--manifest has its own paths and no --then"),
        ((), "expected PATH... QUESTION, or --manifest FILE"),
        (("--questions", "-", "-"), "'-' was given twice; there is one standard input"),
        (("--questions", "-", "--manifest", "-"), "'-' was given twice; there is one standard"),
        (("a.mp4", "--questions", "gone.txt"), "'gone.txt' cannot be read: no such file"),
        (("--question", "a", "a.mp4", "--question", "b", "--then", "c"), "several were given"),
        (("a.mp4", "Which?", "--choices", "left"), "'--choices left': expected two options or"),
        (("a.mp4", "Which?", "--choices", "a|b", "--then", "Why?"), "--choices are of one answer"),
    ],
    ids=range(9),
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
