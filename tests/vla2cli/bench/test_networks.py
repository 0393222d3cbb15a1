"""Which networks are built, how large, and what is refused before the memory is full."""

import pytest
import torch

from tests.tiny import tiny_engine
from vla2_models.loading import load_model
from vla2cli.bench.networks import Networks, cut_layers, find_spec, spec_config
from vla2cli.errors import ModelError, UsageError

CPU = torch.device("cpu")


def test_front_has_no_language_model_and_the_language_model_no_front():
    engine = tiny_engine()
    networks = Networks(engine.checkpoint.config, CPU, load_model(engine.checkpoint).state_dict())
    front, language = networks.front(torch.bfloat16), networks.language(torch.float32)
    assert all(p.is_meta for p in front.language_model.parameters())
    assert {p.dtype for part in front.front for p in part.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in language.parameters())


def test_stored_weights_of_the_same_dtype_are_shared_and_not_copied():
    engine = tiny_engine()
    stored = load_model(engine.checkpoint).state_dict()
    front = Networks(engine.checkpoint.config, CPU, stored).front(torch.float32)
    for name, weight in front.mm_projector.state_dict().items():
        assert weight.data_ptr() == stored[f"mm_projector.{name}"].data_ptr()


def test_cut_model_runs_the_first_layers_of_the_whole_one():
    engine = tiny_engine()
    config = cut_layers(engine.checkpoint.config, 1)
    assert engine.checkpoint.config.language.num_hidden_layers == 2
    whole = load_model(engine.checkpoint)
    language = Networks(config, CPU, whole.state_dict()).language(torch.float32)
    [layer] = language.model.layers
    first = whole.language_model.model.layers[0]
    for name, weight in layer.state_dict().items():
        assert torch.equal(weight, first.state_dict()[name])


@pytest.mark.parametrize("num_layers", [0, 3])
def test_layers_that_there_are_not_are_refused(num_layers):
    with pytest.raises(UsageError, match=f"'--layers {num_layers}': the language model has 1 to 2"):
        cut_layers(tiny_engine().checkpoint.config, num_layers)


@pytest.mark.parametrize("name", ["VideoLLaMA2-72B", "DAMO-NLP-SG/VideoLLaMA2-72B"])
def test_spec_is_found_with_and_without_its_owner(name):
    assert find_spec(name).id == "DAMO-NLP-SG/VideoLLaMA2-72B"


def test_model_beyond_the_memory_is_refused_before_it_is_built():
    # 72.7 billion parameters
    with pytest.raises(ModelError, match=r"needs 290\.8 GB more in float32, .* give fewer"):
        Networks(spec_config("VideoLLaMA2-72B"), CPU).language(torch.float32)
