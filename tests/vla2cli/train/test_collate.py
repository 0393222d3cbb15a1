import pytest
import torch

from vla2cli.train.collate import Collator, pack_rows
from vla2cli.train.conversation import IGNORED, Row
from vla2cli.train.media import Media
from vla2cli.train.samples import Sample, Skipped

MEDIA, OTHER = Media(), Media()


def row(*ids, learned=1):
    """A row whose last `learned` tokens are learned."""
    labels = [IGNORED] * (len(ids) - learned) + list(ids[len(ids) - learned :])
    return Row(ids, tuple(labels))


def sample(*rows, ids=None, **more):
    return Sample(ids or tuple(f"s{i}" for i in range(len(rows))), rows, MEDIA, **more)


def test_rows_are_padded_on_the_right():
    batch = Collator(9, max_length=8)([sample(row(1, -201, 2, 3)), sample(row(4, 5))])
    assert batch["input_ids"].tolist() == [[1, -201, 2, 3], [4, 5, 9, 9]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 3], [-100, 5, -100, -100]]
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["media"] == [MEDIA, MEDIA]
    assert batch["skipped"] == []
    assert "segments" not in batch


def test_a_word_that_is_the_padding_s_stays_in_sight():
    batch = Collator(5, max_length=8)([sample(row(1, 5, 2))])
    assert batch["attention_mask"].all()


def test_a_conversation_is_cut_before_the_splice():
    batch = Collator(0, max_length=3)([sample(row(1, -201, 2, 3, 4, learned=3))])
    assert batch["input_ids"].tolist() == [[1, -201, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 2]]


@pytest.mark.parametrize(
    ("long", "reason"),
    [
        (row(1, 2, 3, -201, 4), "its medium comes after the 3 tokens"),
        (row(1, -201, 2, 3, 4), "no answer begins within the 3 tokens"),
        (row(1, 2, learned=0), "no answer begins within"),
    ],
    ids=["medium", "answer", "nothing"],
)
def test_a_cut_that_leaves_nothing_to_learn_is_a_named_skip(long, reason):
    batch = Collator(0, max_length=3)([sample(long, row(7, 8), ids=("long", "short"))])
    assert batch["input_ids"].tolist() == [[7, 8]]
    ((name, why),) = batch["skipped"]
    assert name == "long"
    assert reason in why


def test_all_that_was_left_out_is_listed():
    items = [
        Skipped("a", "it is gone"),
        sample(row(1, 2), ids=("b",), skipped=(Skipped("c", "odd"),)),
    ]
    assert Collator(0, max_length=9)(items)["skipped"] == [("a", "it is gone"), ("c", "odd")]


@pytest.mark.parametrize("pack", [1, 2])
def test_a_batch_of_nothing_has_one_row_that_teaches_nothing(pack):
    batch = Collator(3, max_length=9, pack=pack)([Skipped("a", "it is gone")])
    assert batch["input_ids"].tolist() == [[3]]
    assert batch["labels"].tolist() == [[-100]]
    assert [medium.pixel_values for medium in batch["media"]] == [None]


def test_conversations_share_the_tokens_up_to_their_medium():
    rows = [row(1, -201, 2, 3), row(1, -201, 4), row(1, -201, 5, 6, 7)]
    batch = Collator(0, max_length=9, pack=2)([sample(*rows)])
    assert batch["input_ids"].tolist() == [[1, -201, 2, 3, 4], [1, -201, 5, 6, 7]]
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 3, 4], [-100, -100, -100, -100, 7]]
    assert batch["media"] == [MEDIA, MEDIA]


def test_conversations_with_another_beginning_are_not_packed():
    packed = pack_rows([row(1, -201, 2), row(3, -201, 4), row(3, -201, 5)], 3)
    assert [row.input_ids for row in packed] == [[1, -201, 2], [3, -201, 4, 5]]


def test_a_beginning_that_is_learned_is_not_shared():
    learned = Row((1, -201, 2), (1, IGNORED, 2))
    assert len(pack_rows([learned, learned, row(1, -201, 2)], 3)) == 3


def test_texts_are_packed_side_by_side():
    (packed,) = pack_rows([row(1, 2), row(3, 4, 5)], 2)
    assert packed.input_ids == [1, 2, 3, 4, 5]
    assert packed.segments == [1, 1, 2, 2, 2]


def test_word_targets_go_with_each_row_of_their_sample():
    words = torch.zeros(4, 1, dtype=torch.int64)
    items = [sample(row(1, 2), row(3, 4), word_targets=words), sample(row(5, 6))]
    assert Collator(0, max_length=9)(items)["word_targets"] == [words, words, None]


@pytest.mark.parametrize("sizes", [{"max_length": 0}, {"max_length": 5, "pack": 0}])
def test_sizes_that_hold_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="is 0, expected at least 1"):
        Collator(0, **sizes)
