"""What a few seconds show of a folder: a fair sample, bad files, files that are there twice."""

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from vla2cli.forecast import survey as module
from vla2cli.forecast.survey import look_into, sample, spread
from vla2cli.inputs import Item, find_items
from vla2cli.media.pool import DecodePool

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def pool():
    with DecodePool(2) as pool:
        yield pool


@pytest.fixture
def clips(tmp_path):
    """Four clips, two of them the same, another as large as these; a picture; two broken files."""
    for name, source in (("a.mp4", "01.mp4"), ("b.mp4", "02.mp4"), ("p.png", "09.png")):
        shutil.copy(EXAMPLES / source, tmp_path / name)
    (tmp_path / "deep").mkdir()
    shutil.copy(EXAMPLES / "01.mp4", tmp_path / "deep/again.mp4")
    changed = bytearray((EXAMPLES / "01.mp4").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "other.mp4").write_bytes(changed)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").touch()
    return find_items([str(tmp_path)]).items


@pytest.mark.parametrize("number", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("part", [1, 5, 33, 400])
def test_every_beginning_lies_evenly_over_the_whole(number, part):
    order = spread(range(number))
    assert sorted(order) == list(range(number))
    chosen = [0, *sorted(order[:part]), number - 1]
    widest = max(after - before for before, after in pairwise(chosen))
    assert widest <= 2.7 * number / min(part, number) + 1


def test_sample_holds_of_each_kind_and_size_its_share():
    kinds = {"video": 600, "image": 300, "audio": 100}
    items = [Item(f"{kind}{i}", "", kind) for kind, number in kinds.items() for i in range(number)]
    sizes = {item.id: 10 + int(item.id.strip("abcdefghijklmnopqrstuvwxyz")) for item in items}
    chosen = sample(items, sizes)[:100]
    counts = Counter(item.kind for item in chosen)
    for kind, number in kinds.items():
        assert abs(counts[kind] - number / 10) <= 2
        of_kind = [sizes[item.id] for item in chosen if item.kind == kind]
        assert sum(of_kind) / len(of_kind) == pytest.approx(10 + number / 2, rel=0.15)


def test_sample_does_not_depend_on_the_order_of_the_files(clips):
    sizes = {item.id: Path(item.path).stat().st_size for item in clips}
    assert sample(clips, sizes) == sample(clips[::-1], sizes)


def test_bad_files_are_named_with_their_reason(clips, pool):
    found = look_into(clips, pool)
    assert {i: error.kind for i, error in found.unreadable.items()} == {
        "broken.mp4": "decode",
        "empty.mp4": "empty-file",
    }
    assert found.num_unreadable == 2
    assert found.probes.keys() == {item.id for item in clips} - found.unreadable.keys()
    assert found.size_bytes == sum(Path(item.path).stat().st_size for item in clips)


def test_only_files_of_the_same_content_are_duplicates(clips, pool):
    found = look_into(clips, pool)
    assert [set(group) for group in found.duplicates] == [{"a.mp4", "deep/again.mp4"}]
    assert found.uncompared == ()


def test_what_was_not_looked_at_is_estimated_and_counted(clips, pool, monkeypatch):
    whole = look_into(clips, pool)
    monkeypatch.setattr(module, "MAX_PROBED", 4)
    monkeypatch.setattr(module, "MAX_HASHED_BYTES", whole.sizes["a.mp4"] + 1)
    first, second = look_into(clips, pool), look_into(clips, pool)
    assert first.num_probed == 4
    assert first.probes == second.probes
    assert first.unreadable.keys() == second.unreadable.keys()
    assert first.num_unreadable == round(len(clips) * len(first.unreadable) / 4)
    assert first.duplicates == ()
    assert len(first.uncompared) == 2
    assert set(first.uncompared) < {"a.mp4", "deep/again.mp4", "other.mp4"}


def test_length_of_all_is_that_of_the_sample_carried_on(tmp_path, pool, monkeypatch):
    for i in range(6):
        shutil.copy(EXAMPLES / "01.mp4", tmp_path / f"{i}.mp4")
    items = find_items([str(tmp_path)]).items
    whole = look_into(items, pool).duration_s
    monkeypatch.setattr(module, "MAX_PROBED", 2)
    assert look_into(items, pool).duration_s == pytest.approx(whole)
    assert whole == pytest.approx(6 * 5.0, abs=0.6)


def test_a_slow_disk_leaves_files_out_and_the_rest_is_said(clips, pool, monkeypatch):
    monkeypatch.setattr(module, "LIMIT_S", -1.0)
    found = look_into(clips, pool)
    assert 1 <= found.num_probed < len(clips)
