from dataclasses import replace

import pytest

from tests.goldens import golden, runs_of, tensors_of
from vla2cli.errors import ModelError, UsageError
from vla2cli.prompt import Turn, build_prompt, check_question
from vla2cli.tokenizer import load_tokenizer

MISTRAL = "videollama2_mistral"
RUNS = [("mistral_clip_stc_8f", run) for run in ("cap", "qa", "img", "txt", "mt", "range")]
RUNS += [("mistral_clip_stc_16f_336", "cap")]
# no part of the repository: its tokenizer is, its prompts are not
RUNS += [("mixtral_clip_stc_8f", run) for run in ("cap", "qa", "img")]
RUNS += [("qwen2_siglip_stcv35_16f", run) for run in ("cap", "qa", "img", "txt")]
RUNS += [("qwen2_siglip_stcv35_16f_384", "cap")]


def tokenizer_of(case):
    return load_tokenizer(golden(f"checkpoints/{case}/tokenizer_config.json").parent)


@pytest.fixture
def tokenizer():
    return tokenizer_of("mistral_clip_stc_8f")


def with_template(tokenizer, template):
    return replace(tokenizer, chat_template=template)


def questions_of(instruct):
    """Split what the reference was asked into the last question and the turns before."""
    if isinstance(instruct, str):
        return instruct, ()
    said = [message["content"] for message in instruct]
    turns = zip(said[:-1:2], said[1::2], strict=True)
    return said[-1], tuple(Turn(question, text) for question, text in turns)


@pytest.mark.parametrize(("case", "run"), RUNS, ids=["-".join(run) for run in RUNS])
def test_prompt_and_ids_match_reference(case, run):
    about = runs_of(case)[run]
    question, history = questions_of(about["instruct"])
    model_type = "videollama2_" + case.partition("_")[0]
    prompt = build_prompt(
        tokenizer_of(case), model_type, question, medium=about["modal"], history=history
    )
    assert prompt.text == about["prompt"]
    assert list(prompt.input_ids) == tensors_of(case, run)["input_ids"].tolist()


@pytest.mark.parametrize(
    ("medium", "ids"), [("video", [-201]), ("image", [-200]), ("text", [])], ids=str
)
def test_modality_decides_the_placeholder(tokenizer, medium, ids):
    prompt = build_prompt(tokenizer, MISTRAL, "What?", medium=medium)
    assert [i for i in prompt.input_ids if i < 0] == ids


def test_text_keeps_the_line_break_of_the_missing_placeholder(tokenizer):
    plain = with_template(tokenizer, "{{ messages[-1]['content'] }}")
    assert build_prompt(plain, MISTRAL, "Why?", medium="text").text == "\nWhy?"


def test_placeholder_stands_before_the_first_question_only(tokenizer):
    history = (Turn("One?", "1"), Turn("Two?", "2"))
    prompt = build_prompt(tokenizer, MISTRAL, "Three?", history=history)
    assert prompt.text.count("<video>") == 1
    assert "<video>\nOne? [/INST]1</s>[INST] Two? [/INST]2</s>[INST] Three?" in prompt.text


@pytest.mark.parametrize(
    ("model_type", "roles"),
    [("videollama2_mistral", "system user "), ("videollama2", "system user "), ("other", "user ")],
)
def test_model_type_decides_on_a_system_message(tokenizer, model_type, roles):
    tokenizer = with_template(tokenizer, "{% for m in messages %}{{ m['role'] }} {% endfor %}")
    assert build_prompt(tokenizer, model_type, "Why?", medium="text").text == roles


def test_template_asks_for_an_answer(tokenizer):
    template = "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}"
    prompt = build_prompt(with_template(tokenizer, template), MISTRAL, "Why?", medium="text")
    assert prompt.text == "<s></s>True"


@pytest.mark.parametrize("medium", ["video", "image"])
def test_question_that_holds_its_placeholder_is_refused(tokenizer, medium):
    question = f"what is <{medium}>?"
    with pytest.raises(UsageError, match=f"holds '<{medium}>'"):
        build_prompt(tokenizer, MISTRAL, question, medium=medium)
    with pytest.raises(UsageError, match=f"holds '<{medium}>'"):
        check_question(question, medium)


def test_earlier_question_that_holds_the_placeholder_is_refused(tokenizer):
    with pytest.raises(UsageError, match="<video>"):
        build_prompt(tokenizer, MISTRAL, "And?", history=(Turn("<video>?", "yes"),))


def test_placeholder_of_another_modality_is_plain_text(tokenizer):
    prompt = build_prompt(tokenizer, MISTRAL, "what is <image>?", medium="video")
    assert [i for i in prompt.input_ids if i < 0] == [-201]


def test_answer_that_holds_the_placeholder_is_plain_text(tokenizer):
    # a model may say anything; its words must not become a second clip
    history = (Turn("What?", "a <video> tag"),)
    prompt = build_prompt(tokenizer, MISTRAL, "And?", history=history)
    after = prompt.text.partition("<video>")[2]
    assert "a <video> tag" in after
    place = prompt.input_ids.index(-201)
    assert list(prompt.input_ids[place + 1 :]) == tokenizer.encode(after)


def test_template_that_drops_the_clip_is_a_model_error(tokenizer):
    template = with_template(tokenizer, "{{ messages[-1]['content'] }}")
    with pytest.raises(ModelError, match="drops '<video>'"):
        build_prompt(template, MISTRAL, "And?", history=(Turn("What?", "this"),))


def test_template_that_raises_is_a_model_error(tokenizer):
    strict = with_template(tokenizer, "{{ raise_exception('no system role') }}")
    with pytest.raises(ModelError, match="chat template refuses the prompt: no system role"):
        build_prompt(strict, MISTRAL, "Why?")


def test_template_that_takes_no_system_message_is_a_model_error(tokenizer):
    # as the stock one of Mistral-7B-Instruct-v0.2
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}"
    )
    with pytest.raises(ModelError, match="roles must alternate"):
        build_prompt(with_template(tokenizer, template), MISTRAL, "Why?")


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages[9]['content'] }}",
        "{{ 1 / 0 }}",
        "{{ 1 + '' }}",
        "{{ ''.__class__.__mro__ }}",
    ],
    ids=["syntax", "undefined", "division", "types", "sandbox"],
)
def test_broken_or_hostile_template_is_a_model_error(tokenizer, template):
    with pytest.raises(ModelError, match="chat template refuses the prompt"):
        build_prompt(with_template(tokenizer, template), MISTRAL, "Why?")
