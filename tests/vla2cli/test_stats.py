"""What a run says of its stages."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from vla2cli.errors import LedgerError, UsageError
from vla2cli.stats import STAGES, Stats, check_stats, write_stats


def test_stage_that_fails_has_worked_too():
    stats = Stats(2)
    with suppress(ValueError), stats.working("tower"):
        time.sleep(0.02)
        raise ValueError("no")
    assert 0.02 <= stats.busy_s["tower"] < 1
    assert stats.busy_s["decode"] == stats.busy_s["language"] == 0


def test_shares_are_of_the_time_that_the_run_took_and_of_all_processes():
    stats = Stats(4)
    stats.start()
    time.sleep(0.05)
    stats.stop()
    stats.busy_s |= {
        "decode": stats.elapsed_s,
        "tower": stats.elapsed_s / 2,
        "language": 9 * stats.elapsed_s,
    }
    assert stats.shares() == pytest.approx({"decode": 1 / 4, "tower": 1 / 2, "language": 1.0})
    assert stats.bottleneck == "language"


def test_stage_is_busy_while_it_works_and_not_only_then():
    stats = Stats(1)
    stats.start()
    with stats.working("language"):
        time.sleep(0.05)
        assert stats.shares()["language"] > 0.9
        assert stats.bottleneck == "language"
    assert 0.05 <= stats.busy_s["language"] <= stats.elapsed_s


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_workers_spent_before_the_run_is_left_out_and_what_they_spend_in_it_counts():
    spend = "import time\nwhile time.process_time() < {}: pass\nprint(flush=True)\ninput()\n"
    code = spend.format(0.6) + spend.format(1.0)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as worker:
        worker.stdout.readline()
        stats = Stats(1)
        stats.start([worker.pid])
        os.write(worker.stdin.fileno(), b"\n")
        worker.stdout.readline()
        alive = stats.summary()["cpu_s"]
    ended = stats.summary()["cpu_s"]
    assert 0.3 <= alive <= ended <= 0.55


def test_time_stands_still_when_the_run_is_over():
    stats = Stats(1)
    assert stats.elapsed_s > 0
    stats.stop()
    before = stats.elapsed_s
    time.sleep(0.01)
    assert stats.elapsed_s == before
    stats.start()
    assert stats.elapsed_s < before + 0.01


def test_summary_is_json_with_all_stages_and_counts():
    stats = Stats(3)
    stats.counts["tokens"] += 7
    sum(i * i for i in range(300_000))  # something to do for one core
    stats.stop()
    summary = json.loads(json.dumps(stats.summary()))
    assert summary["workers"] == 3
    assert set(summary["busy"]) == set(summary["busy_s"]) == set(STAGES)
    assert summary["counts"] == {"tokens": 7}
    assert summary["cpu_s"] >= 0
    assert 0 <= summary["cores_busy"] <= 1.5  # the clock of processor time has coarse ticks
    assert summary["peak_memory_bytes"] > 10e6


def test_statistics_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "stats.json"
    write_stats(path, {"a": 1})
    write_stats(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats.json"]
    with pytest.raises(LedgerError, match=r"^cannot write '.*stats.json': no such file or dir"):
        write_stats(tmp_path / "nowhere/stats.json", {})


def test_file_beside_the_statistics_is_left_alone(tmp_path):
    (tmp_path / "stats.json.part").write_text("mine")
    write_stats(tmp_path / "stats.json", {})
    assert (tmp_path / "stats.json.part").read_text() == "mine"


@pytest.mark.parametrize("name", ["l.jsonl", "l.jsonl.lock", "l.jsonl.torn", "l.jsonl.bak-12"])
@pytest.mark.parametrize("is_linked", [False, True])
def test_statistics_never_go_where_the_output_is(tmp_path, name, is_linked):
    folder = tmp_path
    if is_linked:
        folder = tmp_path / "link"
        folder.symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"belongs to the output"):
        check_stats(folder / name, str(tmp_path / "l.jsonl"))


def test_statistics_replace_nothing_but_earlier_ones(tmp_path):
    ours, ledger = tmp_path / "stats.json", str(tmp_path / "l.jsonl")
    check_stats(ours, ledger)
    check_stats(tmp_path / "l.jsonl.stats", ledger)
    write_stats(ours, Stats(1).summary())
    check_stats(ours, ledger)
    for content in (b"", b"[1]", b'{"id": "a.mp4", "text": "b"}\n', b"\xff\xfe\x00", b"[" * 60_000):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(UsageError, match=r"other' exists and holds no statistics"):
            check_stats(tmp_path / "other", None)
    for path in (tmp_path, tmp_path / "lost"):
        (tmp_path / "lost").is_symlink() or (tmp_path / "lost").symlink_to("nowhere")
        with pytest.raises(UsageError, match=r"exists and holds no statistics"):
            check_stats(path, None)


def test_statistics_need_a_folder_to_write_to(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UsageError, match=r"s.json': there is no folder '.*'; create it$"):
            check_stats(folder / "s.json", None)
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(UsageError, match=r"cannot be written"):
            check_stats(tmp_path / "s.json", None)
