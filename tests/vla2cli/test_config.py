import math

import pytest

from tests.tiny import write_json
from vla2_models.errors import CheckpointError
from vla2cli.config import (
    UNSUPPORTED_GENERATION,
    GenerationChoice,
    read_config_file,
    resolve_generation,
)
from vla2cli.errors import ModelError, UsageError

EOS = 2


def resolve(tmp_path, saved, **choice):
    write_json(tmp_path / "generation_config.json", saved)
    return resolve_generation(GenerationChoice(**choice), tmp_path, EOS)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"max_new_tokens": 0}, "'--max-new-tokens 0': at least 1"),
        ({"max_new_tokens": -5}, "'--max-new-tokens -5'"),
        ({"temperature": -0.1}, r"'--temperature -0\.1'"),
        ({"temperature": math.inf}, "'--temperature inf'"),
        ({"temperature": math.nan}, "'--temperature nan'"),
        ({"temperature": 1, "top_p": 0}, "'--top-p 0': expected a number above 0, at most 1"),
        ({"temperature": 1, "top_p": 1.01}, r"'--top-p 1\.01'"),
        ({"temperature": 1, "top_p": math.nan}, "'--top-p nan'"),
        ({"temperature": 1, "top_k": 0}, "'--top-k 0': at least 1"),
        ({"top_p": 0.9}, "need '--temperature' above 0"),
        ({"top_k": 5}, "need '--temperature' above 0"),
    ],
    ids=str,
)
def test_choice_that_means_nothing_is_refused(choice, said):
    with pytest.raises(UsageError, match=said):
        GenerationChoice(**choice)


def test_default_choice_is_greedy_and_512_tokens(tmp_path):
    settings = resolve(tmp_path, {"eos_token_id": EOS, "do_sample": True, "temperature": 0.7})
    assert (settings.temperature, settings.max_new_tokens) == (0, 512)
    assert (settings.top_p, settings.top_k, settings.repetition_penalty) == (1, 0, 1)
    assert not settings.is_sampled


@pytest.mark.parametrize(
    ("saved", "expected"),
    [(2, (2,)), (7, (2, 7)), ([7, 9], (2, 7, 9)), ([2, 7], (2, 7)), (None, (2,))],
    ids=str,
)
def test_end_ids_are_the_files_and_the_tokenizers(tmp_path, saved, expected):
    assert resolve(tmp_path, {"eos_token_id": saved}).eos_token_ids == expected


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_repetition_penalty_of_the_file_holds(tmp_path, temperature):
    settings = resolve(tmp_path, {"repetition_penalty": 1.05}, temperature=temperature)
    assert settings.repetition_penalty == 1.05


@pytest.mark.parametrize(
    ("saved", "choice", "expected"),
    [
        ({}, {}, 50),
        ({"top_k": 20}, {}, 20),
        ({"top_k": 0}, {}, 0),
        ({"top_k": None}, {}, 0),
        ({"top_k": 20}, {"top_k": 3}, 3),
    ],
    ids=str,
)
def test_top_k_is_the_users_or_the_files_or_fifty(tmp_path, saved, choice, expected):
    assert resolve(tmp_path, saved, temperature=0.5, **choice).top_k == expected


def test_top_p_is_the_users_or_the_references(tmp_path):
    # the reference passes 0.9 whatever the file says
    assert resolve(tmp_path, {"top_p": 0.5}, temperature=0.5).top_p == 0.9
    assert resolve(tmp_path, {"top_p": 0.5}, temperature=0.5, top_p=0.7).top_p == 0.7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 5),
        ("min_length", 5),
        ("suppress_tokens", [1]),
        ("bad_words_ids", [[5]]),
        ("forced_bos_token_id", 1),
    ],
)
def test_setting_that_is_not_applied_is_refused(tmp_path, field, value):
    with pytest.raises(ModelError, match=f"generation_config.json sets {field} to"):
        resolve(tmp_path, {field: value})


def test_settings_at_their_defaults_are_no_reason_to_refuse(tmp_path):
    saved = dict(UNSUPPORTED_GENERATION) | {"pad_token_id": 0, "transformers_version": "4.40.0"}
    assert resolve(tmp_path, saved).eos_token_ids == (EOS,)
    assert resolve(tmp_path, dict.fromkeys(UNSUPPORTED_GENERATION)).eos_token_ids == (EOS,)


def test_config_json_counts_where_the_file_is_missing(tmp_path):
    write_json(tmp_path / "config.json", {"eos_token_id": [5, 6], "repetition_penalty": 1.3})
    settings = resolve_generation(GenerationChoice(), tmp_path, EOS)
    assert (settings.eos_token_ids, settings.repetition_penalty) == ((2, 5, 6), 1.0)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "cannot be read"), ("[]", "holds a list, expected an object")],
    ids=["cut", "list"],
)
def test_broken_file_is_refused(tmp_path, content, said):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        resolve_generation(GenerationChoice(), tmp_path, EOS)


def read(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode("latin1"))
    return read_config_file(path, {"batch", "max_new_tokens", "dtype"})


def test_yaml_names_are_those_of_the_flags(tmp_path):
    settings = read(tmp_path, "batch: 4\nmax-new-tokens: 64\ndtype: float16\n")
    assert settings == {"batch": 4, "max_new_tokens": 64, "dtype": "float16"}


def test_empty_yaml_sets_nothing(tmp_path):
    assert read(tmp_path, "# nothing yet\n") == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("batch: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("batch: \xff", "is not YAML"),
        ("- batch", "holds no settings"),
        ("just words", "holds no settings"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("bacth: 4", "sets 'bacth', which this command does not have; did you mean 'batch'"),
        ("max-new-token: 4", "did you mean 'max-new-tokens'"),
        ("zzz: 4", "sets 'zzz', which this command does not have$"),
        ("4: 4", "sets '4'"),
    ],
    ids=[
        "cut",
        "nested",
        "latin1",
        "list",
        "text",
        "code",
        "typo",
        "typo_dash",
        "unknown",
        "number",
    ],
)
def test_yaml_that_is_not_understood_is_refused(tmp_path, content, said):
    with pytest.raises(UsageError, match=said) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_missing_yaml_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_config_file(tmp_path / "absent.yaml", set())
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_config_file(tmp_path, set())
