"""Checkpoints with ears, against the reference: from its own tensors to its ids."""

from contextlib import contextmanager

import pytest
import torch

from tests.goldens import AV_RUNS, about_av, assert_stages_match, golden_av_engine, tensors_of_av
from tests.tiny import tiny_av_engine, tiny_engine
from vla2cli.config import GenerationChoice
from vla2cli.engine import Ask, MediaTokens
from vla2cli.errors import UsageError
from vla2cli.plan import Sampling


def media_of(run):
    """What our towers and projectors make of the stored pixels and fbank, stage by stage."""
    engine, stored = golden_av_engine(), tensors_of_av(run)
    found = {}
    if "pixel_values" in stored:
        features = engine.frontend.vision_features([stored["pixel_values"].float()])
        found["vision_features"] = features[0]
        found["projector_tokens"] = engine.frontend.visual_tokens(features)[0]
    if "fbank_bf16" in stored:
        heard, tokens = engine.frontend.listen(stored["fbank_bf16"])
        found["beats_features"], found["audio_tokens"] = heard[0], tokens[0]
    return found


def ask_of(run, found):
    about = about_av(run)
    media = MediaTokens(found.get("projector_tokens"), found.get("audio_tokens"))
    return Ask(about["question"], about["modal"], media)


@contextmanager
def rotary_rounded_to_half(language_model):
    """The reference's cosines and sines, which were made while it was float16."""
    handle = language_model.model.rotary_emb.register_forward_hook(
        lambda module, args, output: tuple(part.half().float() for part in output)
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("run", AV_RUNS)
def test_every_stage_equals_the_reference(run):
    engine, stored = golden_av_engine(), tensors_of_av(run)
    found = media_of(run)
    ask = ask_of(run, found)
    prompt = engine.prompt(ask)
    assert prompt.text == about_av(run)["prompt"]
    assert list(prompt.input_ids) == about_av(run)["input_ids"]
    expected = {
        "vision_features": stored.get("vision_features"),
        "projector_tokens": stored["video_tokens"][0] if "video_tokens" in stored else None,
        "beats_features": stored["beats_features"][0] if "beats_features" in stored else None,
        "audio_tokens": stored["audio_tokens"][0] if "audio_tokens" in stored else None,
        "inputs_embeds": stored["inputs_embeds"][0],
        "first_logits": stored["logits_first"],
    }
    found["inputs_embeds"] = engine.embed(prompt, ask.media)
    settings = engine.settings(GenerationChoice(max_new_tokens=20))
    with rotary_rounded_to_half(engine.model.language_model):
        (answer,) = engine.answer([ask], settings)
    found["first_logits"] = answer.generation.first_logits
    assert_stages_match(run, found, expected)
    assert list(answer.generation.ids) == about_av(run)["output_ids"]


@pytest.mark.parametrize("run", AV_RUNS)
def test_ids_and_texts_equal_the_reference(run):
    engine, about = golden_av_engine(), about_av(run)
    (answer,) = engine.answer(
        [ask_of(run, media_of(run))], engine.settings(GenerationChoice(max_new_tokens=20))
    )
    assert list(answer.generation.ids) == about["output_ids"]
    assert answer.text == about["text"]
    (length,) = tensors_of_av(run)["attention_mask"].sum(-1).tolist()
    assert answer.num_prompt == length
    assert answer.num_visual == (0 if run == "audio" else 32)
    assert answer.num_audio == (0 if run == "video" else 1496)


def test_runs_of_all_kinds_share_a_batch():
    engine = golden_av_engine()
    asks = [ask_of(run, media_of(run)) for run in AV_RUNS]
    answers = engine.answer(asks, engine.settings(GenerationChoice(max_new_tokens=20)))
    ids = [list(answer.generation.ids) for answer in answers]
    assert ids == [about_av(run)["output_ids"] for run in AV_RUNS]


def test_sound_stands_behind_the_picture():
    # and the other way round gives another text
    engine, found = golden_av_engine(), media_of("av")
    media = ask_of("av", found).media
    assert torch.cat(media.parts()).equal(
        torch.cat([found["projector_tokens"], found["audio_tokens"]])
    )
    turned = Ask(
        about_av("av")["question"],
        "video",
        MediaTokens(found["audio_tokens"], found["projector_tokens"]),
    )
    (answer,) = engine.answer([turned], engine.settings(GenerationChoice(max_new_tokens=20)))
    assert list(answer.generation.ids) != about_av("av")["output_ids"]


@pytest.mark.parametrize(
    ("sampling", "flag"),
    [
        (Sampling(8, modality="audio"), "--modality audio"),
        (Sampling(8, modality="av"), "--modality av"),
        (Sampling(8, audio_start_s=0.0), "--audio-start"),
        (Sampling(8, audio_range="whole"), "--audio-range whole"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sound_is_refused_where_the_model_has_no_ears(sampling, flag):
    with pytest.raises(
        UsageError, match=f"^{flag} needs a model with an audio branch; .* has none"
    ):
        tiny_engine().check_sampling(sampling)
    tiny_av_engine().check_sampling(sampling)
