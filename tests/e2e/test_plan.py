"""A plan, and the run that it ends with, as real processes."""

import json
import shlex
import shutil

from tests.e2e.conftest import EXAMPLES


def test_printed_command_does_what_was_planned(vla2, make_clips, tmp_path, read_ledger):
    folder, ledger = make_clips(12, name="my clips"), tmp_path / "out.jsonl"
    (folder / "broken.mp4").write_bytes(b"no video")
    shutil.copy(EXAMPLES / "09.png", folder / "p.png")
    before = sorted(tmp_path.rglob("*"))
    planned = vla2("plan", folder, "-o", ledger, "--batch", "2", "--calibrate", "1")
    assert planned.code == 0
    (found,) = planned.records
    assert sorted(tmp_path.rglob("*")) == before
    assert [bad["id"] for bad in found["unreadable"]] == ["broken.mp4"]
    assert ["000.mp4", "008.mp4"] in found["duplicates"]  # there are eight example clips

    program, *arguments = shlex.split(found["command"])
    assert program == "vla2"
    done = vla2(*arguments, "--stats", tmp_path / "stats.json")
    assert done.code == 3
    assert len(read_ledger(ledger)) == found["records"]["todo"] == 14
    predicted = found["predicted"]
    assert abs(predicted["ledger_bytes"] / ledger.stat().st_size - 1) < 0.1
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert abs(predicted["memory_bytes"] / stats["peak_memory_bytes"] - 1) < 0.25

    again = vla2("plan", folder, "-o", ledger, terminals=("stdout",))
    assert again.code == 0
    lines = again.stdout.splitlines()
    assert lines[-1] == shlex.join(["vla2", "caption", str(folder), "--output", str(ledger)])
    assert any("broken.mp4: cannot decode" in line for line in lines)
    assert any("0 records, 13 done before, 1 error from before" in line for line in lines)
