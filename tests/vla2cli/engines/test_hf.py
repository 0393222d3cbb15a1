"""Rows that come and go: each says what transformers says behind its prompt alone."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_language_model
from tests.vla2cli.engines.prompts import (
    MODELS,
    WIDTH,
    by_transformers,
    ids_of,
    logprobs_of,
    model_of,
    ragged,
    random_prompt,
    settings_of,
    sharing,
    work_off,
)
from vla2cli.engines import passes
from vla2cli.engines.base import Generation, Request, Scores, run
from vla2cli.engines.hf import HFEngine

# transformers remarks on a penalty without prompt ids
pytestmark = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with")

NAN = float("nan")
OPTIONS = ((5, 9, 2), (9, 8, 7, 2), (5, 9, 8, 7, 6, 2), (96, 2))  # two begin alike
ATOL = 2e-5  # float32 sums of another order


@functools.cache
def expected_ids(name, penalty=1.0):
    return by_transformers(model_of(name), ragged(penalty))


@pytest.fixture
def count_positions():
    """Count the positions that a model reads: `count_positions(model) -> [number of each pass]`."""
    hooks = []

    def count(model):
        passed = []
        hooks.append(
            model.model.layers[0].register_forward_pre_hook(
                lambda module, args: passed.append(args[0].shape[0] * args[0].shape[1])
            )
        )
        return passed

    yield count
    for hook in hooks:
        hook.remove()


@pytest.fixture
def fail_where():
    """Let a model's passes raise: `fail_where(model, error, condition on the (B, T, D) input)`."""
    hooks = []

    def fail(model, error, condition):
        def hook(module, args):
            if condition(args[0]):
                raise error

        hooks.append(model.model.layers[1].register_forward_pre_hook(hook))

    yield fail
    for hook in hooks:
        hook.remove()


# the ids of each prompt alone


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("name", MODELS)
def test_ids_of_rows_that_come_and_go_are_those_of_transformers(name, penalty, num_rows):
    results = run(HFEngine(model_of(name), num_rows), ragged(penalty))
    assert ids_of(results) == expected_ids(name, penalty)
    for request, result in zip(ragged(penalty), results, strict=True):
        has_ended = result.ids[-1] in request.settings.eos_token_ids
        assert result.finish_reason == ("stop" if has_ended else "length")
    assert {result.finish_reason for result in results} == {"stop", "length"}


def test_rows_with_different_settings_stand_beside_each_other():
    requests = [ragged(penalty)[i] for i in range(11) for penalty in (1.0, 1.3)]
    expected = [expected_ids("mistral", penalty)[i] for i in range(11) for penalty in (1.0, 1.3)]
    assert ids_of(run(HFEngine(model_of("mistral"), 5), requests)) == expected


def test_order_of_the_prompts_changes_nothing():
    results = run(HFEngine(model_of("mistral"), 3), ragged()[::-1])
    assert ids_of(results)[::-1] == expected_ids("mistral")


@pytest.mark.parametrize("most_tokens", [1, 7, 64])
@pytest.mark.parametrize("name", ["mistral", "qwen2, window"])
def test_prompts_read_in_pieces_say_the_same(monkeypatch, name, most_tokens):
    monkeypatch.setattr(passes, "MOST_TOKENS", most_tokens)
    results = run(HFEngine(model_of(name), 3), ragged())
    assert ids_of(results) == expected_ids(name)


@pytest.mark.parametrize("most_tokens", [7, 2048])
def test_pass_reads_no_more_positions_than_it_may(monkeypatch, count_positions, most_tokens):
    monkeypatch.setattr(passes, "MOST_TOKENS", most_tokens)
    passed = count_positions(model_of("mistral"))
    run(HFEngine(model_of("mistral"), 3), ragged())
    run(HFEngine(model_of("mistral"), 3), [weighed(size, ((5, 2),) * 2000) for size in (7, 8)])
    assert max(passed) <= most_tokens


def test_log_probabilities_are_those_of_one_plain_pass():
    model = model_of("mistral")
    for request, result in zip(ragged(1.3), run(HFEngine(model, 3), ragged(1.3)), strict=True):
        expected = logprobs_of(model, request.inputs_embeds, result.ids)
        assert result.logprobs == pytest.approx(expected, abs=ATOL)


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_drawn_text_depends_on_its_seed_alone(num_rows):
    model = model_of("mistral")
    requests = [
        dataclasses.replace(
            request,
            settings=settings_of(12, temperature=0.9, top_p=0.9, eos_token_ids=(2,)),
            seed=seed,
        )
        for seed, request in enumerate(ragged())
    ]
    alone = [run(HFEngine(model, 1), [request])[0].ids for request in requests]
    assert ids_of(run(HFEngine(model, num_rows), requests)) == alone
    others = [dataclasses.replace(request, seed=request.seed + 50) for request in requests]
    assert all(a != b for a, b in zip(ids_of(run(HFEngine(model, num_rows), others)), alone))


