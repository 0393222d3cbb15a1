import dataclasses
import shutil

import pytest
import torch

from tests.goldens import (
    RUNS,
    assert_stages_match,
    features_of,
    golden,
    golden_engine,
    runs_of,
    tensors_of,
)
from tests.tiny import change_json, open_tiny, tiny_engine, tower_of, write_tiny
from vla2cli.config import GenerationChoice
from vla2cli.engine import (
    Ask,
    Engine,
    MediaTokens,
    find_flags,
    is_repeating,
    pick_device,
    pick_dtype,
    read_geometry,
)
from vla2cli.engines.base import Generation
from vla2cli.errors import ModelError, UsageError
from vla2cli.prompt import Turn

CASE = "mistral_clip_stc_8f"
# seven lengths
QUESTIONS = (
    "a",
    "please describe the video in detail.",
    "what happens in 7?",
    "the sun sets behind the hills while a person walks away on the road, slowly, unseen, 100%",
    "two shapes, one ball, no bell",
    "the ball bounces, the rain falls and the rocket rises into the sky",
    "QUIET? NO, LOUD: 12345",
)


def golden_ask(case, run):
    """What the reference was asked, with our visual tokens from its pixels."""
    engine = golden_engine(case)
    about = runs_of(case)[run]
    media = MediaTokens()
    if about["modal"] != "text":
        features = features_of(case, "cap" if run == "mt" else run)
        media = MediaTokens(visual=engine.frontend.visual_tokens([features])[0])
    if isinstance(about["instruct"], str):
        return Ask(about["instruct"], about["modal"], media)
    first, answer, second = (message["content"] for message in about["instruct"])
    return Ask(second, about["modal"], media, (Turn(first, answer),))


def golden_settings(case, run):
    length = runs_of(case)[run]["max_new_tokens"]
    return golden_engine(case).settings(GenerationChoice(max_new_tokens=length))


@pytest.mark.parametrize(("case", "run"), RUNS, ids=["-".join(run) for run in RUNS])
def test_answer_matches_reference(case, run):
    expected, about = tensors_of(case, run), runs_of(case)[run]
    ask = golden_ask(case, run)
    (answer,) = golden_engine(case).answer([ask], golden_settings(case, run))
    assert list(answer.generation.ids) == expected["generated_ids"].tolist()
    assert answer.text == about["text"]
    assert (answer.num_prompt, answer.num_visual) == (
        about["spliced_len"],
        about["n_visual_tokens"],
    )
    assert answer.flags == ()
    found = {"first_logits": answer.generation.first_logits}
    assert_stages_match(f"{case} {run}", found, expected)


@pytest.mark.parametrize(("case", "run"), RUNS, ids=["-".join(run) for run in RUNS])
def test_logits_of_every_step_match_reference(case, run):
    engine, expected = golden_engine(case), tensors_of(case, run)
    ask = golden_ask(case, run)
    model = engine.model.language_model
    said = expected["generated_ids"]
    with torch.inference_mode():
        prompt = engine.embed(engine.prompt(ask), ask.media)
        embeds = torch.cat([prompt, model.get_input_embeddings()(said[:-1])])
        logits = model(inputs_embeds=embeds[None], logits_to_keep=len(said)).logits[0]
    assert_stages_match(f"{case} {run}", {"step_logits": logits}, expected)


def test_log_probability_of_the_cached_decode_is_the_references():
    # the reference's logits come from whole forward passes, ours from a cache
    expected = tensors_of(CASE, "cap")
    (answer,) = golden_engine(CASE).answer([golden_ask(CASE, "cap")], golden_settings(CASE, "cap"))
    logprobs = expected["step_logits"].log_softmax(-1)
    mean = logprobs.gather(-1, expected["generated_ids"][:, None]).mean().item()
    assert answer.generation.logprob_mean == pytest.approx(mean, abs=1e-4)


def test_ragged_batch_gives_the_references_ids():
    runs = [run for case, run in RUNS if case == CASE]
    asks = [golden_ask(CASE, run) for run in runs]
    answers = golden_engine(CASE).answer(asks, golden_settings(CASE, "cap"))
    assert len({answer.num_prompt for answer in answers}) == len(runs)
    for run, answer in zip(runs, answers, strict=True):
        assert answer.text == runs_of(CASE)[run]["text"]
        assert list(answer.generation.ids) == tensors_of(CASE, run)["generated_ids"].tolist()


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_sampled_text_does_not_depend_on_the_batch(batch):
    engine = tiny_engine()
    settings = engine.settings(GenerationChoice(max_new_tokens=16, temperature=0.8, seed=1))
    asks = [Ask(question, "text", seed=i) for i, question in enumerate(QUESTIONS)]
    whole = [answer.text for answer in engine.answer(asks, settings)]
    parts = [
        answer.text
        for start in range(0, len(asks), batch)
        for answer in engine.answer(asks[start : start + batch], settings)
    ]
    assert parts == whole
    greedy_texts = [
        a.text for a in engine.answer(asks, dataclasses.replace(settings, temperature=0))
    ]
    assert all(a != b for a, b in zip(whole, greedy_texts, strict=True))


