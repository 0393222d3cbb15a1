"""Choosing one of several answers by what the model makes of each."""

import math
from pathlib import Path

import pytest
import torch

from tests.tiny import score, tiny_engine, tiny_language_model
from vla2cli import ask
from vla2cli.config import GenerationChoice
from vla2cli.engine import Ask
from vla2cli.engines.scoring import choose
from vla2cli.errors import UsageError
from vla2cli.plan import parse_choices
from vla2cli.prompt import Turn, continue_prompt

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = ("the red car", "a ball", "no bell", "the rain falls on the road")
ATOL = 2e-5  # float32 sums of another order


def logprob_of(model, embeds, ids):
    """One option by one plain pass over prompt and option."""
    table = model.get_input_embeddings()
    whole = torch.cat([embeds, table(torch.tensor(ids))])[None]
    logprobs = model(inputs_embeds=whole).logits[0].log_softmax(-1)
    before = range(len(embeds) - 1, len(embeds) - 1 + len(ids))
    return sum(float(logprobs[position, i]) for position, i in zip(before, ids))


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2"])
def test_scores_are_those_of_plain_passes_over_each_option(family):
    model = tiny_language_model(family)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randn(n, 64, generator=generator) for n in (7, 1, 12)]
    options = [[[5, 2], [9, 8, 7, 2], [4, 4, 2]], [[3, 3, 3, 3, 3, 2], [2, 2]], [[96, 2]] * 2]
    for prompt, of_prompt, scores in zip(prompts, options, score(model, prompts, options)):
        expected = [logprob_of(model, prompt, ids) for ids in of_prompt]
        torch.testing.assert_close(
            torch.tensor(scores.logprobs), torch.tensor(expected), atol=ATOL, rtol=1e-5
        )


def test_a_window_of_attention_shorter_than_the_prompt_changes_nothing_of_that():
    model = tiny_language_model("mistral", sliding_window=5)
    prompt = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    options = [[5, 2], [9, 8, 7, 2]]
    (scores,) = score(model, [prompt], [options])
    expected = torch.tensor([logprob_of(model, prompt, ids) for ids in options])
    torch.testing.assert_close(torch.tensor(scores.logprobs), expected, atol=ATOL, rtol=1e-5)


def test_the_probabilities_of_all_short_answers_sum_to_one():
    # every first token, then anything: what is left out is nothing
    model = tiny_language_model("mistral")
    prompt = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    pairs = [[[first, second] for second in range(97)] for first in (3, 50)]
    for options in pairs:
        (scores,) = score(model, [prompt], [options])
        first = scores.first_logits.softmax(-1)[options[0][0]]
        total = torch.tensor(scores.logprobs).exp().sum()
        torch.testing.assert_close(total, first, atol=1e-6, rtol=1e-4)


def test_a_choice_does_not_depend_on_its_batch():
    engine = tiny_engine()
    settings = engine.settings(GenerationChoice(max_new_tokens=4))
    asks = [
        Ask("what happens in 7?", "text", choices=OPTIONS),
        Ask("a", "text"),
        Ask("the sun sets behind the hills, slowly", "text", choices=OPTIONS[:2]),
    ]
    together = engine.answer(asks, settings)
    for row, one in zip(asks, together, strict=True):
        (alone,) = engine.answer([row], settings)
        assert alone.text == one.text
        assert (alone.choice is None) is (not row.choices)
        if alone.choice is not None:
            assert alone.choice.all == pytest.approx(one.choice.all, abs=1e-5)


def test_choosing_is_a_softmax_of_sums_whatever_the_lengths():
    found = choose(("a", "b", "c"), (math.log(0.3), math.log(0.1), math.log(0.2)))
    assert (found.text, found.probability) == ("a", 0.5)
    assert found.all == pytest.approx({"a": 1 / 2, "b": 1 / 6, "c": 1 / 3}, abs=1e-6)
    assert list(found.all) == ["a", "b", "c"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nothing_is_chosen_where_a_number_is_not_finite(value):
    found = choose(("a", "b"), (-1.0, value))
    assert (found.text, found.probability, found.all) == (None, None, {"a": None, "b": None})


def test_options_are_tokenised_as_they_stand_behind_the_prompt():
    engine = tiny_engine()
    prompt = engine.prompt(Ask("What moves?", "video"))
    ids = continue_prompt(engine.tokenizer, prompt, "video", "the red car")
    after = prompt.text.partition("<video>")[2]
    whole = engine.tokenizer.encode(f"{after}the red car</s>")
    assert ids == whole[len(engine.tokenizer.encode(after)) :]
    assert ids != [*engine.tokenizer.encode("the red car"), 2]  # with a space of its own before it


def test_options_are_tokenised_behind_what_was_said_before():
    engine = tiny_engine()
    prompt = engine.prompt(Ask("Which?", "image", history=(Turn("What is <video>?", "a ball"),)))
    ids = continue_prompt(engine.tokenizer, prompt, "image", "a ball")
    assert engine.tokenizer.decode(ids) == "a ball"
    assert ids[-1] == engine.tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["left", "left|", "|", "left|left ", "", "a| |b"])
def test_options_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match=r"^'--choices .*': expected two options or more"):
        parse_choices(text)


def test_options_are_cut_at_bars():
    assert parse_choices("left | straight on|right") == ("left", "straight on", "right")
    assert parse_choices(None) == ()


def test_record_has_the_choice_and_its_text():
    clips = [EXAMPLES / "01.mp4", EXAMPLES / "09.png"]
    records = list(ask(clips, "What moves?", tiny_engine(), choices=OPTIONS[:3], batch=2))
    for record in records:
        choice = record["choice"]
        assert list(choice) == ["text", "probability", "all"]
        assert record["text"] == choice["text"] == max(choice["all"], key=choice["all"].get)
        assert sum(choice["all"].values()) == pytest.approx(1, abs=1e-5)
        assert record["generation"]["choices"] == list(OPTIONS[:3])
        assert (record["finish_reason"], "error" in record) == ("stop", False)


def test_other_options_are_asked_again_and_the_same_are_not(tmp_path):
    def run(options):
        return len(
            list(
                ask(
                    EXAMPLES / "09.png",
                    "What?",
                    tiny_engine(),
                    choices=options,
                    output=tmp_path / "ledger.jsonl",
                )
            )
        )

    assert [run(OPTIONS[:2]), run(OPTIONS[:2]), run(OPTIONS[:3]), run(())] == [1, 0, 1, 1]


def test_options_are_checked_in_python_too():
    with pytest.raises(ValueError, match="two options or more"):
        list(ask(EXAMPLES / "09.png", "What?", tiny_engine(), choices=["left"]))
