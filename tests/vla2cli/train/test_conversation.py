import pytest

from tests.goldens import golden
from tests.tiny import tiny_engine
from tests.vla2cli.train.reference import CASES, KINDS, batch_of, conversation_of
from vla2cli.errors import InputError
from vla2cli.tokenizer import load_tokenizer
from vla2cli.train.conversation import IGNORED, Row, Utterance, build_row, move_tags

ASKED = Utterance("human", "<video>\nWhat moves?")
ANSWERED = Utterance("gpt", "A red car.")


def tokenizer_of(case):
    return load_tokenizer(golden(f"checkpoints/{case}/tokenizer_config.json").parent)


def learned_text(row):
    """What a row teaches, with the tiny checkpoint's tokenizer."""
    return tiny_engine().tokenizer.decode([label for label in row.labels if label != IGNORED])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_labels_of_a_chat_are_the_reference_s(case, kind):
    expected = batch_of(case)
    row = build_row(tokenizer_of(case), conversation_of(case, kind), kind)
    assert list(row.input_ids) == expected[f"{kind}.input_ids"].tolist()
    assert list(row.labels) == expected[f"{kind}.labels"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_ids_and_labels_of_the_plain_form_are_the_reference_s(case):
    expected = batch_of(case)
    row = build_row(tokenizer_of(case), conversation_of(case, "image"), "image", "plain")
    assert list(row.input_ids) == expected["plain.input_ids"].tolist()
    assert list(row.labels) == expected["plain.labels"].tolist()


def test_the_plain_caption_form_has_no_word_of_the_instruction():
    turns = [Utterance("human", "What is heard? <audio>"), Utterance("gpt", "a bell rings")]
    tokenizer = tiny_engine().tokenizer
    row = build_row(tokenizer, turns, "audio", "plain-caption")
    assert row.input_ids == (-202, *tokenizer.encode(" a bell rings"))
    assert row.labels == (IGNORED, *row.input_ids[1:])


def test_a_tag_moves_to_the_front_of_its_turn_and_other_turns_stay():
    turns = [Utterance("human", " what is <video> this? <video>"), Utterance("gpt", " it ")]
    # the tag alone is taken out: what stood around it stays
    assert move_tags(turns, "<video>") == [
        Utterance("human", "<video>\nwhat is  this?"),
        Utterance("gpt", " it "),
    ]


def test_a_turn_of_a_tag_alone_has_no_empty_line():
    assert move_tags([Utterance("human", "<audio>\n")], "<audio>")[0].text == "<audio>"


def test_a_chat_teaches_all_answers_and_nothing_else():
    turns = [ASKED, ANSWERED, Utterance("human", "Where?"), Utterance("gpt", "On the road.")]
    row = build_row(tiny_engine().tokenizer, turns, "video")
    assert learned_text(row) == "A red car.On the road."
    eos_token_id = tiny_engine().tokenizer.eos_token_id
    assert sum(label == eos_token_id for label in row.labels) == 2


def test_the_tag_of_another_medium_is_a_word():
    turns = [Utterance("human", "<video>\nWhat does <image> mean?"), ANSWERED]
    row = build_row(tiny_engine().tokenizer, turns, "video")
    assert [token for token in row.input_ids if token < 0] == [-201]


def test_the_medium_may_come_with_a_later_question():
    turns = [Utterance("human", "Hello"), Utterance("gpt", "Hi."), ASKED, ANSWERED]
    row = build_row(tiny_engine().tokenizer, turns, "video")
    assert learned_text(row) == "Hi.A red car."
    assert row.place is not None
    assert row.labels[row.place] == IGNORED


@pytest.mark.parametrize(
    ("turns", "medium", "form", "message"),
    [
        ([ASKED], "video", "chat", "1 turns"),
        ([ANSWERED], "video", "chat", "0 turns"),
        ([ASKED, ANSWERED, ASKED], "video", "chat", "3 turns"),
        ([ASKED, ASKED], "video", "chat", "turn 2 is from 'human', expected 'gpt'"),
        ([ASKED, ANSWERED, ASKED, ANSWERED], "video", "chat", "2 turns with '<video>'"),
        ([Utterance("human", "What?"), ANSWERED], "video", "chat", "0 turns with '<video>'"),
        ([Utterance("human", "What?"), ANSWERED], "text", "plain", "no medium"),
        (
            [ASKED, ANSWERED, Utterance("human", "Where?"), ANSWERED],
            "video",
            "plain",
            "4 turns, expected a question and an answer",
        ),
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused(turns, medium, form, message):
    with pytest.raises(InputError, match=message):
        build_row(tiny_engine().tokenizer, turns, medium, form)


def test_a_row_has_a_label_for_each_token():
    with pytest.raises(ValueError, match="1 labels for 2 input_ids"):
        Row((1, 2), (1,))
