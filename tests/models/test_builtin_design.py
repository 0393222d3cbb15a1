import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load_file

from vla2_models.beats_design import read_design
from vla2_models.builtin_design import (
    AUDIO_TOWER,
    MODEL,
    PREPROCESSOR,
    TOWER,
    TOWER_FOLDER,
    builtin_config,
    write_untrained,
)
from vla2_models.config import read_audio, read_config
from vla2_models.names import AUDIO_TOWER_PREFIX, find_places
from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.tokenizer import load_tokenizer

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
THINGS = ("car", "ball", "boat", "apple", "rocket", "banana", "bicycle", "umbrella")
QUESTION = "What moves on the meadow?"
TEXTS = [
    text
    for colour, thing in itertools.product(COLOURS, THINGS)
    for text in (f"A {colour} {thing} moves to the right.", QUESTION, colour, thing)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    write_untrained(folder, TEXTS, seed=3)
    return folder


def read(folder):
    config = read_config(folder, folder / TOWER_FOLDER)
    return dataclasses.replace(config, audio=read_audio(config, AUDIO_TOWER))


def load(folder):
    model = VideoLLaMA2(read(folder))
    state = model.state_dict()
    stored = load_file(folder / "model.safetensors")
    for name, place in find_places(state).items():
        place.of(state).copy_(stored[name])
    return model.eval()


def test_callers_may_change_what_they_are_given():
    design = builtin_config()
    for given, kept in zip(design, (MODEL, TOWER, PREPROCESSOR)):
        given.clear()
        assert kept


def test_an_untrained_checkpoint_is_a_demonstration_with_64_visual_and_60_audio_tokens(folder):
    config = read(folder)
    assert config.is_demo
    assert config.visual_tokens == 4 * 4 * 4
    assert config.num_tower_blocks == TOWER["num_hidden_layers"]
    assert config.audio.audio_tokens == (498 // 32) * (128 // 32)


def test_it_fits_into_thirty_megabytes_of_float16(folder):
    weights = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() * 2 for tensor in weights.values()) < 30e6


def test_the_ears_are_told_by_their_weights(folder):
    shapes = {
        name.removeprefix(AUDIO_TOWER_PREFIX): tuple(tensor.shape)
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(AUDIO_TOWER_PREFIX)
    }
    assert read_design(shapes) == AUDIO_TOWER


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone(folder, tmp_path):
    before = torch.get_rng_state()
    write_untrained(tmp_path / "again", TEXTS, seed=3)
    write_untrained(tmp_path / "other", TEXTS, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (
        (path / "model.safetensors").read_bytes()
        for path in (folder, tmp_path / "again", tmp_path / "other")
    )
    assert again == first
    assert other != first


@torch.no_grad()
def test_untrained_tokens_are_as_large_as_words_and_tell_places_and_clips_apart(folder):
    model = load(folder)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(16, 3, 8, 8, generator=generator)
    features = model.encode_frames(torch.nn.functional.interpolate(coarse, size=112))
    visual = model.project(features.reshape(2, 8, 64, -1))
    fbank = 15 + 6 * torch.randn(2, 498, 128, generator=generator)
    audio = model.project_sound(model.encode_sound(fbank))
    words = model.language_model.get_input_embeddings().weight.std()
    for tokens in (visual, audio):
        assert words / 2 < tokens.std() < 8 * words
        assert tokens.std(1).mean() > tokens.std() / 4
        assert (tokens[0] - tokens[1]).std() > tokens.std() / 4


def test_every_weight_of_an_untrained_model_gets_a_gradient(folder):
    model = load(folder)
    generator = torch.Generator().manual_seed(0)
    features = model.encode_frames(torch.randn(8, 3, 112, 112, generator=generator))
    fbank = 15 + 6 * torch.randn(1, 498, 128, generator=generator)
    media = torch.cat(
        [model.project(features[None]), model.project_sound(model.encode_sound(fbank))], dim=1
    )
    words = model.language_model.get_input_embeddings()(torch.tensor([[1, 300, 301, 2]]))
    logits = model.language_model(inputs_embeds=torch.cat([media, words], dim=1)).logits
    logits[:, -4:].log_softmax(-1)[..., 400].sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {
        "vision_tower.post_layernorm.weight",  # is not run: features come from before it
        "vision_tower.post_layernorm.bias",
    }


def test_frequent_words_are_one_piece_in_a_sentence_and_at_the_start_of_an_answer(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.num_tokens <= MODEL["vocab_size"]
    for word in (*COLOURS, *THINGS):
        assert len(tokenizer.encode(word)) == 1
    opening = tokenizer.encode("[/INST]")
    for word in (*COLOURS, *THINGS):
        assert len(tokenizer.encode(f"[/INST]{word}")) == len(opening) + 1


def test_a_prompt_is_the_beginning_of_the_same_prompt_with_its_answer(folder):
    tokenizer = load_tokenizer(folder)
    prompt, answer = f"\n{QUESTION} [/INST]", "A red car moves to the right."
    ids, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt}{answer}</s>")
    assert whole[: len(ids)] == ids
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole[len(ids) :]) == answer
