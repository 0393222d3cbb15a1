"""The ledger: whole lines only, one writer, nothing lost when the run or the power goes."""

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vla2cli.errors import LedgerBusyError, LedgerError, UsageError
from vla2cli.ledger import (
    Entry,
    Ledger,
    is_current,
    key_of,
    read_records,
    settings_digest,
)


def record(name: str, text: str = "A car.", **more: Any) -> dict[str, Any]:
    return {"id": name, "task": "caption", "question": "What?", "text": text, **more}


def write(path: Path, *records: dict[str, Any]) -> None:
    with Ledger.open(path) as ledger:
        for entry in records:
            ledger.append(entry)


def beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def run(code: str, *arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "captions.jsonl"


# writing and reading back


def test_record_is_one_utf8_line_with_the_id_first(path: Path) -> None:
    write(path, {"task": "ask", "text": "é ☕\n\u2028\0", "id": "a b\n.mp4", "nested": {"x": (1,)}})
    data = path.read_bytes()
    assert data.startswith(b'{"id": "a b\\n.mp4", "task": "ask", ')
    assert data.count(b"\n") == 1
    assert "é ☕" in data.decode()
    assert json.loads(data)["text"] == "é ☕\n\u2028\0"


def test_nan_and_infinity_are_written_as_null(path: Path) -> None:
    write(path, record("a", scores=[math.nan, math.inf, 0.5], nested={"x": (-math.inf, 7)}))
    value = json.loads(path.read_bytes(), parse_constant=pytest.fail)
    assert value["scores"] == [None, None, 0.5]
    assert value["nested"] == {"x": [None, 7]}


def test_lone_surrogate_is_escaped_and_read_back(path: Path) -> None:
    write(path, record("a\udcff"))
    path.read_bytes().decode()  # valid UTF-8
    with Ledger.open(path) as ledger:
        assert ledger.lookup(key_of(record("a\udcff"))) is not None


def test_record_without_id_is_a_callers_mistake(path: Path) -> None:
    with Ledger.open(path) as ledger:
        for wrong in ({"task": "ask"}, {"id": 7, "task": "ask"}, {"id": "a"}):
            with pytest.raises(ValueError, match="'id' and 'task'"):
                ledger.append(wrong)
    assert path.read_bytes() == b""


def test_last_record_of_a_key_wins(path: Path) -> None:
    failed = {"id": "a", "task": "caption", "question": "What?", "error": {"kind": "decode"}}
    write(path, failed, record("b"), record("a", sha256="1"), record("b", sha256="2"))
    with Ledger.open(path) as ledger:
        entry = ledger.lookup(key_of(failed))
        assert entry is not None
        assert (entry.is_error, entry.sha256) == (False, "1")
        assert len(ledger) == 2
        ledger.append(failed)
        entry = ledger.lookup(key_of(failed))
        assert entry is not None
        assert entry.is_error
        assert ledger.lookup(key_of(record("c"))) is None


def test_key_is_id_task_question_segment_and_history() -> None:
    base = record("a", segment={"start_s": 0, "end_s": 2.5})
    variants = [
        base,
        {**base, "id": "b"},
        {**base, "task": "ask"},
        {**base, "question": "Why?"},
        {**base, "segment": {"start_s": 2.5, "end_s": 5}},
        {**base, "segment": None},
        {**base, "history": [{"question": "Who?", "text": "Nobody."}]},
    ]
    assert len({key_of(variant) for variant in variants}) == len(variants)
    same = {**base, "text": "Other.", "history": [], "segment": {"start_s": 0.0, "end_s": 2.5}}
    assert key_of(same) == key_of(base)
    assert key_of(json.loads(json.dumps(base))) == key_of(base)


def test_ledger_behind_a_link_is_written_and_locked_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link.jsonl"
    link.symlink_to("disk/real.jsonl")
    with Ledger.open(link) as ledger:
        ledger.append(record("a"))
        assert (tmp_path / "disk/real.jsonl.lock").exists()
        with pytest.raises(LedgerBusyError):
            Ledger.open(tmp_path / "disk/real.jsonl")
    assert link.is_symlink()
    assert len(list(read_records(tmp_path / "disk/real.jsonl"))) == 1


# resuming


def test_settings_digest_depends_on_generation_and_seed_alone() -> None:
    base = {"generation": {"max_new_tokens": 512, "stop": ("a",)}, "seed": 0}
    digest = settings_digest(base)
    assert settings_digest({**json.loads(json.dumps(base)), "text": "x"}) == digest
    assert settings_digest(dict(reversed(base.items()))) == digest
    for change in ({"generation": {"max_new_tokens": 7}}, {"seed": 1}):
        assert settings_digest({**base, **change}) != digest


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, "same"),
        ({"size_bytes": 8}, "changed"),
        ({"mtime_ns": 8}, "hash"),
        ({"model_sha256": "n"}, "changed"),
        ({"settings": "t"}, "changed"),
        ({"settings": "t", "mtime_ns": 8}, "changed"),
    ],
)
def test_record_holds_while_file_model_and_settings_stay(change: dict[str, Any], want: str) -> None:
    now = {"size_bytes": 7, "mtime_ns": 1, "model_sha256": "m", "settings": "s", **change}
    entry = Entry(False, "a", 7, 1, "f", "m", "s")
    assert is_current(entry, **now) == want
    unhashed = Entry(False, "a", 7, 1, None, "m", "s")
    assert is_current(unhashed, **now) == ("same" if want == "same" else "changed")