def test_bfloat16_says_nearly_what_float32_says():
    model = tiny_language_model("mistral", torch.bfloat16)
    requests = [
        dataclasses.replace(request, inputs_embeds=request.inputs_embeds.bfloat16())
        for request in ragged()
    ]
    results = run(HFEngine(model, 3), requests)
    exact = run(HFEngine(model_of("mistral"), 3), ragged())
    for result, other in zip(results, exact, strict=True):
        assert result.is_finite
        assert result.first_logits.dtype == torch.float32
        # the logits of a random model are of the size of 1
        torch.testing.assert_close(result.first_logits, other.first_logits, atol=0.05, rtol=0)


# places


def test_place_of_a_finished_row_is_taken_at_once():
    engine = HFEngine(model_of("mistral"), 2)
    long = engine.submit(Request(random_prompt(30), settings_of(40, eos_token_ids=())))
    short = [
        engine.submit(Request(random_prompt(5, i), settings_of(4, eos_token_ids=())))
        for i in range(13)
    ]
    came = []
    while engine.num_open:
        came += [ticket for ticket, _ in engine.step()]
    # the first token comes with the prompt: 39 steps, in which thirteen texts of 3 steps are said
    assert engine.num_steps == 39
    assert came[:12] == short[:12]
    assert set(came[12:]) == {long, short[12]}


def test_text_of_one_token_takes_no_step():
    engine = HFEngine(model_of("mistral"), 2)
    requests = [Request(random_prompt(5, i), settings_of(1)) for i in range(7)]
    tickets = [engine.submit(request) for request in requests]
    assert sorted(ticket for ticket, _ in engine.step()) == tickets
    assert engine.num_steps == 0


def test_no_more_rows_are_read_than_there_are_places(count_positions):
    passed = count_positions(model_of("mistral"))
    engine = HFEngine(model_of("mistral"), 3)
    for i in range(8):
        engine.submit(Request(random_prompt(10, i), settings_of(5, eos_token_ids=())))
    engine.step()
    assert passed == [30, 3]


def test_engine_wants_twice_its_rows_and_never_less_than_nothing():
    engine = HFEngine(model_of("mistral"), 3)
    assert engine.num_wanted == 6
    for i in range(8):
        engine.submit(Request(random_prompt(5, i), settings_of(4)))
    assert (engine.num_wanted, engine.num_open) == (0, 8)
    while engine.num_open:
        assert engine.num_wanted == max(0, 6 - engine.num_open)
        engine.step()
    assert engine.num_wanted == 6


def test_what_waits_is_dropped_and_what_was_begun_goes_on():
    engine = HFEngine(model_of("mistral"), 2)
    tickets = [engine.submit(request) for request in ragged()]
    results = dict(engine.step())
    engine.drop_waiting()
    assert engine.num_open <= 2
    while engine.num_open:
        results |= dict(engine.step())
    assert 1 <= len(results) < len(tickets)
    for ticket, result in results.items():
        assert result.ids == expected_ids("mistral")[tickets.index(ticket)]
    assert engine.step() == []


# beginnings in common


def test_beginning_in_common_is_read_once(count_positions):
    model = model_of("mistral")
    requests = sharing("clip", 6, max_new_tokens=1)
    expected = by_transformers(model, requests)
    passed = count_positions(model)
    assert ids_of(run(HFEngine(model, 3), requests)) == expected
    assert sum(passed) == 50 + 6 * 4
    passed.clear()
    plain = [dataclasses.replace(request, shared=None) for request in requests]
    assert ids_of(run(HFEngine(model, 3), plain)) == expected
    assert sum(passed) == 6 * 54


@pytest.mark.parametrize("num_rows", [1, 2, 8])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_that_begin_alike_say_what_each_says_alone(name, num_rows):
    # of five beginnings each in turn, so that few rows forget one before it is asked for again
    groups = [sharing(key, 3, length=20 + 3 * key, tail=1 + key) for key in range(5)]
    requests = [request for together in zip(*groups) for request in together]
    requests[4:4] = ragged()
    expected = by_transformers(model_of(name), requests)
    assert ids_of(run(HFEngine(model_of(name), num_rows), requests)) == expected


