"""Which of several processes does an item, without their asking each other."""

from collections import Counter

import pytest

from vla2cli.errors import UsageError
from vla2cli.inputs import Item
from vla2cli.shards import Shard, parse_shard, shard_of

# from `printf %s ID | sha256sum`, its first 16 digits modulo the number of shards, plus 1
KNOWN = {
    "01.mp4": {1: 1, 2: 1, 3: 3, 4: 1, 7: 7, 1000: 449},
    "a/é.mp4": {1: 1, 2: 1, 3: 2, 4: 1, 7: 5, 1000: 345},
}


@pytest.mark.parametrize("id_", KNOWN)
def test_shard_follows_from_the_hash_of_the_id(id_):
    assert {n: shard_of(id_, n) for n in KNOWN[id_]} == KNOWN[id_]


def test_every_item_is_in_one_shard_whatever_else_is_there():
    items = [Item(f"{i}.mp4", f"x/{i}.mp4", "video") for i in range(100)]
    shards = [Shard(number, 7).select(items) for number in range(1, 8)]
    assert sorted(item.id for shard in shards for item in shard) == sorted(i.id for i in items)
    for number, shard in enumerate(shards, 1):
        moved = [Item(item.id, f"/elsewhere/{item.id}", "image") for item in items[50::-3]]
        assert {i.id for i in Shard(number, 7).select(moved)} == (
            {item.id for item in shard} & {item.id for item in moved}
        )


def test_shards_are_of_about_the_same_size():
    sizes = Counter(shard_of(f"{i:06}.mp4", 8) for i in range(8000))
    # 1000 expected, with a standard deviation of 30
    assert all(850 < sizes[number] < 1150 for number in range(1, 9))


@pytest.mark.parametrize("text", ["1/1", "2/4", "4/4", "04/4", "1/1000000"])
def test_shard_is_a_number_of_a_number(text):
    shard = parse_shard(text)
    assert [shard.number, shard.num_shards] == [int(part) for part in text.split("/")]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "5/4",
            "0/4",
            "1/0",
            "0/0",
            "-1/4",
            "1",
            "",
            "1/",
            "/4",
            "1/2/4",
            "1.0/4",
            " 1/4",
            "1/4\n",
        ),
        *("\u0661/\u0664", f"1/{'9' * 5000}"),
    ],
)
def test_what_is_no_shard_is_refused_in_one_line(text):
    with pytest.raises(UsageError) as caught:
        parse_shard(text)
    assert str(caught.value) == f"'--shard {text}': expected I/N with I from 1 to N, like 2/4"
