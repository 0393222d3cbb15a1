"""The script that measures a model counts what it says it counts; no model runs here."""

import json

import pytest

from tests.bench import heldout
from vla2cli.world.write import MANIFEST, World, manifest_entries


def write_manifest(folder, entries):
    (folder / MANIFEST).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def test_each_kind_is_asked_of_all_it_takes_and_of_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "NUM_CLIPS", 3)
    count = heldout.count_needed(5, "heldout")
    entries = list(manifest_entries(World(5, "heldout", count)))
    write_manifest(tmp_path, entries)
    asked = list(heldout.read_lines(heldout.questions_of(tmp_path)))
    for kind in heldout.KINDS:
        of_kind = [entry for entry in asked if entry["kind"] == kind]
        clips = {entry["path"] for entry in of_kind}
        assert clips == set(sorted({e["path"] for e in entries if e["kind"] == kind})[:3])
        # a clip that is asked is asked all of a kind, as what came first and what then
        assert of_kind == [e for e in entries if e["kind"] == kind and e["path"] in clips]
        assert len(clips) == 3

    fewer = list(manifest_entries(World(5, "heldout", count - 1)))
    num_clips = [len({e["path"] for e in fewer if e["kind"] == kind}) for kind in heldout.KINDS]
    assert min(num_clips) == 2


def test_table_has_a_row_for_each_kind_of_the_world():
    kinds = {entry["kind"] for entry in manifest_entries(World(0, "train", 60))}
    assert kinds == set(heldout.KINDS)


def test_chance_is_the_share_of_the_most_frequent_answer(tmp_path):
    lines = [{"kind": "when", "answer": answer} for answer in ("end", "end", "start", "middle")]
    lines += [{"kind": "choice", "answer": "a", "choices": ["a", "b", "c", "d"]}]
    write_manifest(tmp_path, lines)
    assert heldout.read_chances(tmp_path / MANIFEST) == {"when": 0.5, "choice": 0.25}


def test_table_says_what_was_right_of_how_many():
    scores = [{"when": {"right": right, "num": 300}} for right in (285, 300, 75)]
    lines = heldout.table_lines([*scores, {}], {"when": 0.25})
    assert "| when | 95.0% of 300 | 100.0% of 300 | 25.0% of 300 | - | 25.0% |" in lines
    assert len({line.count("|") for line in lines}) == 1


def test_card_has_a_place_for_the_table_and_one_for_the_curve(tmp_path):
    card = tmp_path / "README.md"
    card.write_bytes(heldout.CARD.read_bytes())
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/6-joint-exam.png").touch()
    for table in ("| first |", r"| \1 second |"):
        heldout.write_card(card, table)
    text = card.read_text()
    assert "| first |" not in text
    assert r"<!-- table -->" + "\n\n" + r"| \1 second |" in text
    assert text.count("![6-joint-exam](logs/6-joint-exam.png)") == 1
    before = heldout.CARD.read_text()
    assert text.partition("<!-- table -->")[0] == before.partition("<!-- table -->")[0]
    assert text.rpartition("<!-- /curve -->")[2] == before.rpartition("<!-- /curve -->")[2]


def test_mark_that_is_missing_is_no_silent_success():
    with pytest.raises(AssertionError, match="'table' is marked 0 times"):
        heldout.fill("no mark", "table", "x")


@pytest.mark.parametrize("size", [["--quick"], ["--count", "40"]], ids=["quick", "count"])
def test_card_is_written_from_the_whole_table_alone(size, monkeypatch, capsys):
    monkeypatch.setattr(heldout.sys, "argv", ["heldout.py", *size, "--write-card"])
    with pytest.raises(SystemExit):
        heldout.parse_options()
    assert "--write-card is of 300 clips a kind" in capsys.readouterr().err
