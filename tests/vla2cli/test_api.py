"""The tool from Python."""

from pathlib import Path

import pytest

import vla2cli
from tests.tiny import tiny_engine
from vla2cli import ask, caption
from vla2cli.config import GenerationChoice
from vla2cli.errors import LedgerBusyError, NoInputError, UsageError
from vla2cli.ledger import Ledger, read_records
from vla2cli.plan import Sampling

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = GenerationChoice(max_new_tokens=6)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_caption_yields_what_it_writes_and_skips_it_the_next_time(tmp_path):
    ledger = tmp_path / "captions.jsonl"
    paths = [EXAMPLES / "01.mp4", EXAMPLES / "09.png"]
    records = list(caption(paths, tiny_engine(), generation=SHORT, output=ledger))
    assert {record["id"] for record in records} == {"01.mp4", "09.png"}
    assert all(record["text"] and record["tokens"]["new"] == 6 for record in records)
    assert [record for _, record, _ in read_records(ledger)] == records
    assert list(caption(paths, tiny_engine(), generation=SHORT, output=ledger)) == []
    (new,) = caption(EXAMPLES / "0[1-2].mp4", tiny_engine(), generation=SHORT, output=ledger)
    assert new["id"] == "02.mp4"
    assert len(list(read_records(ledger))) == 3


def test_caption_takes_a_prompt_and_part_of_a_clip():
    (record,) = caption(
        str(EXAMPLES / "01.mp4"),
        tiny_engine(),
        prompt="Be brief.",
        sampling=Sampling(4, start_s=1.0, end_s=2.0),
        generation=SHORT,
    )
    assert record["question"] == "Be brief."
    assert record["segment"] == {"start_s": 1.0, "end_s": 2.0}
    assert len(record["frames"]["indices"]) == 4


def test_ask_asks_each_question_once_of_each_file():
    clip = EXAMPLES / "05.mp4"
    (alone,) = ask(clip, "What swings?", tiny_engine(), generation=SHORT)
    both = list(
        ask([clip], ["What swings?", "Why?", "What swings?"], tiny_engine(), generation=SHORT)
    )
    assert [record["question"] for record in both] == ["What swings?", "Why?"]
    assert both[0]["text"] == alone["text"]
    assert all(record["task"] == "ask" for record in both)


def test_bad_file_is_a_record_and_bad_usage_an_exception(tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    (record,) = caption(tmp_path, tiny_engine(), generation=SHORT)
    assert record["error"]["kind"] == "decode"
    with pytest.raises(UsageError, match="does not exist"):
        list(caption(tmp_path / "gone.mp4", tiny_engine()))
    (tmp_path / "bad.mp4").unlink()
    with pytest.raises(NoInputError):
        list(caption(tmp_path, tiny_engine()))
    with (
        Ledger.open(tmp_path / "ledger.jsonl"),
        pytest.raises(LedgerBusyError, match=r"is being written by process \d+"),
    ):
        list(caption(EXAMPLES, tiny_engine(), output=tmp_path / "ledger.jsonl"))


def test_reader_that_leaves_gives_the_lock_back(tmp_path):
    ledger = tmp_path / "captions.jsonl"
    records = caption(EXAMPLES, tiny_engine(), generation=SHORT, output=ledger)
    first = next(records)
    records.close()
    with Ledger.open(ledger) as again:
        assert len(again) == 1
    assert first["text"]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vla2cli.nothing