def test_forgotten_beginning_is_read_again(count_positions):
    model = model_of("mistral")
    passed = count_positions(model)
    engine = HFEngine(model, 1)  # keeps two
    for key in (0, 1, 2, 0):
        run(engine, sharing(key, 1, max_new_tokens=1))
    assert sum(passed) == 4 * 54


def test_each_beginning_is_read_once_though_many_conversations_go_on(count_positions):
    # as with --then: a follow-up is asked when the first answer is there
    model = model_of("mistral")
    passed = count_positions(model)
    engine = HFEngine(model, 4)
    firsts = {key: sharing(key, 2, max_new_tokens=3) for key in range(24)}
    waiting = list(firsts)
    asked = {}
    while waiting or engine.num_open:
        while waiting and engine.num_wanted:
            key = waiting.pop(0)
            asked[engine.submit(firsts[key][0])] = key
        for ticket, _ in engine.step():
            key = asked.pop(ticket)
            if key is None:
                continue
            asked[engine.submit(firsts[key][1])] = None
    assert sum(n // 54 for n in passed) == 24


def test_beginning_is_known_to_later_prompts_until_it_is_released(count_positions):
    model = model_of("mistral")
    first, second, third = sharing("clip", 3, max_new_tokens=5)
    expected = by_transformers(model, [first, second, third])
    engine = HFEngine(model, 2)
    assert ids_of(run(engine, [first])) == expected[:1]
    run(engine, ragged())
    passed = count_positions(model)
    assert ids_of(run(engine, [second])) == expected[1:2]
    assert passed[0] == 4
    engine.release("clip")
    engine.release("clip")
    passed.clear()
    assert ids_of(run(engine, [third])) == expected[2:]
    assert passed[0] == 54


@pytest.mark.parametrize("most_tokens", [3, 20])
def test_beginning_read_in_pieces_is_the_same(monkeypatch, most_tokens):
    monkeypatch.setattr(passes, "MOST_TOKENS", most_tokens)
    model = model_of("mistral, window")
    requests = sharing("clip", 5, tail=9)
    assert ids_of(run(HFEngine(model, 3), requests)) == by_transformers(model, requests)


# options


def weighed(size, options=OPTIONS, seed=0):
    return Request(random_prompt(size, seed), settings_of(1), options=options)


def assert_scores_are_plain(model, requests, results):
    for request, result in zip(requests, results, strict=True):
        expected = [sum(logprobs_of(model, request.inputs_embeds, ids)) for ids in request.options]
        assert result.logprobs == pytest.approx(expected, abs=5 * ATOL)


@pytest.mark.parametrize("most_tokens", [1, 5, 2048])
@pytest.mark.parametrize("name", ["mistral", "mixtral, window", "qwen2, window"])
def test_scores_do_not_depend_on_how_many_options_are_read_together(monkeypatch, name, most_tokens):
    monkeypatch.setattr(passes, "MOST_TOKENS", most_tokens)
    many = tuple((i, j, 2) for i in range(3, 9) for j in range(5))
    each = [OPTIONS, OPTIONS[:2], many, (tuple(range(3, 40)), (2, 2))]
    requests = [weighed(size, options) for size, options in zip((20, 3, 17, 21), each)]
    results = run(HFEngine(model_of(name), 3), requests)
    assert_scores_are_plain(model_of(name), requests, results)


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_options_and_texts_stand_beside_each_other(num_rows):
    model = model_of("mistral")
    scored = [weighed(size, seed=size) for size in (9, 33, 10, 2, 70)]
    sharing_them = [
        dataclasses.replace(request, options=OPTIONS) if i % 2 else request
        for i, request in enumerate(sharing("clip", 6))
    ]
    requests = [
        request for pair in zip(ragged(), [*scored, *sharing_them], strict=True) for request in pair
    ]
    results = run(HFEngine(model, num_rows), requests)
    plain = [request for request in requests if not request.options]
    expected = by_transformers(model, plain)
    assert [r.ids for r in results if isinstance(r, Generation)] == expected
    pairs = [pair for pair in zip(requests, results) if pair[0].options]
    assert_scores_are_plain(model, *zip(*pairs))


# numbers that are none


def neighbours():
    """Prompts that are read together, the first of them the shortest, and what they say alone."""
    requests = [
        Request(random_prompt(size, size), settings_of(10, eos_token_ids=()))
        for size in (20, 21, 22, 23)
    ]
    return requests, by_transformers(model_of("mistral"), requests)


def spoiled(size, **fields):
    return Request(torch.full((size, WIDTH), NAN), settings_of(4), **fields)


def test_prompt_of_nan_spoils_neither_those_beside_it_nor_those_after_it():
    requests, expected = neighbours()
    bad = [spoiled(24), spoiled(24)]
    results = run(HFEngine(model_of("mistral"), 3), [*bad, *requests[:2], *bad, *requests[2:]])
    assert [result.is_finite for result in results] == [False] * 2 + [True] * 2 + [False] * 2 + [
        True
    ] * 2
    assert ids_of(results[2:4] + results[6:]) == expected
    assert results[0].ids == ()


def test_options_behind_a_prompt_of_nan_spoil_no_row_after_it():
    requests, expected = neighbours()
    engine = HFEngine(model_of("mistral"), 4)
    scores = run(engine, [spoiled(30, options=OPTIONS)] * 4)
    assert all(not torch.tensor(of_row.logprobs).isfinite().any() for of_row in scores)
    assert ids_of(run(engine, requests)) == expected


def test_option_of_nan_spoils_no_row_after_it():
    model = tiny_language_model("mistral")
    model.model.embed_tokens.weight[8] = NAN
    requests, expected = neighbours()
    assert not any(8 in ids for ids in expected)
    engine = HFEngine(model, 4)
    for of_row in run(engine, [weighed(size, ((8, 5, 4, 2), (5, 2))) for size in (20, 21)]):
        assert not math.isfinite(of_row.logprobs[0])
    assert ids_of(run(engine, requests)) == expected


def test_beginning_of_nan_spoils_those_that_have_it_alone():
    requests, expected = neighbours()
    begun = [
        dataclasses.replace(request, inputs_embeds=request.inputs_embeds * NAN)
        for request in sharing("clip", 4)
    ]
    results = run(HFEngine(model_of("mistral"), 2), [*begun, *requests])
    assert [result.is_finite for result in results] == [False] * 4 + [True] * 4
    assert ids_of(results[4:]) == expected


def test_text_that_becomes_nan_ends_there_and_spoils_no_other():
    plain = expected_ids("mistral")
    bad_id = plain[4][3]
    model = tiny_language_model("mistral")
    model.model.embed_tokens.weight[bad_id] = NAN
    results = run(HFEngine(model, 3), [*ragged(), *ragged()])
    num_spoiled = 0
    for result, ids in zip(results, plain * 2, strict=True):
        end = ids.index(bad_id) + 1 if bad_id in ids[:-1] else len(ids)
        assert result.ids == ids[:end]
        assert result.is_finite == (end == len(ids))
        num_spoiled += not result.is_finite
    assert 2 <= num_spoiled < len(results)


# failures


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("fields", [{}, {"options": OPTIONS}], ids=["text", "options"])
def test_prompt_that_fails_costs_itself_alone(num_rows, fields):
    bad = Request(torch.zeros(10, WIDTH + 1), settings_of(4), **fields)
    requests = ragged()
    places = (0, 4, 9)
    for place in places:
        requests.insert(place, bad)
    results = work_off(HFEngine(model_of("mistral"), num_rows), requests)
    assert [isinstance(r, RuntimeError) for r in results] == [i in places for i in range(14)]
    assert [r.ids for r in results if isinstance(r, Generation)] == expected_ids("mistral")


def test_text_that_fails_in_its_middle_costs_itself_alone():
    model = tiny_language_model("mistral")
    plain = expected_ids("mistral")
    bad_id = plain[4][3]
    # ids from the bad one on have no embedding, so that what says one of them cannot go on
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(
        model.model.embed_tokens.weight[:bad_id]
    )
    results = work_off(HFEngine(model, 3), ragged())
    for result, ids in zip(results, plain, strict=True):
        if any(i >= bad_id for i in ids[:-1]):
            assert isinstance(result, IndexError)
        else:
            assert result.ids == ids
    assert {type(result) for result in results} == {IndexError, Generation}


def test_beginning_whose_first_reader_fails_is_read_by_another():
    requests = sharing("clip", 4)
    bad = dataclasses.replace(requests[0], inputs_embeds=torch.zeros(54, WIDTH + 1))
    results = work_off(HFEngine(model_of("mistral"), 2), [bad, *requests])
    assert isinstance(results[0], RuntimeError)
    assert ids_of(results[1:]) == by_transformers(model_of("mistral"), requests)


def test_scores_go_on_beside_a_prompt_that_fails():
    requests = [weighed(size) for size in (9, 10, 11)]
    bad = Request(torch.zeros(10, WIDTH + 1), settings_of(1), options=OPTIONS)
    results = work_off(HFEngine(model_of("mistral"), 4), [*requests, bad])
    assert isinstance(results.pop(), RuntimeError)
    assert {type(result) for result in results} == {Scores}
    assert_scores_are_plain(model_of("mistral"), requests, results)


def test_failed_prompt_holds_no_memory_of_its_pass():
    bad = Request(torch.zeros(10, WIDTH + 1), settings_of(4))
    (error,) = work_off(HFEngine(model_of("mistral"), 1), [bad])
    assert error.__traceback__ is None


def test_lost_device_is_not_the_fault_of_a_prompt(fail_where):
    fail_where(model_of("mistral"), torch.AcceleratorError("lost"), lambda x: True)
    engine = HFEngine(model_of("mistral"), 3)
    engine.submit(ragged()[0])
    with pytest.raises(torch.AcceleratorError, match="lost"):
        engine.step()


# memory


@pytest.mark.parametrize("is_reading", [True, False], ids=["reading", "going_on"])
def test_what_does_not_fit_is_begun_again_by_fewer_rows(fail_where, is_reading):
    error = torch.OutOfMemoryError("CUDA out of memory")
    fail_where(model_of("mistral"), error, lambda x: len(x) > 3 and (x.shape[1] > 1) == is_reading)
    said = []
    engine = HFEngine(model_of("mistral"), 8, say=said.append)
    alike = [Request(random_prompt(20, i), settings_of(12, eos_token_ids=())) for i in range(9)]
    plain = by_transformers(model_of("mistral"), alike)
    assert ids_of(work_off(engine, alike)) == plain
    assert engine.num_rows == 2
    assert said == ["out of memory: going on with 4 prompts at a time, or fewer"]


def test_prompt_that_does_not_fit_alone_fails_and_others_go_on(fail_where):
    error = torch.OutOfMemoryError("CUDA out of memory")
    fail_where(model_of("mistral"), error, lambda x: x.shape[1] > 100)
    engine = HFEngine(model_of("mistral"), 8)
    results = work_off(engine, ragged())
    (failed,) = [i for i, result in enumerate(results) if isinstance(result, Exception)]
    assert len(ragged()[failed].inputs_embeds) == 140
    for i, result in enumerate(results):
        assert i == failed or result.ids == expected_ids("mistral")[i]


SCARCE = """
import json, resource, sys
from pathlib import Path
import torch
from tests.vla2cli.engines.prompts import by_transformers, random_prompt, settings_of, work_off
from tests.tiny import tiny_language_model
from vla2_models.packed import pack_in_place
from vla2cli.engines.base import Request
from vla2cli.engines.hf import HFEngine
from vla2cli.errors import is_out_of_memory

# 64 KiB of keys and values a position, 26 MB for each of these prompts
WIDE = {"num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 32}
model = tiny_language_model("mistral", head_dim=128, vocab_size=100_000, **WIDE)
settings = settings_of(3, eos_token_ids=())
requests = [Request(random_prompt(400 - i, i), settings) for i in range(8)]
huge = Request(random_prompt(4000), settings)
expected = by_transformers(model, requests)
if json.loads(sys.argv[1]):
    pack_in_place(model)
    work_off(HFEngine(model, 1), requests)  # oneDNN compiles a product at its first call
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, resource.RLIM_INFINITY))
said = []
engine = HFEngine(model, 8, say=said.append)
results = work_off(engine, requests)
print(json.dumps([engine.num_rows, said, [r.ids for r in results] == expected]))
first, *results = work_off(engine, [huge, *requests[:3]])
print(json.dumps([is_out_of_memory(first), [r.ids for r in results] == expected[:3], said]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_memory_that_is_really_too_little_costs_rows_and_no_text(is_packed):
    done = subprocess.run(
        [sys.executable, "-c", SCARCE, json.dumps(is_packed)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (num_rows, said, is_right), (is_memory, others_are_right, all_said) = map(
        json.loads, done.stdout.splitlines()
    )
    assert num_rows in (1, 2, 4)
    assert is_right
    assert len(said) == 1
    assert is_memory
    assert others_are_right
    assert all_said == said