def test_entry_of_a_read_record_equals_that_of_the_written_one(path: Path) -> None:
    full = record("a", size_bytes=7, mtime_ns=2**62 + 1, sha256="f", model={"sha256": "m"}, seed=0)
    with Ledger.open(path) as ledger:
        ledger.append(full)
        written = ledger.lookup(key_of(full))
    with Ledger.open(path) as ledger:
        assert ledger.lookup(key_of(full)) == written == Entry.of(full)


# unfinished lines


def test_cut_at_any_byte_leaves_the_earlier_records_and_loses_none(path: Path) -> None:
    write(path, record("a"), record("b"), record("é ☕", "zwölf\n"))
    data = path.read_bytes()
    start = data[:-1].rindex(b"\n") + 1
    for end in range(start, len(data) + 1):
        path.write_bytes(data[:end])
        with Ledger.open(path) as ledger:
            assert ledger.torn_bytes == (end - start if end < len(data) - 1 else 0)
            ledger.append(record("d"))
        kept = [entry["id"] for _, entry, _ in read_records(path) if entry is not None]
        # a record that lacks only its newline is whole
        assert kept == (["a", "b", "é ☕", "d"] if end >= len(data) - 1 else ["a", "b", "d"])
        torn = beside(path, "torn")
        if end in (start, len(data) - 1, len(data)):
            assert not torn.exists()
        else:
            assert data[:start] + torn.read_bytes() == data[:end]
            torn.unlink()


def test_cut_in_the_first_record_leaves_an_empty_ledger(path: Path) -> None:
    write(path, record("a"))
    data = path.read_bytes()
    for end in range(len(data) - 1):
        path.write_bytes(data[:end])
        with Ledger.open(path):
            pass
        assert path.read_bytes() == b""


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"id": "c", "ta\0\0\0'], ids=["all", "part"])
def test_nul_bytes_of_a_power_cut_are_moved_away(path: Path, tail: bytes) -> None:
    write(path, record("a"))
    data = path.read_bytes()
    path.write_bytes(data + tail)
    with Ledger.open(path) as ledger:
        assert ledger.torn_bytes == len(tail)
    assert path.read_bytes() == data
    assert beside(path, "torn").read_bytes() == tail


