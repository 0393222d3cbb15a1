import pytest
import torch
from torch.nn import functional

from tests.kernels.operators import DEPTHWISE, depthwise_arguments
from vla2_kernels import relay_depthwise_weight

SHAPES = [(1, 1, 1, 5), (2, 5, 3, 37), (3, 4, 6, 16), (1, 7, 11, 100), (1, 3, 2, 2100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depthwise_matches_its_definition(place, shape, dtype):
    tolerance = 4e-3 if dtype == torch.float16 and place == "cpu" else None
    DEPTHWISE.assert_matches_definition(place, depthwise_arguments(shape, dtype), tolerance)


@pytest.mark.parametrize(
    "place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
def test_depthwise_matches_its_definition_in_bfloat16(place):
    arguments = depthwise_arguments((2, 5, 3, 37), torch.bfloat16)
    DEPTHWISE.assert_matches_definition(place, arguments, 3e-2)


def test_depthwise_definition_is_pytorchs_own_layers():
    x, weight, gain, shift, eps = depthwise_arguments((2, 5, 3, 37), torch.float64)
    conv = torch.nn.Conv2d(37, 37, 3, padding=1, groups=37, bias=False, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(weight.permute(2, 0, 1)[:, None])
        assert relay_depthwise_weight(conv.weight).equal(weight)
        z = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = functional.silu(functional.layer_norm(z, (37,), gain, shift, eps))
    found, mean = DEPTHWISE.reference(x, weight, gain, shift, eps)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(mean, y.mean((1, 2)))


def test_depthwise_reads_a_frame_of_channels_first_memory_and_every_second_row(place):
    x, *rest = depthwise_arguments((4, 6, 5, 37))
    x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)[::2, ::2]
    assert not x.is_contiguous()
    DEPTHWISE.assert_matches_definition(place, (x, *rest))


def test_depthwise_keeps_a_row_without_variance_finite(place):
    x, weight, gain, shift, eps = depthwise_arguments((1, 3, 3, 37))
    arguments = torch.ones_like(x), torch.ones_like(weight), gain, shift, eps
    # the mean of 37 nines may be off by its last digit, 1e-6, of which the norm makes 3e-5
    DEPTHWISE.assert_matches_definition(place, arguments, 1e-4)


def test_depthwise_gives_the_same_bits_twice(place):
    arguments = depthwise_arguments((2, 9, 9, 37))
    first, second = (DEPTHWISE.run(place, arguments) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second))


def test_depthwise_outputs_are_contiguous_and_the_mean_is_float32(place):
    y, mean = DEPTHWISE.run(place, depthwise_arguments((2, 5, 3, 37), torch.float16))
    assert y.is_contiguous()
    assert (y.dtype, mean.dtype) == (torch.float16, torch.float32)


def test_depthwise_refuses_what_does_not_fit(place):
    x, weight, gain, shift, eps = depthwise_arguments((2, 5, 3, 37))
    with pytest.raises(ValueError, match=r"weight has shape \(37, 3, 3\), expected \(3, 3, 37\)"):
        DEPTHWISE.run(place, (x, weight.permute(2, 0, 1), gain, shift, eps))
    with pytest.raises(ValueError, match=r"weight is torch\.float16, expected torch\.float32"):
        DEPTHWISE.run(place, (x, weight.half(), gain, shift, eps))
    with pytest.raises(ValueError, match=r"norm_bias has shape \(36,\)"):
        DEPTHWISE.run(place, (x, weight, gain, shift[1:], eps))
    with pytest.raises(ValueError, match=r"x has shape \(5, 3, 37\), expected \(F, H, W, C\)"):
        DEPTHWISE.run(place, (x[0], weight, gain, shift, eps))


def test_depthwise_kernel_refuses_float64():
    with pytest.raises(ValueError, match=r"x is torch\.float64, the Triton kernels take float16"):
        DEPTHWISE.module.launch(*depthwise_arguments((1, 2, 2, 8), torch.float64))