def test_seed_decides_what_is_drawn():
    engine = tiny_engine()
    settings = engine.settings(GenerationChoice(max_new_tokens=16, temperature=1.0))
    asks = [Ask("a red car", "text", seed=seed) for seed in (5, 6, 5)]
    first, other, again = (answer.text for answer in engine.answer(asks, settings))
    assert first == again != other


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_weights_that_are_not_finite_are_flagged(tmp_path, value, temperature):
    folder = write_tiny(tmp_path)
    engine = Engine(open_tiny(folder), device="cpu", dtype="float32")
    engine.model.language_model.model.norm.weight[7] = value
    settings = engine.settings(GenerationChoice(max_new_tokens=4, temperature=temperature))
    (answer,) = engine.answer([Ask("what happens?", "text")], settings)
    assert answer.flags == ("empty", "not-finite")
    assert answer.text == ""
    assert (answer.generation.ids, answer.generation.logprob_mean) == ((), None)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], False),
        ([5] * 15, False),
        ([5] * 16, True),
        (list(range(100)), False),
        (list(range(20)) + [5] * 16, True),
        ([5] * 16 + [6], False),
        ([1, 2, 3] * 6, True),
        ([1, 2, 3] * 5, False),
        ([9, *[1, 2, 3] * 5, 1], True),
        (list(range(64)) * 4, True),
        (list(range(64)) * 3, False),
        (list(range(65)) * 5, False),
    ],
    ids=lambda value: f"{len(value)}" if isinstance(value, list) else str(value),
)
def test_repeating_end_is_found(ids, expected):
    assert is_repeating(ids) is expected


def generation(ids, reason="length", is_finite=True):
    logprobs = (-1.0,) * len(ids)
    return Generation(tuple(ids), logprobs, reason, is_finite, torch.zeros(1), 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "of", "flags"),
    [
        ("words", generation([1, 2, 3]), ()),
        ("", generation([2], "stop"), ("empty",)),
        ("la la", generation([5] * 20), ("repeating",)),
        ("la la", generation([*[5] * 20, 2], "stop"), ("repeating",)),
        ("", generation([], "stop", is_finite=False), ("empty", "not-finite")),
    ],
    ids=["none", "empty", "cut_loop", "ended_loop", "not_finite"],
)
def test_flags_name_what_makes_a_text_no_answer(text, of, flags):
    assert find_flags(text, of) == flags


@pytest.mark.parametrize("name", ["tpu", "mps", "meta", "", "cuda:x", "cpu:"])
def test_unknown_device_is_refused(name):
    with pytest.raises(UsageError, match=f"'--device {name}': expected auto, cpu, cuda or cuda:N"):
        pick_device(name)


def test_missing_gpu_is_refused_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="no CUDA device"):
        pick_device("cuda")


def test_gpu_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="there are 2 CUDA devices"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["fp16", "int8", "", "torch.float32"])
def test_unknown_dtype_is_refused(name):
    expected = "expected auto, float32, float16, bfloat16"
    with pytest.raises(UsageError, match=f"'--dtype {name}': {expected}"):
        pick_dtype(name, torch.device("cpu"))


def test_auto_dtype_follows_the_device():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16


def test_bfloat16_engine_answers():
    engine = Engine(tiny_engine().checkpoint, device="cpu", dtype="bfloat16")
    (answer,) = engine.answer(
        [Ask("a red car", "text")], engine.settings(GenerationChoice(max_new_tokens=4))
    )
    assert len(answer.generation.ids) == 4
    assert answer.generation.first_logits.dtype == torch.float32
    assert engine.backends["dtype"] == "bfloat16"


def test_tokenizer_of_another_model_is_refused(tmp_path):
    folder = write_tiny(tmp_path, vocab_size=300)
    shutil.copy(golden(f"checkpoints/{CASE}") / "tokenizer.model", folder)
    with pytest.raises(ModelError, match="has 700 tokens, the model's vocabulary 300"):
        _ = Engine(open_tiny(folder), device="cpu").tokenizer


def test_preprocessor_that_is_not_understood_is_a_model_error(tmp_path):
    folder = write_tiny(tmp_path)
    change_json(tower_of(folder) / "preprocessor_config.json", do_rescale=False)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json is not understood: 'do_resc"):
        read_geometry(open_tiny(folder))


def test_identity_names_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_tiny(tmp_path / "hub")
    identity = Engine(open_tiny(folder), device="cpu").identity
    assert (identity["id"], identity["revision"]) == (str(folder), None)
    assert len(identity["sha256"]) == 64
    assert (tmp_path / "cache/vla2/weights.json").exists()


def test_preprocessor_of_another_size_is_refused(tmp_path):
    folder = write_tiny(tmp_path)
    change_json(
        tower_of(folder) / "preprocessor_config.json", crop_size={"height": 70, "width": 70}
    )
    engine = Engine(open_tiny(folder), device="cpu")
    with pytest.raises(ModelError, match="makes frames of 70 x 70, the tower takes 56 x 56"):
        engine.check()


def test_added_token_beyond_the_vocabulary_is_refused(tmp_path):
    folder = write_tiny(tmp_path)
    added = {"9999": {"content": "<far>", "special": True}}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    engine = Engine(open_tiny(folder), device="cpu")
    with pytest.raises(ModelError, match="has 10000 tokens, the model's vocabulary 512"):
        engine.check()


def test_added_tokens_that_are_none_are_refused(tmp_path):
    folder = write_tiny(tmp_path)
    change_json(folder / "tokenizer_config.json", added_tokens_decoder={"x": {}})
    engine = Engine(open_tiny(folder), device="cpu")
    with pytest.raises(ModelError, match="added_tokens_decoder of tokenizer_config"):
        engine.check()


def test_small_context_is_no_fault_of_the_checkpoint_but_too_long_a_text_is_refused(tmp_path):
    engine = Engine(open_tiny(write_tiny(tmp_path, max_position_embeddings=256)), device="cpu")
    engine.check()
    with pytest.raises(UsageError, match="'--max-new-tokens 257': the model's context is 256"):
        engine.settings(GenerationChoice(max_new_tokens=257))
