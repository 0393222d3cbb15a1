"""A second look at a ledger."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from vla2cli.errors import LedgerError
from vla2cli.ledger import Ledger
from vla2cli.verify import Summary, hash_file, verify


def record(name: str, text: str = "A car.", **more: Any) -> dict[str, Any]:
    return {"id": name, "task": "caption", "question": "What?", "text": text, **more}


def write(path: Path, *records: dict[str, Any]) -> None:
    with Ledger.open(path) as ledger:
        for entry in records:
            ledger.append(entry)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "captions.jsonl"


def test_verify_judges_the_last_record_of_each_key(path: Path) -> None:
    error = {"kind": "decode", "stage": "open", "message": "moov atom not found"}
    failed = {"id": "a", "task": "caption", "question": "What?", "error": error}
    lines = [
        failed,
        record("b", flags=["empty"]),
        record("a"),
        {**failed, "id": "c"},
        record("d", flags=["builtin-model", "no-audio-track", "repeating", "short-audio"]),
        record("b", flags=["builtin-model"]),
    ]
    write(path, *lines)
    with path.open("ab") as file:
        file.write(b'oops\n{"id": "e')
    report = verify(path)
    assert report.summary == Summary(records=6, keys=4, done=3, errors=1)
    assert [(found.kind, found.line, found.id, found.message) for found in report] == [
        ("error", 4, "c", "decode: moov atom not found"),
        ("flagged", 5, "d", "repeating, short-audio"),
        ("not-a-record", 7, None, "begins with 'oops\\n'"),
        ("torn", 8, None, "9 bytes of an unfinished record; the next run repairs this"),
    ]


def file_record(path: Path, name: str = "1.mp4", **more: Any) -> dict[str, Any]:
    status = path.stat()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    sizes = {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256}
    return record(name, path=str(path), **{**sizes, **more})


def test_verify_finds_files_that_are_gone_or_changed(path: Path, tmp_path: Path) -> None:
    names = ["same", "touched", "edited", "grown", "gone", "unhashed", "sneaky", "pipe"]
    files = {name: tmp_path / f"{name}.mp4" for name in names}
    for file in files.values():
        file.write_bytes(b"1234567")
    more = {"unhashed": {"sha256": None}}
    write(path, *(file_record(file, name, **more.get(name, {})) for name, file in files.items()))
    later = files["same"].stat().st_mtime_ns + 10**9
    files["edited"].write_bytes(b"7654321")
    for name in ("touched", "edited", "unhashed"):
        os.utime(files[name], ns=(later, later))
    files["grown"].write_bytes(b"12345678")
    files["gone"].unlink()
    files["pipe"].unlink()
    os.mkfifo(files["pipe"])
    before = files["sneaky"].stat().st_mtime_ns
    files["sneaky"].write_bytes(b"7654321")
    os.utime(files["sneaky"], ns=(before, before))
    changed = {"edited": "changed-file", "grown": "changed-file", "unhashed": "changed-file"}
    missing = {"gone": "missing-file", "pipe": "missing-file"}
    assert {found.id: found.kind for found in verify(path)} == changed | missing
    assert {found.id: found.kind for found in verify(path, rehash=True)} == (
        changed | missing | {"sneaky": "changed-file"}
    )
    assert list(verify(path, check_files=False)) == []


def test_verify_finds_files_by_encoded_name_and_below_a_new_root(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "v" / os.fsdecode(b"caf\xe9 100%.mp4")
    file.parent.mkdir()
    file.write_bytes(b"1234567")
    write(path, {**file_record(file), "id": "caf%E9 100%.mp4", "path": "v/caf%E9 100%.mp4"})
    assert list(verify(path)) == []
    (tmp_path / "v").rename(tmp_path / "w")
    assert [found.kind for found in verify(path)] == ["missing-file"]
    assert list(verify(path, root="w")) == []
    (tmp_path / "x").mkdir()
    (tmp_path / "w").rename(tmp_path / "x" / "v")
    assert list(verify(path, root="x")) == []


def test_verify_refuses_what_is_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"one\ntwo\n")
    with pytest.raises(LedgerError, match=r"notes.txt' is not a vla2 ledger"):
        verify(path)
    with pytest.raises(LedgerError, match="no such file"):
        verify(tmp_path / "gone.jsonl")
    path.write_bytes(b"")
    assert verify(path).summary == Summary(0, 0, 0, 0)


def test_hash_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_file(tmp_path / "abc") == want
