"""A whole RegStage made of the operators and of linear layers, against timm's."""

import pytest
import torch
from torch.nn import functional

from tests.kernels.operators import DEPTHWISE, NORM
from vla2_kernels import relay_depthwise_weight
from vla2_models.stc import build_stage

FRAMES, IN_CHANNELS, CHANNELS = (2, 5, 3), 12, 20


def linear(x, conv):
    """A 1x1 convolution of channels-last frames, or of one vector a frame."""
    return functional.linear(x, conv.weight.flatten(1), conv.bias)


def norm(bn):
    return bn.weight, bn.bias, bn.eps


def run_block(block, x, place):
    """Run a timm `Bottleneck` on (F, H, W, C); the gate comes before the last convolution."""
    weight, shift, eps = norm(block.conv1.bn)
    y = NORM.run(place, (linear(x, block.conv1.conv), weight, shift, eps))
    filters = relay_depthwise_weight(block.conv2.conv.weight)
    y, mean = DEPTHWISE.run(place, (y, filters, *norm(block.conv2.bn)))
    gate = linear(functional.silu(linear(mean, block.se.fc1)), block.se.fc2).sigmoid()
    y = linear(y * gate[:, None, None], block.conv3.conv)
    weight, shift, eps = norm(block.conv3.bn)
    return NORM.run(place, (y, weight, shift, eps, None, run_shortcut(block.downsample, x)))


def run_shortcut(shortcut, x):
    if isinstance(shortcut, torch.nn.Identity):
        return x
    bn = shortcut.bn
    y = linear(x, shortcut.conv)
    return functional.layer_norm(y, bn.weight.shape, bn.weight, bn.bias, bn.eps)


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    stage = build_stage(IN_CHANNELS, CHANNELS).eval().requires_grad_(False)
    for parameter in stage.parameters():  # timm begins with norms of one and zero
        if parameter.dim() == 1:
            parameter.normal_(std=0.5)
    return stage


@pytest.mark.parametrize("num_blocks", [1, 4], ids=["block", "stage"])
def test_regstage_of_the_operators_matches_timms(stage, place, num_blocks):
    blocks = list(stage.children())
    assert len(blocks) == 4
    x = torch.randn(*FRAMES, IN_CHANNELS, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.Sequential(*blocks[:num_blocks])(x.permute(0, 3, 1, 2))
    found = x
    for block in blocks[:num_blocks]:
        found = run_block(block, found, place)
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), atol=2e-5, rtol=2e-5)
