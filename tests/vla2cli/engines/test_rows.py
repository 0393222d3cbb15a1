"""How the next token is chosen, and when a text is over."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.tiny import generate, tiny_language_model
from tests.vla2cli.engines.prompts import random_prompt
from vla2cli.config import GenerationSettings


def constant_model(logits):
    """A language model that gives the same logits everywhere: its head is a bias alone."""
    config = MistralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(logits),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        sliding_window=None,
    )
    model = MistralForCausalLM(config).eval()
    model.lm_head = torch.nn.Linear(8, len(logits))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(logits)
    return model


@pytest.mark.parametrize(
    ("logits", "penalty", "ids"),
    [
        ([4.0, 3.0, 0.0], 1.0, (0, 0, 0, 0)),
        # 4 becomes 2.7, then 3 becomes 2
        ([4.0, 3.0, 0.0], 1.5, (0, 1, 0, 0)),
        # -1 becomes -3, then -2 becomes -6
        ([-1.0, -2.0, -9.0], 3.0, (0, 1, 0, 0)),
        # below 1 the rule turns round
        ([4.0, 3.0, 0.0], 0.5, (0, 0, 0, 0)),
    ],
    ids=["none", "positive", "negative", "reward"],
)
def test_repetition_penalty_follows_its_formula(logits, penalty, ids):
    """Logits of ids that were said: divided where positive, multiplied where negative."""
    settings = GenerationSettings(
        eos_token_ids=(), max_new_tokens=len(ids), repetition_penalty=penalty
    )
    model = constant_model(torch.tensor(logits))
    assert generate(model, [torch.zeros(1, 8)], settings, [0])[0].ids == ids


PROBABILITIES = torch.tensor([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        # p ** 2, scaled to 1
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        # the least set that holds 0.75
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.5}, [1.0, 0, 0, 0]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "both", "temperature_first"],
)
def test_draws_follow_the_distribution(changes, expected):
    num_rows = 4000
    settings = GenerationSettings(eos_token_ids=(), max_new_tokens=1, **changes)
    embeds = [torch.zeros(1, 8)] * num_rows
    rows = generate(constant_model(PROBABILITIES.log()), embeds, settings, range(num_rows))
    counts = torch.bincount(torch.tensor([row.ids[0] for row in rows]), minlength=4)
    expected = torch.tensor(expected)
    # four deviations of a share among 4000 draws
    torch.testing.assert_close(counts / num_rows, expected, atol=4 * 0.5 / num_rows**0.5, rtol=0)
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("ends", [(3,), (1, 3)], ids=["one", "list"])
def test_every_end_id_ends_the_text(ends):
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])
    settings = GenerationSettings(eos_token_ids=ends, max_new_tokens=5)
    (row,) = generate(constant_model(logits), [torch.zeros(2, 8)], settings, [0])
    assert (row.ids, row.finish_reason) == ((3,), "stop")


def test_text_is_cut_at_its_longest():
    settings = GenerationSettings(eos_token_ids=(0,), max_new_tokens=5)
    logits = torch.tensor([0.0, 1.0])
    (row,) = generate(constant_model(logits), [torch.zeros(2, 8)], settings, [0])
    assert (row.ids, row.finish_reason) == ((1,) * 5, "length")
    assert row.logprob_mean == pytest.approx(logits.log_softmax(-1)[1].item(), abs=1e-6)


def test_sampling_leaves_the_global_generator_alone():
    model = tiny_language_model("mistral")
    state = torch.random.get_rng_state()
    settings = GenerationSettings(eos_token_ids=(2,), max_new_tokens=5, temperature=1.0)
    generate(model, [random_prompt(4), random_prompt(9)], settings)
    assert torch.equal(torch.random.get_rng_state(), state)
