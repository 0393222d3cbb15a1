"""Several processes, a shard each, and what they wrote merged into one ledger."""

import json
from functools import partial

import pytest

from tests.e2e.conftest import EXAMPLES, together

NUM_SHARDS = 3
ASK = ("--question", "What moves?", "--then", "Which way?")
# a mean has other last bits in another batch
MAY_DIFFER = ("created", "timings_s", "logprob_mean")


@pytest.fixture(scope="module")
def ran(vla2, tmp_path_factory):
    """One run over the examples, and one for each shard: their folder and their results."""
    place = tmp_path_factory.mktemp("shards")
    ask = partial(vla2, "ask", EXAMPLES, *ASK, "-o")
    calls = {"whole": partial(ask, place / "whole.jsonl")}
    for number in range(1, NUM_SHARDS + 1):
        shard = f"{number}/{NUM_SHARDS}"
        # the flag, or the variable
        env, flags = ({"VLA2_SHARD": shard}, ()) if number == 1 else ({}, ("--shard", shard))
        calls[shard] = partial(ask, place / f"{number}.jsonl", *flags, env=env)
    done = dict(zip(calls, together(*calls.values()), strict=True))
    assert [result.code for result in done.values()] == [0] * 4, done
    return place, done


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fixed(records):
    """What has to be the same, in an order of its own."""
    kept = [{k: v for k, v in record.items() if k not in MAY_DIFFER} for record in records]
    return sorted(kept, key=lambda record: (record["id"], record["question"]))


def test_each_shard_says_and_does_its_own_part(ran):
    place, done = ran
    ids = []
    for number in range(1, NUM_SHARDS + 1):
        mine = {record["id"] for record in read(place / f"{number}.jsonl")}
        shard = f"{number}/{NUM_SHARDS}"
        assert f"shard {shard}: {len(mine)} of 9 items\n" in done[shard].stderr
        ids += mine
    assert sorted(ids) == sorted(path.name for path in EXAMPLES.glob("0*.*"))
    assert "shard" not in done["whole"].stderr


def test_merged_shards_are_the_records_of_one_run(vla2, ran):
    place, _ = ran
    parts = [place / f"{number}.jsonl" for number in range(1, NUM_SHARDS + 1)]
    merged = place / "merged.jsonl"
    done = vla2("merge", *parts, "-o", merged)
    assert (done.code, done.stdout) == (0, "")
    assert done.stderr == f"{merged}: 18 records of 3 ledgers, 18 done, 0 errors\n"
    assert merged.read_bytes() == b"".join(part.read_bytes() for part in parts)
    assert fixed(read(merged)) == fixed(read(place / "whole.jsonl"))
    # the whole run is the same once more: nothing of it is taken
    again, resumed = together(
        partial(vla2, "merge", merged, place / "whole.jsonl", "-o", place / "again.jsonl"),
        partial(vla2, "ask", EXAMPLES, *ASK, "-o", merged),
    )
    assert again.code == 0
    assert (place / "again.jsonl").read_bytes() == merged.read_bytes()
    assert resumed.code == 0
    assert "nothing to do: 18 done\n" in resumed.stderr


def test_empty_shard_has_nothing_to_do_and_is_no_error(vla2, tmp_path):
    # 01.mp4 is in shard 449 of 1000: see tests/vla2cli/test_shards.py
    clip, ledger = EXAMPLES / "01.mp4", tmp_path / "a.jsonl"
    empty, dry = together(
        partial(vla2, "caption", clip, "--shard", "1/1000", "-o", ledger),
        partial(vla2, "caption", clip, "--shard", "449/1000", "--dry-run"),
    )
    assert (empty.code, empty.stdout) == (0, "")
    assert "shard 1/1000: 0 of 1 item\nnothing to do: 0 done\n" in empty.stderr
    assert ledger.read_bytes() == b""
    assert dry.code == 0
    assert [line["id"] for line in dry.records] == ["01.mp4"]


def test_manifest_is_shared_out_by_its_ids(vla2, tmp_path):
    # `printf x | sha256sum` has an even 16th digit, that of d an odd one
    lines = [{"path": "01.mp4", "question": q, "id": i} for q in ("A?", "B?") for i in ("x", "d")]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "01.mp4").symlink_to(EXAMPLES / "01.mp4")
    run = partial(vla2, "ask", "--manifest", manifest, "--dry-run", "--shard")
    first, second = together(partial(run, "1/2"), partial(run, "2/2"))
    assert [[line["id"] for line in done.records] for done in (first, second)] == [["x"], ["d"]]
    assert "shard 2/2: 1 of 2 items\n2 to do" in second.stderr
