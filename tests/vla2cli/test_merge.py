"""Several ledgers become one: nothing lost, nothing twice, nothing invented."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla2cli.cli import main
from vla2cli.errors import LedgerBusyError, LedgerError, UsageError
from vla2cli.ledger import Ledger, new_ledger
from vla2cli.merge import merge_ledgers

ERROR = {"kind": "decode", "stage": "decode", "message": "moov atom not found"}


def record(name, text="A car.", **more):
    return {"id": name, "task": "caption", "question": "What?", "text": text, **more}


def failure(name, message="moov atom not found", **more):
    error = {**ERROR, "message": message}
    return {"id": name, "task": "caption", "question": "What?", "error": error, **more}


def write(path, *records, tail=b""):
    lines = [json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in records]
    path.write_bytes(b"".join(lines) + tail)
    return path


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def paths(tmp_path):
    """Two ledgers to be written, and the output."""
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"


@pytest.fixture
def vla2(capsys, monkeypatch):
    """Run the command line; give exit code, stdout and stderr."""
    for name in ("VLA2_OUTPUT", "VLA2_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return ended.value.code, *capsys.readouterr()

    return run


# what is taken


def test_records_stand_by_input_and_then_by_line(paths):
    a, b, c = paths
    write(a, record("z"), record("b", "old"), record("é ☕\n"), record("b", "new"))
    write(b, record("c"), record("a"))
    merged = merge_ledgers([b, a], c)
    assert [entry["id"] for entry in read(c)] == ["c", "a", "z", "é ☕\n", "b"]
    assert read(c)[-1]["text"] == "new"
    assert (merged.records, merged.done, merged.errors) == (5, 5, 0)
    assert [(i.records, i.keys, i.taken) for i in merged.inputs] == [(2, 2, 2), (4, 3, 3)]


def test_lines_are_copied_byte_by_byte(paths):
    a, b, c = paths
    odd = b' {"task" : "t","id":"\\u00e9", "x": [NaN, 1e400, "\\udcff", 18446744073709551616]}\r\n'
    a.write_bytes(b"\xef\xbb\xbf" + odd)
    b.write_bytes(b'{"id": "b", "task": "t"}')  # lacks only its newline
    merge_ledgers([a, b], c)
    assert c.read_bytes() == odd + b'{"id": "b", "task": "t"}\n'


def test_same_record_made_at_another_time_is_taken_once(paths):
    a, b, c = paths
    first = record("a", created="2026-01-01T00:00:00Z", timings_s={"read": 1.0}, seed=None)
    write(a, first)
    write(b, {**dict(reversed(first.items())), "created": "2027", "timings_s": None}, record("b"))
    merged = merge_ledgers([a, b], c)
    assert read(c) == [first, record("b")]
    assert [source.taken for source in merged.inputs] == [1, 1]


@pytest.mark.parametrize("is_swapped", [False, True])
def test_error_gives_way_to_a_text(paths, is_swapped):
    a, b, c = paths
    write(a, failure("x"), failure("y"), record("z"))
    write(b, record("x"), failure("z", "other"))
    merged = merge_ledgers([b, a] if is_swapped else [a, b], c)
    assert sorted(read(c), key=lambda entry: entry["id"]) == [
        record("x"),
        failure("y"),
        record("z"),
    ]
    assert (merged.done, merged.errors) == (2, 1)


def test_error_that_came_after_a_text_in_one_ledger_is_its_last_word(paths):
    a, _, c = paths
    write(a, record("x"), failure("x"))
    merge_ledgers([a], c)
    assert read(c) == [failure("x")]


@pytest.mark.parametrize("is_swapped", [False, True])
def test_of_two_errors_the_later_input_has_the_last_word(paths, tmp_path, is_swapped):
    a, b, c = paths
    write(a, failure("x", "one"))
    write(b, failure("x", "two", sha256="2"))
    inputs = [b, a] if is_swapped else [a, b]
    merged = merge_ledgers(inputs, c)
    assert read(c) == read(inputs[-1])
    assert (merged.records, merged.errors) == (1, 1)
    third = write(tmp_path / "third.jsonl", record("x"))
    merge_ledgers([a, third, b], c, force=True)
    assert read(c) == [record("x")]


def test_choices_are_the_same_when_their_texts_are(paths, vla2):
    a, b, c = paths

    def chosen(text, probability):
        shares = {"left": probability, "right": 1 - probability}
        choice = {"text": text, "probability": shares[text], "all": shares}
        return record("x", "left", choice=choice)

    write(a, chosen("left", 0.75))
    write(b, chosen("left", 0.75 + 2**-50))
    merge_ledgers([a, b], c)
    assert read(c) == read(a)
    write(b, chosen("right", 0.25))
    code, _, err = vla2("merge", a, b, "-o", c, "--force")
    assert code == 1
    assert "which differ in choice;" in err
    write(b, record("x", "left", choice=None))
    with pytest.raises(LedgerError, match="which differ in choice;"):
        merge_ledgers([a, b], c, force=True)


def test_key_is_that_of_the_ledger(paths):
    a, b, c = paths
    base = record("x")
    variants = [
        {**base, "task": "ask"},
        {**base, "question": "Why?"},
        {**base, "segment": {"start_s": 1.0, "end_s": None}},
        {**base, "history": [{"question": "Who?", "text": "Nobody."}]},
    ]
    write(a, base)
    write(b, *variants)
    assert merge_ledgers([a, b], c).records == 5
    with Ledger.open(c) as ledger:
        assert len(ledger) == 5


def test_empty_ledger_of_an_empty_shard_adds_nothing(paths):
    a, b, c = paths
    write(a)
    write(b, record("x"))
    assert merge_ledgers([a, b], c).records == 1
    assert merge_ledgers([a], c, force=True).records == 0
    assert c.read_bytes() == b""


# what is refused


def test_conflict_names_key_files_lines_and_fields_and_writes_nothing(paths, vla2):
    a, b, c = paths
    span = {"segment": {"start_s": 1.0, "end_s": 2.5}}
    write(a, record("y"), record("x", sha256="1", **span), record("z"))
    write(b, record("z", "B."), record("x", "B.", sha256="2", flags=[], **span))
    before = sorted(path.name for path in a.parent.iterdir())
    code, out, err = vla2("merge", a, b, "-o", c)
    assert (code, out) == (1, "")
    assert err == (
        "vla2: 2 keys have two different records, nothing was written: id 'z', task caption, "
        f"question 'What?' in '{a}' line 3 and '{b}' line 1, which differ in text; leave one of "
        "the ledgers out\n"
    )
    write(b, record("x", sha256="2", flags=[], **span))
    _, _, err = vla2("merge", a, b, "-o", c)
    assert "1 key has two different records" in err
    assert "segment 1.0-2.5 s in" in err
    assert "which differ in sha256, flags;" in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in a.parent.iterdir()) == before


def test_output_that_exists_is_kept_or_renamed(paths, vla2):
    a, b, c = paths
    write(a, record("x"))
    c.write_bytes(b"notes")
    code, _, err = vla2("merge", a, "-o", c)
    assert (code, err) == (2, f"vla2: '{c}' exists; --force renames it to FILE.bak-N\n")
    assert c.read_bytes() == b"notes"
    write(b, record("x", "other"))
    code, *_ = vla2("merge", a, b, "-o", c, "--force")  # a conflict
    assert code == 1
    assert c.read_bytes() == b"notes"
    assert vla2("merge", a, "-o", c, "--force")[0] == 0
    assert read(c) == [record("x")]
    assert c.with_name("c.jsonl.bak-1").read_bytes() == b"notes"
    assert sorted(path.name for path in c.parent.iterdir()) == (
        ["a.jsonl", "b.jsonl", "c.jsonl", "c.jsonl.bak-1"]
    )


def test_input_is_not_taken_for_the_output(paths, vla2, tmp_path):
    a, b, _ = paths
    write(a, record("x"))
    (tmp_path / "hard.jsonl").hardlink_to(a)
    b.symlink_to(a)
    for other in (a, b, tmp_path / "hard.jsonl"):
        code, _, err = vla2("merge", a, "-o", other, "--force")
        assert (code, err) == (2, f"vla2: '{a}' is an input; choose another -o\n")
    assert read(a) == [record("x")]


def test_file_that_a_run_writes_is_refused_with_its_writer(paths, vla2):
    a, b, c = paths
    write(a, record("x"))
    for busy in (b, c):
        code = f"""
