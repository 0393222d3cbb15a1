import pytest
import torch

from tests.kernels.operators import NORM, norm_arguments

SHAPES = [(1, 1, 1, 5), (2, 5, 3, 37), (3, 2, 4, 64), (1, 2, 1, 2100)]
PARTS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("has_scale", "has_residual"), PARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_matches_its_definition(place, shape, has_scale, has_residual, dtype):
    tolerance = 8e-3 if dtype == torch.float16 and place == "cpu" else None
    arguments = norm_arguments(shape, dtype, has_scale=has_scale, has_residual=has_residual)
    NORM.assert_matches_definition(place, arguments, tolerance)


@pytest.mark.parametrize(
    "place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
def test_norm_matches_its_definition_in_bfloat16(place):
    arguments = norm_arguments((2, 5, 3, 37), torch.bfloat16)
    NORM.assert_matches_definition(place, arguments, 6e-2 if place == "cpu" else None)


def test_norm_reads_strided_views(place):
    x, gain, shift, eps, scale, residual = norm_arguments((4, 6, 5, 37))
    view = residual.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)[::2, :, ::2]
    scale = scale.T.contiguous().T[::2]
    NORM.assert_matches_definition(place, (x[::2, :, ::2], gain, shift, eps, scale, view))


def test_norm_takes_a_float32_scale_for_a_half_precision_x(place):
    x, gain, shift, eps, scale, residual = norm_arguments((2, 5, 3, 37), torch.float16)
    tolerance = 8e-3 if place == "cpu" else None
    arguments = x, gain, shift, eps, scale.float(), residual
    NORM.assert_matches_definition(place, arguments, tolerance)
    assert NORM.run(place, arguments).dtype == torch.float16


def test_norm_keeps_a_row_without_variance_finite(place):
    x, *rest = norm_arguments((1, 2, 2, 37))
    NORM.assert_matches_definition(place, (torch.full_like(x, 3.0), *rest))


def test_norm_leaves_its_inputs_alone(place):
    arguments = norm_arguments((2, 5, 3, 37))
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    if place == "cuda":
        arguments = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    run = NORM.module.launch if place == "kernel" else NORM.function
    run(*arguments)
    pairs = zip(arguments, before, strict=True)
    assert all(a.cpu().equal(b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_norm_refuses_what_does_not_fit(place):
    x, gain, shift, eps, scale, residual = norm_arguments((2, 5, 3, 37))
    with pytest.raises(ValueError, match=r"norm_weight has shape \(36,\), expected \(37,\)"):
        NORM.run(place, (x, gain[1:], shift, eps, scale, residual))
    with pytest.raises(ValueError, match=r"scale has shape \(1, 37\), expected \(2, 37\)"):
        NORM.run(place, (x, gain, shift, eps, scale[:1], residual))
    with pytest.raises(ValueError, match=r"residual has shape \(1, 5, 3, 37\)"):
        NORM.run(place, (x, gain, shift, eps, scale, residual[:1]))
    with pytest.raises(ValueError, match=r"x has shape \(0, 5, 3, 37\)"):
        NORM.run(place, (x[:0], gain, shift, eps, None, None))