def test_torn_lines_gather_in_one_file(path: Path) -> None:
    write(path, record("a"))
    for tail in (b'{"id": "1', b'{"id": "2'):
        with path.open("ab") as file:
            file.write(tail)
        with Ledger.open(path):
            pass
    assert beside(path, "torn").read_bytes() == b'{"id": "1{"id": "2'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\ntwo\nthree", "line 3 begins with 'three'"),
        (b"one\n", "line 1 is no record"),
        (b"\n", "line 1 is no record"),
        (b"\x89PNG\r\n\x1a\n\xff", "line 3 begins with"),
        (b'{"name": "x"}\n{"id": 3}\n', "line 1 is no record"),
        (b'[1]\n{"id": "', "line 1 is no record"),
        (b'{"id": "a", "task": "ask"}\nfoo', "line 2 begins with 'foo'"),
    ],
)
@pytest.mark.parametrize("name", ["notes.txt"])
def test_file_that_is_no_ledger_is_refused_unchanged(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(LedgerError, match=re.escape(message)) as caught:
        Ledger.open(path)
    assert str(caught.value).startswith(f"'{path}' is not a vla2 ledger: ")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_broken_whole_lines_stay_and_are_counted(path: Path) -> None:
    write(path, record("a"))
    bad = b'\xff\xfe\n\n[1]\n{"id": "x"}\n' + b"[" * 100_000 + b"\n\0\0\0\n"
    path.write_bytes(path.read_bytes() + bad)
    with Ledger.open(path) as ledger:
        assert ledger.bad_lines == [2, 3, 4, 5, 6, 7]
        ledger.append(record("b"))
    assert bad in path.read_bytes()


# what cannot be written


def test_output_that_cannot_be_a_ledger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("circle").symlink_to("circle")
    for name, message in {
        ".": "'.' is a folder; -o takes a file",
        "new/": "'new/' is a folder; -o takes a file",
        "gone/x": f"'gone/x': there is no folder '{tmp_path}/gone'; create it or choose another -o",
        "pipe": "'pipe' is not a regular file; -o - writes to stdout",
        "/dev/stdout": "'/dev/stdout' is not a regular file; -o - writes to stdout",
        "/dev/fd/1": "'/dev/fd/1' is not a regular file; -o - writes to stdout",
        "/dev/null": "'/dev/null' is not a regular file; -o - writes to stdout",
        "circle": "cannot write 'circle': too many levels of symbolic links",
        "n" * 300: f"cannot write '{'n' * 300}': file name too long",
    }.items():
        with pytest.raises(LedgerError if message.startswith("cannot") else UsageError) as caught:
            Ledger.open(name, force=True)
        assert str(caught.value) == message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["circle", "pipe"]


def test_closed_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user writes everywhere")
    with pytest.raises(LedgerError, match="permission denied"):
        Ledger.open(tmp_path / "x.jsonl")
    tmp_path.chmod(0o700)


FILL = """
import resource, sys
from vla2cli.errors import LedgerError
from vla2cli.ledger import Ledger
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
with Ledger.open(sys.argv[1]) as ledger:
    try:
        for i in range(10_000):
            ledger.append({"id": str(i), "task": "caption", "text": "x" * 999})
    except LedgerError as error:
        print(i, error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        if len(sys.argv) > 2:
            ledger.append({"id": "after", "task": "caption"})
"""


def check_whole(path: Path, printed: str, why: str, last: list[str]) -> None:
    count, message = printed.strip().split(" ", 1)
    assert message == (
        f"cannot write '{path}': {why}; it is whole, free some space and run the same command again"
    )
    assert int(count) > 0
    records = [entry for _, entry, _ in read_records(path)]
    assert [entry and entry["id"] for entry in records] == [*map(str, range(int(count))), *last]


def test_file_at_its_size_limit_stays_whole(path: Path) -> None:
    done = run(FILL, path, 10_007)
    assert done.stderr == ""
    check_whole(path, done.stdout, "file too large", ["after"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_the_ledger_whole(small_disk: Path) -> None:
    path = small_disk / "captions.jsonl"
    done = run(FILL, path)
    assert done.stderr == ""
    check_whole(path, done.stdout, "no space left on device", [])
    # the file system gives back what was cut off, and opening needs no space
    with Ledger.open(path) as ledger:
        assert ledger.torn_bytes == 0


def test_write_that_is_interrupted_is_taken_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    with Ledger.open(path) as ledger:
        ledger.append(record("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                # the rollback's own fsync is interrupted as well
                ledger.append(record("b"))
        assert ledger.lookup(key_of(record("b"))) is None
        ledger.append(record("c"))
    assert [entry and entry["id"] for _, entry, _ in read_records(path)] == ["a", "c"]


@pytest.mark.parametrize("is_replaced", [False, True], ids=["removed", "replaced"])
def test_ledger_removed_under_the_run_is_noticed(path: Path, is_replaced: bool) -> None:
    with Ledger.open(path) as ledger:
        ledger.append(record("a"))
        path.unlink()
        if is_replaced:
            path.touch()
        with pytest.raises(LedgerError, match="removed or replaced"):
            ledger.append(record("b"))


def test_lines_of_another_writer_are_not_overwritten(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.append(record("a"))
        with path.open("a") as file:
            file.write("by hand\n")
        with pytest.raises(LedgerError, match="changed by something else"):
            ledger.append(record("b"))
    assert path.read_bytes().endswith(b"by hand\n")


# the lock

HOLD = """
import sys, time
from vla2cli.ledger import Ledger
with Ledger.open(sys.argv[1]) as ledger:
    for i in range(int(sys.argv[2])):
        ledger.append({"id": str(i), "task": "caption"})
    print("ready", flush=True)
    for i in range(int(sys.argv[2]), 1_000_000):
        ledger.append({"id": str(i), "task": "caption"}) if i > 7 else time.sleep(60)
"""


@contextlib.contextmanager
def holder(path: Path, num_records: int = 0) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, str(path), str(num_records)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_second_process_is_told_who_writes_and_may_after_a_kill(path: Path) -> None:
    with holder(path, 1) as process:
        with pytest.raises(LedgerBusyError) as caught:
            Ledger.open(path, force=True)
        assert re.fullmatch(
            rf"'{re.escape(str(path))}' is being written by process {process.pid}"
            rf" on host {re.escape(os.uname().nodename)} since \d\d:\d\d",
            str(caught.value),
        )
        assert caught.value.exit_code == 5
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert beside(path, "lock").exists()  # stale, and harmless
        with Ledger.open(path) as ledger:
            assert len(ledger) == 1
            assert json.loads(beside(path, "lock").read_bytes())["pid"] == os.getpid()
        assert not beside(path, "lock").exists()


def test_kill_while_writing_leaves_whole_records_in_order(path: Path) -> None:
    for delay_s in (0.0, 0.01, 0.05):
        with holder(path, 8) as process:
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
            process.wait()
        with Ledger.open(path) as ledger:
            assert ledger.bad_lines == []
            assert len(ledger) >= 8
        ids = [entry["id"] if entry else None for _, entry, _ in read_records(path)]
        assert ids == [str(i) for i in range(len(ids))]
        path.unlink()


def test_holder_since_another_day_is_named_with_the_date(path: Path) -> None:
    since = datetime.now().astimezone() - timedelta(days=2)
    with Ledger.open(path):
        info = {"pid": 4711, "host": "pi", "since": since.isoformat()}
        beside(path, "lock").write_text(json.dumps(info))
        with pytest.raises(LedgerBusyError) as caught:
            Ledger.open(path)
    want = f"process 4711 on host pi since {since:%Y-%m-%d %H:%M}"
    assert str(caught.value) == f"'{path}' is being written by {want}"


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"pid": null, "host": 1, "since": 2}', "\udcff"]
)
def test_lock_with_nothing_readable_in_it_is_busy_all_the_same(path: Path, content: str) -> None:
    with Ledger.open(path):
        beside(path, "lock").write_text(content, errors="surrogateescape")
        with pytest.raises(LedgerBusyError, match="by another process"):
            Ledger.open(path)


def test_lock_of_another_run_is_not_taken_away(path: Path) -> None:
    lock = beside(path, "lock")
    with Ledger.open(path):
        lock.unlink()  # somebody thought that it was stale
        lock.touch()
    assert lock.exists()


def test_refused_ledger_is_not_left_locked(path: Path) -> None:
    path.write_bytes(b"notes\n")
    for _ in range(2):
        with pytest.raises(LedgerError, match="not a vla2 ledger"):
            Ledger.open(path)


FORK = """
import os, sys
from vla2cli.errors import LedgerBusyError
from vla2cli.ledger import Ledger
path = sys.argv[1]
out_r, out_w = os.pipe()
with Ledger.open(path) as ledger:
    ledger.append({"id": "a", "task": "caption"})
    child = os.fork()
    if child:
        os.close(out_w)
        os.waitpid(child, 0) if sys.argv[2] == "wait" else None
        if sys.argv[2] == "wait":
            assert os.path.exists(path + ".lock"), "the child took the lock file away"
            ledger.append({"id": "b", "task": "caption"})
    elif sys.argv[2] == "wait":
        sys.exit(0)  # leaves the with block in the child as well
if child == 0:
    sys.stdin.read()
    os._exit(0)
with Ledger.open(path) as ledger:
    print(len(ledger))
"""


@pytest.mark.parametrize(("mode", "count"), [("wait", "2"), ("go on", "1")])
def test_forked_child_neither_keeps_nor_drops_the_lock(path: Path, mode: str, count: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORK, str(path), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == count
        process.communicate("")


RACE = """
import sys
from vla2cli.errors import LedgerBusyError
from vla2cli.ledger import Ledger
written = 0
while written < 20:
    try:
        with Ledger.open(sys.argv[1]) as ledger:
            ledger.append({"id": f"{sys.argv[2]}-{written}", "task": "caption"})
            written += 1
    except LedgerBusyError:
        pass
"""


def test_processes_that_race_for_the_lock_write_one_after_another(path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(path)]
    processes = [subprocess.Popen([*command, str(i)]) for i in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    ids = [entry["id"] if entry else None for _, entry, _ in read_records(path)]
    assert len(ids) == len(set(ids)) == 80
    assert None not in ids
    assert not beside(path, "lock").exists()


# starting anew


def test_force_renames_the_old_file_to_the_first_free_number(path: Path) -> None:
    for text in ("1", "2", "3"):
        with Ledger.open(path, force=True) as ledger:
            assert len(ledger) == 0
            ledger.append(record("a", text))
    olds = [json.loads(beside(path, f"bak-{n}").read_bytes())["text"] for n in (1, 2)]
    assert olds == ["1", "2"]
    assert not beside(path, "bak-3").exists()
    beside(path, "bak-1").unlink()
    with Ledger.open(path, force=True):
        pass
    assert json.loads(beside(path, "bak-1").read_bytes())["text"] == "3"


def test_force_keeps_a_file_that_is_no_ledger(path: Path) -> None:
    path.write_bytes(b"notes")
    with Ledger.open(path, force=True):
        pass
    assert beside(path, "bak-1").read_bytes() == b"notes"


def test_ledger_and_inputs_import_no_heavy_library() -> None:
    code = "import sys, vla2cli.ledger, vla2cli.inputs; print(*sys.modules)"
    loaded = set(run(code).stdout.split())
    assert "vla2cli.ledger" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "typer", "rich"}


def test_record_of_wrong_types_is_none_and_a_byte_order_mark_no_harm(
    path: Path,
) -> None:
    write(path, record("a"), record("b"))
    first, second = path.read_bytes().splitlines(keepends=True)
    odd = json.dumps({**record("c"), "path": 1, "sha256": {}}).encode() + b"\n"
    path.write_bytes(b"\xef\xbb\xbf" + first + odd + second)
    with Ledger.open(path) as ledger:
        assert len(ledger) == 2
        assert ledger.bad_lines == [2]


HOSTILE = {
    "NaN": b'{"id": "a", "task": "t", "x": [NaN, Infinity, -Infinity]}',
    "huge float": b'{"id": "a", "task": "t", "x": [1e400, -1e400, 1e-400]}',
    "size of 65 bits": b'{"id": "a", "task": "t", "size_bytes": 18446744073709551616}',
    "negative of 65 bits": b'{"id": "a", "task": "t", "mtime_ns": -9223372036854775809}',
    "size that is a float": b'{"id": "a", "task": "t", "size_bytes": 1e3}',
    "size of 64 bits": b'{"id": "a", "task": "t", "size_bytes": 18446744073709551615}',
    "negative of 64 bits": b'{"id": "a", "task": "t", "mtime_ns": -9223372036854775808}',
    "long seed": b'{"id": "a", "task": "t", "seed": 123456789012345678901234567890}',
    "endless number": b'{"id": "a", "task": "t", "seed": ' + b"1" * 5000 + b"}",
    "long fraction": b'{"id": "a", "task": "t", "x": 0.1000000000000000055511151231257827}',
    "minus nought": b'{"id": "a", "task": "t", "x": [-0, -0.0]}',
    "lone surrogate": b'{"id": "a\\udcff", "task": "t", "text": "\\udc00\\ud800"}',
    "pair": b'{"id": "a\\ud83d\\ude00", "task": "t"}',
    "mark in front": b'\xef\xbb\xbf{"id": "a", "task": "t"}',
    "two marks": b'\xef\xbb\xbf\xef\xbb\xbf{"id": "a", "task": "t"}',
    "same name twice": b'{"id": "a", "task": "t", "id": "b", "text": 1, "text": 2}',
    "spaces": b' \t\r{"id" :\t"a" , "task":"t"} \r',
    "odd space": b'\x0c{"id": "a", "task": "t"}',
    "nul": b'{"id": "a", "task": "t"}\0',
    "escaped nul": b'{"id": "a\\u0000", "task": "t"}',
    "control character": b'{"id": "a\x01", "task": "t"}',
    "delete": b'{"id": "a\x7f", "task": "t"}',
    "latin1": b'{"id": "caf\xe9", "task": "t"}',
    "overlong": b'{"id": "\xc0\x80", "task": "t"}',
    "surrogate in bytes": b'{"id": "\xed\xa0\x80", "task": "t"}',
    "beyond unicode": b'{"id": "\xf4\x90\x80\x80", "task": "t"}',
    "UTF-16": '{"id": "a", "task": "t"}'.encode("utf-16"),
    "comma at the end": b'{"id": "a", "task": "t",}',
    "two values": b'{"id": "a", "task": "t"} {}',
    "bare name": b"{id: 1}",
    "true id": b'{"id": true, "task": "t"}',
    "true size": b'{"id": "a", "task": "t", "size_bytes": true}',
    "600 deep": b'{"id": "a", "task": "t", "x": ' + b"[" * 600 + b"]" * 600 + b"}",
    "1010 deep": b'{"id": "a", "task": "t", "x": ' + b"[" * 1010 + b"]" * 1010 + b"}",
    "segment of a word": b'{"id": "a", "task": "t", "segment": {"start_s": "1"}}',
    "segment of 65 bits": b'{"id": "a", "task": "t", "segment": {"start_s": 18446744073709551617}}',
    "turn without question": b'{"id": "a", "task": "t", "history": [{}]}',
    "empty": b"",
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_line_is_a_record_where_python_reads_one_and_the_same(path: Path, line: bytes) -> None:
    expected: Any
    try:
        expected = json.loads(line.decode("utf-8-sig"))
        key_of(expected)
        if not isinstance(expected.get("size_bytes"), int | None):
            expected = None
    except (ValueError, AttributeError, RecursionError):
        expected = None
    path.write_bytes(line + b"\n")
    ((_, found, raw),) = read_records(path)
    assert raw == line + b"\n"
    assert repr(found) == repr(expected)  # 1 and 1.0, nan, and the order of names


def test_settings_too_odd_for_the_fast_writer_are_digested_as_ever() -> None:
    plain = {"generation": {"stop": "a\udcff", "n": 2**70, "x": math.nan}, "seed": 2**64}
    text = json.dumps({**plain, "generation": {**plain["generation"], "x": None}}, sort_keys=True)
    assert settings_digest(plain) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_settings_digest_is_that_of_sorted_json() -> None:
    settings = {"generation": {"b": [1, 1.0, -0.0, 1e22], "a": "é\n"}, "seed": None}
    text = json.dumps(settings, sort_keys=True)
    assert settings_digest(settings) == hashlib.sha256(text.encode()).hexdigest()[:16]
