"""A batch: what is left to do, bounded look-ahead, one record each, whatever the batch."""

import hashlib
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_engine, tiny_hub, write_tiny
from vla2_models.sound import SoundWindow
from vla2cli.cache import TokenCache
from vla2cli.config import GenerationChoice
from vla2cli.engine import Engine
from vla2cli.errors import InputError, LedgerError, ModelError, NoInputError, UsageError
from vla2cli.inputs import Item, find_items
from vla2cli.jobs import Job, Totals, decode_ahead
from vla2cli.ledger import Ledger, read_records
from vla2cli.media.pool import DecodePool
from vla2cli.plan import (
    DEFAULT_PROMPT,
    Sampling,
    Task,
    Work,
    count_records,
    key_fields,
    usable_items,
)
from vla2cli.record import row_seed

EXAMPLES = Path(__file__).parents[2] / "examples"
GREEDY = GenerationChoice(max_new_tokens=8)
SAMPLED = GenerationChoice(max_new_tokens=8, temperature=1.0, seed=5)
CAPTION = Task("caption")
QUESTIONS = Task("ask", (("What moves?",), ("What is it?", "Which way does it go?"), ("Why?",)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pool():
    with DecodePool(2) as pool:
        yield pool


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("01.mp4", "05.mp4", "09.png"):
        shutil.copy(EXAMPLES / name, folder / name)
    return folder


def make_job(
    pool, ledger=None, *, engine=None, task=CAPTION, choice=GREEDY, num_frames=8, **options
):
    engine = engine or tiny_engine()
    settings = engine.settings(choice)
    return Job(engine, task, Sampling(num_frames), settings, pool, ledger, **options)


def run(job, folder, **kwargs):
    """Run what is to do; return the plan's counts: to do, done, failed."""
    plan = job.plan(find_items([str(folder)]).items, **kwargs)
    list(job.run(plan.todo))
    return tuple(count_records(works) for works in (plan.todo, plan.done, plan.failed))


# what is left to do


def test_what_is_done_is_skipped_until_something_changes(pool, clips, tmp_path):
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        assert run(make_job(pool, ledger), clips) == (3, 0, 0)
        assert run(make_job(pool, ledger, batch=2), clips) == (0, 3, 0)

        os.utime(clips / "01.mp4")  # touched, the same content
        assert run(make_job(pool, ledger), clips) == (0, 3, 0)
        shutil.copy(EXAMPLES / "02.mp4", clips / "01.mp4")
        assert run(make_job(pool, ledger), clips) == (1, 2, 0)
        shutil.copy(EXAMPLES / "03.mp4", clips / "new.mp4")
        assert run(make_job(pool, ledger), clips) == (1, 3, 0)

        longer = GenerationChoice(max_new_tokens=9)
        assert run(make_job(pool, ledger, choice=longer), clips) == (4, 0, 0)
        # a picture stands for as many frames as the checkpoint says, whatever is asked for
        assert run(make_job(pool, ledger, choice=longer, num_frames=4), clips) == (3, 1, 0)
        assert run(make_job(pool, ledger, choice=SAMPLED), clips) == (4, 0, 0)
        again = GenerationChoice(max_new_tokens=8, temperature=1.0, seed=6)
        assert run(make_job(pool, ledger, choice=again), clips) == (4, 0, 0)
        assert run(make_job(pool, ledger, choice=again), clips) == (0, 4, 0)


def test_other_weights_do_everything_again(pool, clips, tmp_path):
    other = Engine.load(str(write_tiny(tmp_path / "hub", seed=1)), hub_dir=tmp_path / "hub")
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        run(make_job(pool, ledger), clips)
        assert run(make_job(pool, ledger, engine=other), clips) == (3, 0, 0)


def test_same_weights_under_another_path_do_nothing_again(pool, clips, tmp_path):
    folder = next(path.parent for path in tiny_hub().glob("*/*/model.safetensors"))
    moved = shutil.copytree(folder, tmp_path / "moved")
    engine = Engine.load(str(moved), hub_dir=tiny_hub(), device="cpu")
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        run(make_job(pool, ledger), clips)
        assert run(make_job(pool, ledger, engine=engine), clips) == (0, 3, 0)


def test_errors_stay_until_they_are_to_be_tried_again(pool, clips, tmp_path):
    (clips / "bad.mp4").write_text("no video")
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        assert run(make_job(pool, ledger), clips) == (4, 0, 0)
        assert run(make_job(pool, ledger), clips) == (0, 3, 1)
        assert run(make_job(pool, ledger), clips, retry_errors=True) == (1, 3, 0)
        shutil.copy(EXAMPLES / "02.mp4", clips / "bad.mp4")  # a changed file is tried by itself
        assert run(make_job(pool, ledger), clips) == (1, 3, 0)
        assert run(make_job(pool, ledger), clips) == (0, 4, 0)


def test_conversation_of_which_a_turn_is_missing_is_had_again(pool, clips, tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        assert run(make_job(pool, ledger, task=QUESTIONS), clips) == (12, 0, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    second = next(i for i, line in enumerate(lines) if b'"Which way does it go?"' in line)
    path.write_bytes(b"".join(lines[:second] + lines[second + 1 :]))
    with Ledger.open(path) as ledger:
        assert run(make_job(pool, ledger, task=QUESTIONS), clips) == (2, 10, 0)


def test_file_that_is_gone_and_was_an_error_is_not_hashed(pool, tmp_path):
    item = Item("gone.mp4", str(tmp_path / "gone.mp4"), "video")
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        job = make_job(pool, ledger)
        (record,) = job.run(job.plan([item]).todo)
        assert record["error"] == {"kind": "missing", "stage": "open", "message": "no such file"}
        assert (record["size_bytes"], record["sha256"]) == (None, None)
        assert job.plan([item]).failed == (
            Work(item, job.task.conversations_about(item, item.kind)),
        )


def test_failed_file_is_recorded_as_it_was_when_it_was_read(pool, clips, tmp_path):
    whole = (clips / "05.mp4").read_bytes()
    growing = clips / "05.mp4"
    growing.write_bytes(whole[: len(whole) // 2])
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        job = make_job(pool, ledger)
        items = [item for item in find_items([str(clips)]).items if item.id == "05.mp4"]
        plan = job.plan(items)
        ((work, found),) = next(job.clips(plan.todo, should_stop=lambda: False))
        growing.write_bytes(whole)  # the copy ends while the record waits for its turn
        if isinstance(found, InputError):
            for record in job.failures(work, found, found.state):
                ledger.append(record)
                assert record["size_bytes"] == len(whole) // 2
                assert record["sha256"] == hashlib.sha256(whole[: len(whole) // 2]).hexdigest()
        assert job.plan(items).todo


@pytest.mark.parametrize("content", [b"no video", b""], ids=["text", "empty"])
def test_touched_broken_file_is_not_tried_again(pool, clips, tmp_path, content):
    (clips / "bad.mp4").write_bytes(content)
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        run(make_job(pool, ledger), clips)
        os.utime(clips / "bad.mp4", ns=(1, 1))
        assert run(make_job(pool, ledger), clips) == (0, 3, 1)


def test_failed_turn_leaves_the_same_question_asked_alone_untouched(pool, clips, tmp_path):
    class Deaf(Engine):
        """Fails at a question that comes first in a conversation."""

        def ask(self, ask, settings, **more):
            if ask.question == "A?":
                raise RuntimeError("out of order")
            return super().ask(ask, settings, **more)

    engine = Deaf(tiny_engine().checkpoint, device="cpu")
    alone, after = Task("ask", (("B?",),)), Task("ask", (("A?", "B?", "C?"),))
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        run(make_job(pool, ledger, engine=engine, task=alone), clips)
        assert run(make_job(pool, ledger, engine=engine, task=after), clips) == (9, 0, 0)
        assert run(make_job(pool, ledger, engine=engine, task=alone), clips) == (0, 3, 0)
        assert run(make_job(pool, ledger, engine=engine, task=after), clips) == (0, 0, 9)


def test_file_of_another_folder_does_not_take_the_place_of_its_namesake(pool, tmp_path):
    for folder, example in (("a", "01.mp4"), ("b", "02.mp4")):
        (tmp_path / folder).mkdir()
        shutil.copy(EXAMPLES / example, tmp_path / folder / "c.mp4")
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        assert run(make_job(pool, ledger), tmp_path / "a") == (1, 0, 0)
        with pytest.raises(UsageError, match=r"would replace the record of another file"):
            run(make_job(pool, ledger), tmp_path / "b")
        (tmp_path / "a").rename(tmp_path / "moved")
        assert run(make_job(pool, ledger), tmp_path / "moved") == (0, 1, 0)


def test_stop_is_heard_between_two_questions_of_one_clip(pool, clips):
    many = Task("ask", tuple((f"What is {i}?",) for i in range(20)))
    job = make_job(pool, task=many)
    items = find_items([str(clips / "01.mp4")]).items
    seen = []
    for record in job.run(job.plan(items).todo, should_stop=lambda: len(seen) >= 2):
        seen.append(record)
    # those in hand are finished: one that waits to be taken, one that is answered, and the next
    assert 2 <= len(seen) <= 5


# the same texts, whatever the batch


def texts(job, paths):
    records = list(job.run(job.plan(find_items(list(map(str, paths))).items).todo))
    assert all("text" in record for record in records), records
    return {
        (r["id"], r["question"], len(r.get("history", []))): (r["text"], r["tokens"])
        for r in records
    }


@pytest.mark.parametrize("choice", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("task", [CAPTION, QUESTIONS], ids=["caption", "ask"])
def test_neither_batch_nor_overlap_changes_a_text(pool, task, choice):
    single = texts(make_job(pool, task=task, choice=choice, overlap=False), [EXAMPLES])
    assert len(single) == 9 * (1 if task is CAPTION else 4)
    for batch, overlap in ((1, True), (3, True), (8, True), (8, False)):
        job = make_job(pool, task=task, choice=choice, batch=batch, overlap=overlap)
        assert texts(job, [EXAMPLES]) == single


def test_sampling_depends_on_the_seed_and_on_no_neighbour(pool):
    alone = texts(make_job(pool, choice=SAMPLED), [EXAMPLES / "05.mp4"])
    among = texts(make_job(pool, choice=SAMPLED), [EXAMPLES])
    key = ("05.mp4", DEFAULT_PROMPT.format(medium="video"), 0)
    assert alone[key] == among[key]
    other = GenerationChoice(max_new_tokens=8, temperature=1.0, seed=6)
    assert texts(make_job(pool, choice=other), [EXAMPLES / "05.mp4"])[key] != alone[key]
    greedy = texts(make_job(pool), [EXAMPLES / "05.mp4"])
    assert greedy[key] != alone[key]


def test_same_clip_under_two_names_is_drawn_apart(pool, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(EXAMPLES / "05.mp4", tmp_path / name)
    first, second = texts(make_job(pool, choice=SAMPLED, batch=2), [tmp_path]).values()
    assert first != second


def test_row_seed_depends_on_key_and_seed_alone():
    item = Item("a.mp4", "x/a.mp4", "video")
    key = key_fields(QUESTIONS, Sampling(8), item, ("What?", "Why?"), 1)
    seed = row_seed(0, key)
    assert seed == row_seed(0, {**dict(reversed(key.items())), "text": "x", "path": "y"})
    assert 0 <= seed < 2**63
    others = [
        row_seed(1, key),
        row_seed(0, {**key, "id": "b.mp4"}),
        row_seed(0, {**key, "question": "Who?"}),
        row_seed(0, {**key, "history": []}),
        row_seed(0, {**key, "segment": {"start_s": 1.0, "end_s": None}}),
    ]
    assert len({seed, *others}) == 6


# one record each


def test_every_record_is_in_the_ledger_before_it_is_yielded(pool, clips, tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        job = make_job(pool, ledger, batch=2)
        for number, record in enumerate(job.run(job.plan(find_items([str(clips)]).items).todo), 1):
            written = [line for _, line, _ in read_records(path)]
            assert len(written) == number
            assert written[-1] == record


def test_run_that_is_asked_to_stop_ends_after_the_records_in_hand(pool):
    job = make_job(pool, batch=1)
    works = job.plan(find_items([str(EXAMPLES)]).items).todo
    records = []
    for record in job.run(works, should_stop=lambda: len(records) >= 1):
        records.append(record)
    assert 1 <= len(records) < len(works)


# stages that work at the same time


def stages():
    return [t.name for t in threading.enumerate() if t.name in ("encode", "ask")]


@pytest.mark.parametrize("overlap", [None, True, False], ids=["default", "on", "off"])
def test_stages_have_threads_of_their_own_unless_overlap_is_off(pool, overlap):
    job = make_job(pool) if overlap is None else make_job(pool, overlap=overlap)
    seen = [sorted(stages()) for _ in job.run(job.plan(find_items([str(EXAMPLES)]).items).todo)]
    assert seen[0] == ([] if overlap is False else ["ask", "encode"])
    assert stages() == []


@pytest.mark.parametrize("num_taken", [0, 1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_run_that_is_left_early_leaves_no_thread_and_a_whole_ledger(
    pool, tmp_path, batch, num_taken
):
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        job = make_job(pool, ledger, task=QUESTIONS, batch=batch)
        records = job.run(job.plan(find_items([str(EXAMPLES)]).items).todo)
        taken = list(itertools.islice(records, num_taken))
        records.close()
        assert stages() == []
        assert [record for _, record, _ in read_records(path)] == taken
    with Ledger.open(path) as ledger:
        run(make_job(pool, ledger, task=QUESTIONS, batch=8), EXAMPLES)
        assert run(make_job(pool, ledger, task=QUESTIONS), EXAMPLES) == (0, 36, 0)


def test_front_end_that_takes_longer_than_decoding_has_the_cores(pool, tmp_path):
    found = []

    class Slow(Engine):
        """Notes how many threads it has for a batch, and takes its time."""

        def encode(self, clips):
            found.append(torch.get_num_threads())
            time.sleep(0.5)
            return super().encode(clips)

    for i in range(8):
        (tmp_path / f"{i}.mp4").symlink_to(EXAMPLES / "01.mp4")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        engine = Slow(tiny_engine().checkpoint, device="cpu", dtype="float32")
        assert run(make_job(pool, engine=engine, batch=1), tmp_path) == (8, 0, 0)
    finally:
        torch.set_num_threads(before)
    # at the first the decoders are busy; the language model may have a share of any
    assert sum(n >= 2 for n in found[1:]) >= 4


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process")
@pytest.mark.parametrize("overlap", [True, False])
def test_run_that_is_left_early_waits_for_no_file(overlap):
    with DecodePool(1) as pool:
        job = make_job(pool, overlap=overlap)
        records = job.run(job.plan(find_items([str(EXAMPLES)]).items).todo)
        next(records)
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        records.close()
        assert time.monotonic() - started < 10  # of 60 s that a file may take
        assert stages() == []


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", ["encode", "language_engine", "read"])
def test_error_of_the_model_ends_the_run_with_that_error(pool, tmp_path, stage, overlap):
    num_left = 0 if stage == "language_engine" else 3

    class Broken(Engine):
        """Its weights go when it has done some of it."""

    def fail(self, *args, **kwargs):
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise ModelError("the weights are gone")
        return getattr(super(Broken, self), stage)(*args, **kwargs)

    setattr(Broken, stage, fail)
    engine = Broken(tiny_engine().checkpoint, device="cpu")
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        job = make_job(pool, ledger, engine=engine, overlap=overlap)
        works = job.plan(find_items([str(EXAMPLES)]).items).todo
        with pytest.raises(ModelError, match="the weights are gone"):
            list(job.run(works))
        assert stages() == []
        assert len(list(read_records(path))) <= 3


@pytest.mark.parametrize("overlap", [True, False])
def test_ledger_that_cannot_be_written_ends_the_run(pool, overlap):
    class Full:
        def append(self, record):
            raise LedgerError("no space left on device")

    job = make_job(pool, Full(), overlap=overlap)
    works = make_job(pool).plan(find_items([str(EXAMPLES)]).items).todo
    with pytest.raises(LedgerError):
        list(job.run(works))
    assert stages() == []


@pytest.mark.parametrize("overlap", [True, False])
def test_bad_files_among_good_ones_cost_their_records_alone(pool, tmp_path, overlap):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(12):
        shutil.copy(EXAMPLES / "05.mp4", folder / f"{i:02}.mp4")
        (folder / f"{i:02}-bad.mp4").write_text("no video")
    job = make_job(pool, task=QUESTIONS, batch=8, overlap=overlap)
    records = list(job.run(job.plan(find_items([str(folder)]).items).todo))
    assert len(records) == 24 * 4
    assert all(("error" in record) == ("bad" in record["id"]) for record in records)
    good = [record for record in records if "text" in record]
    # the same clip, so the same text to each of the four questions
    assert len({(record["question"], record["text"]) for record in good}) == 4


def test_clip_that_cannot_be_encoded_costs_one_record(pool):
    class Blind(Engine):
        """Fails at a batch with a picture in it."""

        def encode(self, clips):
            if any(clip.kind == "image" for clip in clips):
                raise RuntimeError("no pictures")
            return super().encode(clips)

    engine = Blind(tiny_engine().checkpoint, device="cpu")
    job = make_job(pool, engine=engine, batch=4)
    records = list(job.run(job.plan(find_items([str(EXAMPLES)]).items).todo))
    failed = {record["id"]: record["error"] for record in records if "error" in record}
    assert len(records) == 9
    assert set(failed) == {path.name for path in EXAMPLES.glob("*.png")}
    assert {error["stage"] for error in failed.values()} == {"encode"}


def test_shortage_of_memory_is_said_once_and_the_next_batches_are_smaller(pool, tmp_path):
    tried, said = [], []

    class Small(Engine):
        """Has memory for two clips."""

        def encode(self, clips):
            tried.append(len(clips))
            if len(clips) > 2:
                raise MemoryError
            return super().encode(clips)

    for i in range(16):
        shutil.copy(EXAMPLES / "05.mp4", tmp_path / f"{i:02}.mp4")
    engine = Small(tiny_engine().checkpoint, device="cpu")
    job = make_job(pool, engine=engine, batch=8, say=said.append)
    records = list(job.run(job.plan(find_items([str(tmp_path)]).items).todo))
    assert len({record["text"] for record in records}) == 1
    assert len(records) == 16
    assert tried == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2]
    assert said == ["out of memory: encoding 4 clips at a time, or fewer"]


# clips that were encoded before


def run_cached(pool, folder, cache, **options):
    """Run over a folder; return its texts and what was counted."""
    job = make_job(pool, cache=cache, **options)
    return texts(job, [folder]), job.stats.counts


@pytest.mark.parametrize("overlap", [True, False])
def test_second_run_decodes_and_encodes_nothing_and_says_the_same(tmp_path, overlap):
    cache = TokenCache.open(tmp_path / "tokens", 10**9)
    with DecodePool(3) as pool:
        plain, _ = run_cached(pool, EXAMPLES, None, task=QUESTIONS, batch=3)
        options = {"task": QUESTIONS, "batch": 3, "overlap": overlap}
        first, counts = run_cached(pool, EXAMPLES, cache, **options)
        assert (counts["decoded"], counts["encoded"], counts["recalled"]) == (9, 9, 0)
        again, counts = run_cached(pool, EXAMPLES, cache, **options)
        assert (counts["decoded"], counts["encoded"], counts["recalled"]) == (0, 0, 9)
        assert again == first == plain
        caption, counts = run_cached(pool, EXAMPLES, cache)  # of the same clips
        assert (counts["decoded"], counts["recalled"]) == (0, 9)
        assert caption == run_cached(pool, EXAMPLES, None)[0]


def test_clip_of_a_spoiled_entry_alone_is_decoded_and_encoded_again(pool, clips, tmp_path):
    cache = TokenCache.open(tmp_path / "tokens", 10**9)
    before, _ = run_cached(pool, clips, cache)
    spoiled = next((tmp_path / "tokens").glob("??/*.safetensors"))
    spoiled.write_bytes(spoiled.read_bytes()[:-1])
    after, counts = run_cached(pool, clips, cache)
    assert (counts["decoded"], counts["encoded"], counts["recalled"]) == (1, 1, 2)
    assert after == before


def test_other_frames_of_a_clip_are_another_entry(pool, clips, tmp_path):
    cache = TokenCache.open(tmp_path / "tokens", 10**9)
    run_cached(pool, clips, cache)
    _, counts = run_cached(pool, clips, cache, num_frames=4)
    assert (counts["decoded"], counts["recalled"]) == (3, 0)


def test_file_that_changes_while_it_is_read_is_not_kept(pool, clips, tmp_path):
    class Late(TokenCache):
        """The file that is asked about changes after it was hashed."""

        def get(self, key, state):
            with (clips / "01.mp4").open("ab") as file:
                file.write(b"more")
            return super().get(key, state)

    for name in ("05.mp4", "09.png"):
        (clips / name).unlink()
    folder = tmp_path / "tokens"
    _, counts = run_cached(pool, clips, Late.open(folder, 10**9))
    assert (counts["decoded"], counts["encoded"]) == (1, 1)
    assert not [path for path in folder.rglob("*") if path.stat().st_size > 1000]
    for recalled in (0, 1):
        _, counts = run_cached(pool, clips, TokenCache.open(folder, 10**9))
        assert counts["recalled"] == recalled


def test_changed_file_is_not_taken_for_what_it_was(pool, clips, tmp_path):
    cache = TokenCache.open(tmp_path / "tokens", 10**9)
    before, _ = run_cached(pool, clips, cache)
    shutil.copy(EXAMPLES / "02.mp4", clips / "01.mp4")
    after, counts = run_cached(pool, clips, cache)
    assert (counts["decoded"], counts["recalled"]) == (1, 2)
    assert after == run_cached(pool, clips, None)[0] != before


def test_bad_file_is_an_error_with_a_cache_too(pool, clips, tmp_path):
    (clips / "bad.mp4").write_text("no video")
    cache = TokenCache.open(tmp_path / "tokens", 10**9)
    for _ in range(2):
        job = make_job(pool, cache=cache)
        records = list(job.run(job.plan(find_items([str(clips)]).items).todo))
        assert [r["id"] for r in records if "error" in r] == ["bad.mp4"]


# decoding ahead


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_ahead_holds_few_clips_and_yields_all(pool, batch):
    # the same file under many names; the works are taken only as they are needed
    taken = 0

    def works():
        nonlocal taken
        for i in range(30):
            taken += 1
            yield Work(Item(f"{i}", str(EXAMPLES / "07.mp4"), "video"), ())

    geometry = tiny_engine().geometry
    seen = []
    for outcomes in decode_ahead(
        works(),
        lambda item: pool.submit(Sampling(2).request(item, geometry, None)),
        batch=batch,
        lookahead=batch + 4,
        should_stop=lambda: False,
    ):
        assert 1 <= len(outcomes) <= batch
        seen += [work.item.id for work, clip in outcomes if len(clip.frames) == 2]
        # what is decoded while these are looked at
        assert taken == 30 or 4 <= taken - len(seen) <= batch + 4
    assert sorted(seen, key=int) == [str(i) for i in range(30)]


# small helpers


@pytest.mark.parametrize("medium", ["video", "image", "audio"])
def test_default_prompt_names_the_medium(medium):
    assert CAPTION.conversations_about(Item("a", "a", medium), medium) == (
        (f"Please describe the {medium} in detail.",),
    )


def test_questions_do_not_depend_on_the_medium():
    assert (
        QUESTIONS.conversations_about(Item("a", "a", "image"), "image") == QUESTIONS.conversations
    )


def test_segment_is_null_for_pictures_and_whole_files():
    video, image = Item("a", "a", "video"), Item("b", "b", "image")
    assert Sampling(8).segment_of(video) is None
    part = Sampling(8, start_s=1.0)
    assert part.segment_of(video) == {"start_s": 1.0, "end_s": None}
    assert part.segment_of(image) is None
    assert part.segment_of(replace(image, end_s=2.0)) is None


def test_range_of_an_item_goes_before_that_of_all():
    video, song = (Item("a", "a", kind, end_s=2.0) for kind in ("video", "audio"))
    for sampling in (Sampling(8), Sampling(8, 1.0, 9.0), Sampling(8, audio_range="whole")):
        # also the sound's: of a sound file the range is all that there is
        for item in (video, song):
            assert sampling.segment_of(item) == {"start_s": None, "end_s": 2.0}
        request = sampling.request(video, None, SoundWindow())
        assert (request.start_s, request.end_s) == (None, 2.0)
        is_whole = sampling.audio_range == "whole"
        assert request.sound.end_s == (None if is_whole else 2.0)
        assert sampling.request(song, None, SoundWindow()).sound.end_s == 2.0
    later = Item("a", "a", "audio", start_s=3.0)
    assert Sampling(8).sound_fields(later, SoundWindow()) == {"audio_start_s": 3.0}


def test_two_ranges_of_a_file_are_two_records_and_the_file_is_hashed_once(pool, clips, tmp_path):
    ends = [(None, 1.0), (1.0, 2.0), (2.0, None)]
    whole = Item("01.mp4", str(clips / "01.mp4"), "video")
    parts = [replace(whole, start_s=start_s, end_s=end_s) for start_s, end_s in ends]
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        job = make_job(pool, ledger)
        records = job.run(job.plan(parts[:2]).todo)
        times = {tuple(r["segment"].values()): r["frames"]["timestamps_s"] for r in records}
        assert set(times) == set(ends[:2])
        # upstream counts the frame before the start to the range: these have ten a second
        assert max(times[ends[0]]) < 1.0
        assert 0.85 < min(times[ends[1]]) <= max(times[ends[1]]) < 2.0
        assert [work.item for work in job.plan([whole, *parts]).todo] == [whole, parts[2]]
        os.utime(clips / "01.mp4", ns=(1, 1))
        counting = _Counting(pool)
        again = make_job(counting, ledger).plan(parts)
        assert (len(again.done), counting.hashed) == (2, [whole.path])


class _Counting:
    """A pool that remembers what it was to hash."""

    def __init__(self, pool):
        self.num_workers = pool.num_workers
        self.pool, self.hashed = pool, []

    def submit_hash(self, path):
        self.hashed.append(path)
        return self.pool.submit_hash(path)


def test_range_behind_the_end_is_an_error_record_that_says_how_long_the_file_is(pool, clips):
    late = Item("01.mp4", str(clips / "01.mp4"), "video", start_s=7.0, end_s=9.5)
    job = make_job(pool)
    (record,) = job.run(job.plan([late]).todo)
    assert record["error"] == {
        "kind": "out-of-range",
        "stage": "decode",
        "message": "no frame between 7 s and 9.5 s: the video is 5.00 s long (50 frames)",
    }
    assert record["segment"] == {"start_s": 7.0, "end_s": 9.5}


def test_start_of_the_sound_and_ranges_of_items_exclude_each_other(pool):
    part = Item("a.wav", "a.wav", "audio", start_s=1.0)
    engine = tiny_engine()
    sampling = Sampling(8, audio_start_s=2.0)
    job = Job(engine, CAPTION, sampling, engine.settings(GREEDY), pool)
    with pytest.raises(UsageError, match=r"'--audio-start 2': 'a\.wav' has a range of its own"):
        job.plan([part])


def test_generation_holds_what_decides_the_sound_and_nothing_else():
    video, song, image = (Item(kind, kind, kind) for kind in ("video", "audio", "image"))
    public, short = SoundWindow(), SoundWindow(4.0, 1, 4.0)

    def fields(item, window=public, **sampling):
        return Sampling(8, **sampling).sound_fields(item, window)

    assert fields(video) == {"modality": "auto"}
    assert fields(video, modality="av") == {"modality": "av"}
    assert fields(video, audio_range="whole") == fields(video)
    assert fields(video, end_s=2.0, audio_range="whole") != fields(video, end_s=2.0)
    assert fields(song) == fields(song, audio_start_s=0.0) == {"audio_start_s": 0.0}
    assert fields(song, start_s=3.0) == fields(song, start_s=3.0, audio_start_s=3.0)
    assert fields(video, modality="audio") == fields(song)
    assert fields(image) == fields(video, modality="video") == fields(video, None) == {}
    window = {"duration_s": 4.0, "num_clips": 1, "clip_s": 4.0}
    assert fields(song, short)["sound_window"] == window


def test_nothing_usable_is_said(pool):
    song, video = Item("a.wav", "a.wav", "audio"), Item("b.mp4", "b.mp4", "video")
    with pytest.raises(NoInputError, match="only audio files were found; this model has no audio"):
        usable_items([song], pool, "auto", has_ears=False)
    assert usable_items([song, video], pool, "auto", has_ears=False) == [video]
    assert usable_items([song, video], pool, "auto", has_ears=True) == [song, video]


def test_kinds_that_names_do_not_tell_are_looked_up(pool, tmp_path):
    picture, video, text = (str(tmp_path / name) for name in ("picture", "video", "text"))
    shutil.copy(EXAMPLES / "09.png", picture)
    shutil.copy(EXAMPLES / "05.mp4", video)
    Path(text).write_text("neither")
    items = [Item(path, path, "unknown") for path in (picture, video, text)]
    kinds = [item.kind for item in usable_items(items, pool, "auto", has_ears=False)]
    assert kinds == ["image", "video", "video"]  # what is neither becomes an error later


def test_totals_count_texts_errors_and_flags():
    totals = Totals()
    for record in (
        {"text": "A car.", "flags": ["builtin-model"]},
        {"text": "", "flags": ["empty", "builtin-model"]},
        {"error": {"kind": "decode"}, "flags": []},
    ):
        totals.add(record)
    assert (totals.done, totals.errors, dict(totals.flagged)) == (2, 1, {"empty": 1})
    works = [Work(Item("a", "a", "video"), (("x",), ("y", "z")))]
    assert count_records(works) == 3
