import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from tests.tiny import tiny_av_engine
from vla2_models.loading import load_model
from vla2cli.train.optimiser import Together, is_hidden_matrix, with_muon

RATE, MUON_RATE = 1e-3, 0.02
# of a tiny VideoLLaMA 2 with ears: one of each kind, by what a reader of their papers expects
TURNED = (
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
    "vision_tower.encoder.layers.0.mlp.fc1.weight",
    "mm_projector.readout.0.weight",
    "audio_tower.encoder.layers.0.fc2.weight",
    "mm_projector_a.0.weight",
    "language_model.model.layers.0.self_attn.v_proj.weight",
    "language_model.model.layers.1.mlp.down_proj.weight",
)
SCALED = (
    "vision_tower.embeddings.position_embedding.weight",
    "vision_tower.embeddings.patch_embedding.weight",
    "vision_tower.embeddings.class_embedding",
    "vision_tower.encoder.layers.0.layer_norm1.weight",
    "vision_tower.encoder.layers.0.self_attn.q_proj.bias",
    "mm_projector.s1.b1.conv1.conv.weight",  # 1 x 1, four axes
    "audio_tower.encoder.layers.0.self_attn.relative_attention_bias.weight",
    "audio_tower.encoder.layers.0.self_attn.grep_linear.weight",  # eight rows
    "language_model.model.embed_tokens.weight",
    "language_model.lm_head.weight",
)


def network_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 24), nn.LayerNorm(24), nn.Linear(24, 17), nn.Linear(17, 3))


def together(network, **changes):
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return with_muon(AdamW(groups, lr=RATE, betas=(0.8, 0.9), **changes), network, MUON_RATE)


def train(network, optimisers, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        network(torch.randn(5, 20, generator=generator)).square().sum().backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()


def assert_same(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.equal(b)


def test_both_step_as_they_do_apart():
    joined, apart = network_of(), network_of()
    hidden = [apart[0].weight, apart[2].weight]
    bare = [p for p in apart.parameters() if p.ndim == 1]
    settings = {"lr": RATE, "betas": (0.8, 0.9)}
    optimisers = [
        Muon(hidden, lr=MUON_RATE, weight_decay=0.1),
        AdamW([apart[3].weight], weight_decay=0.1, **settings),  # three rows: too few to turn
        AdamW(bare, weight_decay=0.0, **settings),
    ]
    train(joined, [together(joined)], 3)
    train(apart, optimisers, 3)
    assert_same(joined, apart)


def test_an_update_of_muon_is_orthogonal():
    network = nn.Linear(20, 24, bias=False)
    nn.init.zeros_(network.weight)  # nothing that could decay
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 20, generator=generator)).Q for n in (24, 20))
    network.weight.grad = left * torch.linspace(1, 5, 20) @ right.T
    with_muon(AdamW(network.parameters()), network, MUON_RATE).step()
    # the paper's scale for 24 rows of 20; five of its iterations come no nearer to 1 than this
    values = torch.linalg.svdvals(network.weight.detach()) / (MUON_RATE * (24 / 20) ** 0.5)
    assert 0.65 < values.min() < values.max() < 1.25


def test_a_state_goes_on_to_the_same_bytes(tmp_path):
    whole, halves = network_of(), network_of()
    train(whole, [together(whole)], 5)
    first = together(halves)
    train(halves, [first], 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = together(halves)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(halves, [second], 3, first=2)
    assert_same(whole, halves)


def test_a_schedule_changes_the_rates_of_both():
    network = network_of()
    optimiser = together(network)
    schedule = LambdaLR(optimiser, lambda step: 1 / (1 + step))
    optimiser.load_state_dict(optimiser.state_dict())  # which makes new groups
    train(network, [optimiser], 1)
    schedule.step()
    rates = [[group["lr"] for group in part.param_groups] for part in optimiser.parts]
    assert rates == [[MUON_RATE / 2], [RATE / 2, RATE / 2]]


def test_matrices_between_widths_are_turned_and_the_rest_is_scaled():
    parameters = dict(load_model(tiny_av_engine().checkpoint).named_parameters())
    assert [name for name in TURNED if not is_hidden_matrix(name, parameters[name])] == []
    assert [name for name in SCALED if is_hidden_matrix(name, parameters[name])] == []


@pytest.mark.parametrize("shape", [(3, 40), (40,)], ids=["narrow", "vector"])
def test_a_network_without_hidden_matrices_is_scaled_alone(shape):
    network = nn.Module()
    network.only = nn.Parameter(torch.ones(shape))
    optimiser = with_muon(AdamW(network.parameters(), lr=RATE), network, MUON_RATE)
    assert [type(part) for part in optimiser.parts] == [AdamW]
    assert isinstance(optimiser, Together)
