import json

import pytest

from vla2cli.errors import UsageError
from vla2cli.train.conversation import Utterance
from vla2cli.train.entries import Entry, read_entries

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
SAID = (Utterance("human", "What?"), Utterance("gpt", "This."))


def write(path, *entries, lines=False):
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_a_list_and_lines_hold_the_same_entries(tmp_path, lines):
    path = write(
        tmp_path / "data",
        {"id": "a", "video": "a.mp4", "conversations": TURNS},
        {"id": 7, "image": "b.png", "conversations": TURNS},
        {"audio": "c.wav", "conversations": TURNS},
        {"id": "d", "conversations": TURNS},
        lines=lines,
    )
    assert read_entries(path) == [
        Entry("a", "video", "a.mp4", SAID),
        Entry("7", "image", "b.png", SAID),
        Entry("3", "audio", "c.wav", SAID),
        Entry("d", "text", None, SAID),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, "entry 2 is 5, expected an object"),
        ({"video": 3, "conversations": TURNS}, "entry 2: 'video' is 3, expected a path"),
        (
            {"video": "a", "image": "b", "conversations": TURNS},
            "entry 2 has both 'video' and 'image', expected one",
        ),
        ({"video": "a"}, "entry 2: 'conversations' is None, expected a list"),
        ({"conversations": [1]}, "entry 2: turn 1 of 'conversations' is 1, expected an object"),
        (
            {"conversations": [*TURNS, {"from": "me", "value": ""}]},
            "entry 2: turn 3 of 'conversations': 'from' is 'me', expected human or gpt",
        ),
        (
            {"conversations": [{"from": ["gpt"], "value": ""}]},
            "entry 2: turn 1 of 'conversations': 'from' is ['gpt'], expected human or gpt",
        ),
        (
            {"conversations": [{"from": "gpt"}]},
            "entry 2: turn 1 of 'conversations': 'value' is None, expected a text",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "a \ud83d"}]},
            "entry 2: turn 1 of 'conversations': 'value' has '\\ud83d', which is no character",
        ),
    ],
)
def test_an_entry_outside_the_format_is_named_with_its_file_and_key(tmp_path, entry, message):
    path = write(tmp_path / "data.json", {"conversations": TURNS}, entry, {"conversations": TURNS})
    before, odd, behind = read_entries(path)
    assert (before, behind) == (Entry("1", "text", None, SAID), Entry("3", "text", None, SAID))
    assert odd.id == "2"
    assert odd.fault.startswith(f"'{path}': {message}")
    assert "\n" not in odd.fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no entry"),
        ("", "has no entry"),
        ("[1, ", "is not JSON"),
        ('{"conversations": []}\n{', "line 2 is not JSON"),
    ],
)
def test_a_file_outside_the_format_is_named(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        read_entries(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json' cannot be read: no such file"):
        read_entries(tmp_path / "none.json")
