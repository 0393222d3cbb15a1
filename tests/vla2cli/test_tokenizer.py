import json
import shutil

import pytest

from tests.goldens import golden
from tests.tiny import change_json, tiny_engine, write_json
from vla2_models.errors import CheckpointError
from vla2cli.errors import ModelError
from vla2cli.prompt import tokenize
from vla2cli.tokenizer import load_tokenizer

CASES = ["mistral_clip_stc_8f", "mixtral_clip_stc_8f"]


@pytest.fixture(scope="module")
def slow():
    return json.loads(golden("data/slow_tokenizer.json").read_text(encoding="utf-8"))


def tokenizer_of(case):
    return load_tokenizer(golden(f"checkpoints/{case}/tokenizer.model").parent)


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of one's own, to be damaged."""
    source = golden("checkpoints/mistral_clip_stc_8f")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_slow_tokenizer(slow, case):
    tokenizer = tokenizer_of(case)
    assert len(slow[case]) == 215
    for row in slow[case]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]


@pytest.mark.parametrize("case", CASES)
def test_decoded_text_is_that_of_the_slow_tokenizer(slow, case):
    tokenizer = tokenizer_of(case)
    for row in slow[case]:
        assert tokenizer.decode(row["ids"]) == row["decoded"], row["text"]


@pytest.mark.parametrize("case", CASES)
def test_ids_around_a_placeholder_are_those_of_the_slow_tokenizer(slow, case):
    about = slow[f"{case}.multi_turn"]
    assert tokenize(tokenizer_of(case), about["prompt"], "<video>") == about["input_ids"]


def test_golden_strings_tell_the_prefix_rules_apart(slow):
    # the fast tokenizer of transformers 5 puts no space in front of a text that begins with one
    tokenizer = tokenizer_of(CASES[0])
    begins_with_space = [row for row in slow[CASES[0]] if row["text"].startswith(" ")]
    assert len(begins_with_space) > 5
    for row in begins_with_space:
        assert tokenizer.encode(row["text"][1:]) != row["ids"]


def test_a_text_of_nothing_has_no_ids():
    tokenizer = tokenizer_of(CASES[0])
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_special_tokens_are_not_spoken():
    tokenizer = tokenizer_of(CASES[0])
    words = tokenizer.encode("two words")
    assert tokenizer.decode([1, *words, 0, tokenizer.eos_token_id]) == "two words"


def test_ids_without_a_piece_are_not_spoken():
    # a vocabulary may be padded with rows that no piece belongs to
    tokenizer = tokenizer_of(CASES[0])
    words = tokenizer.encode("two words")
    assert (
        tokenizer.decode([*words, len(tokenizer.pieces), len(tokenizer.pieces) + 9]) == "two words"
    )


def test_bytes_that_are_no_utf8_become_replacement_marks():
    tokenizer = tokenizer_of(CASES[0])
    first_byte = tokenizer.pieces.piece_to_id("<0xE2>")
    assert tokenizer.decode([*tokenizer.encode("a"), first_byte]) == "a�"


def test_added_token_is_one_id_and_the_longest_wins(folder):
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added |= {"700": {"content": "<a>"}, "701": {"content": "<a><b>"}}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<a><b><a>") == [701, 700]
    assert tokenizer.decode([701, 700]) == ""


def test_tokens_written_as_objects_are_read(folder):
    change_json(folder / "tokenizer_config.json", bos_token={"content": "<s>"}, eos_token=None)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", "</s>", 2)


def test_special_tokens_need_not_be_listed(folder):
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=None)
    assert load_tokenizer(folder).encode("<s>hi</s>") == tokenizer_of(CASES[0]).encode("<s>hi</s>")


def test_default_of_several_templates_is_taken(folder):
    templates = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    change_json(folder / "tokenizer_config.json", chat_template=templates)
    assert load_tokenizer(folder).chat_template == "yes"


def test_template_in_a_file_of_its_own_is_read(folder):
    change_json(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    assert load_tokenizer(folder).chat_template == "from the file"


def refusal(folder):
    with pytest.raises((CheckpointError, ModelError)) as caught:
        load_tokenizer(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


def test_missing_template_is_refused(folder):
    change_json(folder / "tokenizer_config.json", chat_template=None)
    assert "has no chat template" in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"has no {name}" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"no pieces"], ids=["empty", "text"])
def test_broken_pieces_are_refused(folder, content):
    (folder / "tokenizer.model").write_bytes(content)
    assert "is not a sentencepiece model" in refusal(folder)


def test_settings_that_are_no_json_are_refused(folder):
    (folder / "tokenizer_config.json").write_text("{")
    assert "cannot be read" in refusal(folder)


def test_settings_that_are_no_object_are_refused(folder):
    write_json(folder / "tokenizer_config.json", [])
    assert "holds a list, expected an object" in refusal(folder)


def test_tiny_tokenizer_goes_there_and_back():
    tokenizer = tiny_engine().tokenizer
    text = "a red car, größer 🚗"
    assert tokenizer.decode(tokenizer.encode(text)) == text
