"""Words in smaller pieces: the text and what is learned of it stay, the pieces change."""

import numpy as np
import pytest

from vla2_models.hub import BUILTIN_FOLDER
from vla2cli.tokenizer import load_tokenizer
from vla2cli.train.conversation import IGNORED, Utterance, build_row
from vla2cli.train.spelling import Speller

ANSWER = "A butterfly moves to the left on a green meadow."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUILTIN_FOLDER)


@pytest.fixture(scope="module")
def row(tokenizer):
    turns = [Utterance("human", "<video>\nWhat happens?"), Utterance("gpt", ANSWER)]
    return build_row(tokenizer, turns, "video")


@pytest.fixture(scope="module")
def spelled(tokenizer, row):
    rng = np.random.default_rng(0)
    speller = Speller(tokenizer)
    return [speller.spell(row, rng) for _ in range(200)]


def test_a_spelled_row_has_the_same_text_and_learns_the_same_of_it(tokenizer, row, spelled):
    (place,) = (i for i in row.input_ids if i < 0)
    shared = row.input_ids[: row.input_ids.index(place) + 1]
    for one in spelled:
        assert one.input_ids[: len(shared)] == shared
        for ids, whole in ((one.input_ids, row.input_ids), (one.labels, row.labels)):
            parts = [i for i in ids if i not in (place, IGNORED)]
            assert tokenizer.decode(parts) == tokenizer.decode(
                [i for i in whole if i not in (place, IGNORED)]
            )
        assert all(label in (IGNORED, i) for i, label in zip(one.input_ids, one.labels))
        # template, question, answer: what is learned is one stretch at the end
        first = next(i for i, label in enumerate(one.labels) if label != IGNORED)
        assert IGNORED not in one.labels[first:]


def test_spelling_meets_pieces_that_no_whole_word_uses(tokenizer, row, spelled):
    assert len({one.input_ids for one in spelled}) > 190
    met = {i for one in spelled for i in one.input_ids}
    assert len(met) > 2 * len(set(row.input_ids))
    # down to single letters
    assert {tokenizer.pieces.find(letter) for letter in "utflymeadow"} <= met


def test_spelling_follows_from_its_generator(tokenizer, row):
    one, same, other = (
        Speller(tokenizer).spell(row, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert one == same != other
