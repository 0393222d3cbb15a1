"""Faults put into the kernels' source by hand: the numbers must tell each of them.

The unchanged source goes the same way and must pass, else a failure would prove nothing.
"""

import pytest

from tests.kernels.operators import (
    CONV3D,
    DEPTHWISE,
    HAS_GPU,
    NORM,
    conv3d_arguments,
    depthwise_arguments,
    norm_arguments,
)
from tests.mutants import changed
from vla2_kernels.jit import Kernel

# nothing a power of two, a last tile that is not full, several clips and frames
CALLS = {
    DEPTHWISE: depthwise_arguments((2, 7, 5, 37)),
    NORM: norm_arguments((2, 3, 2, 37)),
    CONV3D: conv3d_arguments((2, 3, 4, 5, 37), 70, 1),
}
MUTANTS = {
    "depthwise: sums past the last position": (
        DEPTHWISE,
        "_depthwise_kernel",
        "tl.where(is_position[:, None], y, 0.0)",
        "y",
    ),
    "depthwise: keeps the last partial sum alone": (
        DEPTHWISE,
        "_depthwise_kernel",
        "total += ",
        "total = ",
    ),
    "depthwise: eps for masked channels too": (
        DEPTHWISE,
        "_depthwise_kernel",
        "tl.sum(centred * centred, axis=1) / channels + eps",
        "tl.sum(centred * centred + eps, axis=1) / channels",
    ),
    "depthwise: no SiLU": (DEPTHWISE, "_depthwise_kernel", "y = y * tl.sigmoid(y)", "y = y"),
    "depthwise: rows not padded": (DEPTHWISE, "_depthwise_kernel", "tap // 3 - 1", "tap // 3"),
    "depthwise: taps transposed": (
        DEPTHWISE,
        "_depthwise_kernel",
        "weight_ptr + tap * channels",
        "weight_ptr + (tap % 3 * 3 + tap // 3) * channels",
    ),
    "depthwise: wraps around the left edge": (
        DEPTHWISE,
        "_depthwise_kernel",
        " & (column >= 0)",
        "",
    ),
    "depthwise: reads past the channels": (
        DEPTHWISE,
        "_depthwise_kernel",
        "mask=is_inside[:, None] & is_channel[None, :]",
        "mask=is_inside[:, None]",
    ),
    "norm: variance counts masked channels": (
        NORM,
        "_norm_kernel",
        "tl.where(is_channel, x - mean, 0.0)",
        "x - mean",
    ),
    "norm: eps outside the root": (
        NORM,
        "_norm_kernel",
        " / channels + eps)",
        " / channels) + eps",
    ),
    "norm: no shift": (NORM, "_norm_kernel", "gain + shift", "gain"),
    "norm: residual dropped": (NORM, "_norm_kernel", "y + residual.to", "y + 0 * residual.to"),
    "norm: first frame's scale": (NORM, "_norm_kernel", "row // num_positions", "row * 0"),
    "norm: no SiLU": (NORM, "_norm_kernel", "y = y * tl.sigmoid(y)", "y = y"),
    "norm: writes past the channels": (
        NORM,
        "_norm_kernel",
        "y, mask=is_channel)",
        "y)",
    ),
    "conv3d: bias dropped": (CONV3D, "_conv3d_kernel", "acc += tl.load", "acc += 0 * tl.load"),
    "conv3d: no SiLU": (CONV3D, "_conv3d_kernel", "acc * tl.sigmoid(acc)", "acc"),
    "conv3d: rows and columns of taps swapped": (
        CONV3D,
        "_conv3d_kernel",
        "tap // 2 % 2) * width + tap % 2",
        "tap % 2) * width + tap // 2 % 2",
    ),
    "conv3d: last tap left out": (
        CONV3D,
        "_conv3d_kernel",
        "range(tl.load(taps_ptr + tile * 9))",
        "range(tl.load(taps_ptr + tile * 9) - 1)",
    ),
    "conv3d: reads past the channels": (
        CONV3D,
        "_conv3d_kernel",
        "mask=is_k[None, :]",
        "mask=k[None, :] >= 0",
    ),
    "conv3d: stores what fills a tile": (
        CONV3D,
        "_conv3d_kernel",
        "(target >= 0)[:, None]",
        "(target >= -1)[:, None]",
    ),
    "conv3d: padding on the other side": (CONV3D, "_find_taps", "* 2 - padding for n", "* 2 for n"),
    "conv3d: stride 1": (CONV3D, "_find_taps", "* 2 - padding for n", "- padding for n"),
    "conv3d: every clip the first": (
        CONV3D,
        "_find_taps",
        "[:, None, None, None] * T",
        "[:, None, None, None] * 0",
    ),
}


@pytest.fixture
def run_changed(monkeypatch, tmp_path, outputs):
    """Run an operator's kernel with part of its file changed, and hold it to the definition."""

    def run(operator, name, old, new):
        module = operator.module
        function = getattr(module, name)
        plain = function.function if isinstance(function, Kernel) else function
        mutant = changed(plain, old, new, tmp_path / f"{name}.py")
        monkeypatch.setattr(module, name, mutant)
        operator.assert_matches_definition("cuda" if HAS_GPU else "kernel", CALLS[operator])
        outputs.assert_nothing_is_written_beside()

    CONV3D.module._planned.cache_clear()
    yield run
    CONV3D.module._planned.cache_clear()
    outputs.forget()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_numbers_tell_a_faulty_kernel(run_changed, mutant):
    with pytest.raises(AssertionError, match=r"Tensor-likes are not close|written"):
        run_changed(*MUTANTS[mutant])


@pytest.mark.parametrize(
    ("operator", "name"), sorted({(m[0], m[1]) for m in MUTANTS.values()}, key=lambda m: m[1])
)
def test_unchanged_source_passes_the_same_way(run_changed, operator, name):
    run_changed(operator, name, f"def {name}(", f"def {name}(")