import sys
from vla2cli.ledger import Ledger
with Ledger.open({str(busy)!r}):
    print(flush=True)
    sys.stdin.read()
"""
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as run:
            run.stdout.readline()
            arguments = ("merge", a, *([b] if busy == b else []), "-o", c, "--force")
            exit_code, _, err = vla2(*arguments)
            assert exit_code == 5
            assert err.startswith(f"vla2: '{busy}' is being written by process {run.pid} on host ")
            run.communicate(b"")
    b.with_name("b.jsonl.lock").touch()  # stale: nobody holds it
    assert vla2("merge", a, b, "-o", c, "--force")[0] == 0


def test_what_cannot_be_merged_is_one_line(paths, vla2, tmp_path):
    a, _, c = paths
    write(a, record("x"))
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    os.mkfifo(tmp_path / "pipe")
    for arguments, code, message in (
        ((a,), 2, "merge writes a new ledger: give -o FILE"),
        ((a, "-o", "-"), 2, "merge writes a new ledger: give -o FILE"),
        ((a, "-o", tmp_path / "no/c"), 2, f"there is no folder '{tmp_path}/no'; create it or"),
        ((tmp_path / "gone", "-o", c), 1, f"cannot read '{tmp_path}/gone': no such file"),
        ((tmp_path, "-o", c), 1, f"'{tmp_path}' is not a regular file"),
        ((tmp_path / "pipe", "-o", c), 1, f"'{tmp_path}/pipe' is not a regular file"),
        ((a, tmp_path / "notes.txt", "-o", c), 1, "notes.txt' is not a vla2 ledger: no line"),
        (("-o", c), 2, "LEDGER"),
    ):
        exit_code, out, err = vla2("merge", *arguments)
        assert (exit_code, out) == (code, "")
        assert message in err
        assert err.count("\n") == 1
        assert not c.exists()


# lines that are no records


def test_lines_that_are_no_records_are_left_out_and_said(paths, vla2):
    a, b, c = paths
    write(a, record("x"), tail=b'oops\n[1]\n{"id": "y", "ta')
    write(b, record("z"))
    before = a.read_bytes()
    code, out, err = vla2("merge", a, b, "-o", c, "--json")
    assert code == 3
    assert err.splitlines() == [
        f"vla2: {a}: 15 bytes of an unfinished record left out",
        f"vla2: {a}: lines that are no record: 2, left out (first: 2); see: vla2 verify {a}",
        f"{c}: 2 records of 2 ledgers, 2 done, 0 errors",
    ]
    (line,) = out.splitlines()
    assert json.loads(line)["inputs"][0] == {
        "path": str(a),
        "records": 1,
        "keys": 1,
        "taken": 1,
        "bad_lines": [2, 3],
        "torn_bytes": 15,
    }
    assert read(c) == [record("x"), record("z")]
    assert a.read_bytes() == before
    assert vla2("merge", a, b, "-o", c, "--force", "-q") == (3, "", "")


# whole or not at all

KILL = """
import os, signal, sys
from vla2cli.ledger import new_ledger
with new_ledger(sys.argv[1], force=True) as write:
    write(b'{"id": "a", "task": "t"}\\n' * 100_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_merge_leaves_the_old_file_and_the_next_one_goes_through(paths):
    a, _, c = paths
    write(a, record("x"))
    write(c, record("old"))
    subprocess.run([sys.executable, "-c", KILL, str(c)], check=False)
    assert read(c) == [record("old")]
    assert c.with_name("c.jsonl.part").exists()
    merge_ledgers([a], c, force=True)
    assert read(c) == [record("x")]
    assert sorted(path.name for path in c.parent.iterdir()) == (
        ["a.jsonl", "c.jsonl", "c.jsonl.bak-1"]
    )


def fail_within(path, error):
    with new_ledger(path) as write_line:
        write_line(b"{}\n")
        assert not path.exists()
        with pytest.raises(LedgerBusyError):
            Ledger.open(path)
        raise error


def test_ledger_that_could_not_be_written_is_not_there(paths):
    _, _, c = paths
    with pytest.raises(LedgerError, match=r"cannot write '.*': no space left on device"):
        fail_within(c, OSError(28, "No space left on device"))
    with pytest.raises(KeyError):
        fail_within(c, KeyError())
    assert list(c.parent.iterdir()) == []


def test_file_that_came_up_meanwhile_is_not_replaced(paths):
    _, _, c = paths
    c.write_bytes(b"x")
    with pytest.raises(UsageError, match="exists"), new_ledger(c):
        pytest.fail("it was begun")
    assert [path.name for path in c.parent.iterdir()] == [c.name]


def test_input_that_changes_while_it_is_read_is_refused(paths, monkeypatch):
    a, b, c = paths
    write(a, record("x"))
    write(b, record("y"))
    lines = Path.open

    def grow(self, *args, **kwargs):
        if self == b:
            write(a, record("x"), record("z"))
        return lines(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", grow)
    with pytest.raises(LedgerError, match="was changed while it was read; run the same"):
        merge_ledgers([a, b], c)
    assert not c.exists()
