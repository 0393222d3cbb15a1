import pytest
import torch

from vla2_models.loading import build_empty
from vla2_models.public import public_checkpoints
from vla2_models.sizes import full_size_config

every = pytest.mark.parametrize("public", public_checkpoints(), ids=lambda p: p.id.split("/")[1])


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@every
def test_full_size_has_the_parameters_that_the_facts_state(public):
    model = build_empty(full_size_config(public))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count(model.language_model) == public.num_language_parameters
    assert count(model.vision_tower) == public.num_tower_parameters
    assert count(model.mm_projector) == public.num_connector_parameters
    ears = [part for part in (model.audio_tower, model.mm_projector_a) if part is not None]
    assert sum(map(count, ears)) == public.num_audio_parameters
    assert count(model) == public.num_parameters


@every
def test_full_size_makes_as_many_tokens_as_the_facts_state(public):
    config = full_size_config(public)
    assert config.num_patches == public.grid_size**2
    assert config.visual_tokens == public.visual_tokens
    assert (config.audio.audio_tokens if config.audio else 0) == public.audio_tokens


@every
def test_full_size_runs_on_shapes_alone_with_one_block_left_out(public):
    config = full_size_config(public)
    model = build_empty(config).to("meta")
    size = config.vision.image_size
    with torch.inference_mode():
        features = model.encode_frames(torch.empty(2, 3, size, size, device="meta"))
        tokens = model.project(features[None])
    assert features.shape == (2, public.grid_size**2, config.mm_hidden_size)
    assert tokens.shape[2] == config.language.hidden_size
    assert config.num_tower_blocks == config.vision.num_hidden_layers - 1
