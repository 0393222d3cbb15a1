"""Random arguments for each operator, ways to run it, and how near its definition it must come."""

from dataclasses import dataclass
from types import ModuleType

import torch

from tests.kernels.buffers import guarded
from vla2_kernels import conv3d, depthwise, norm

torch.set_num_threads(1)  # as in tests/tiny.py
HAS_GPU = torch.cuda.is_available()

# float32 allows for another order of summation; the halves for the rounding of y, twice that for
# each further rounding of the CPU forms
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Operator:
    """An operator's file and name."""

    module: ModuleType
    name: str

    @property
    def function(self):
        return getattr(self.module, self.name)

    @property
    def overload(self):
        """What PyTorch's graphs call it."""
        return getattr(torch.ops.vla2, self.name).default

    @property
    def reference(self):
        return getattr(self.module, f"{self.name}_reference")

    def run(self, place, arguments):
        """Run it; a kernel gets each contiguous tensor in the midst of NaN."""
        if place == "cpu":
            return self.function(*arguments)
        if place == "kernel":
            return self.module.launch(*(_amid_nan(argument, "cpu") for argument in arguments))
        found = self.function(*(_amid_nan(argument, "cuda") for argument in arguments))
        return tuple(t.cpu() for t in found) if isinstance(found, tuple) else found.cpu()

    def define(self, arguments):
        """Compute what its definition says, in float64."""
        return self.reference(
            *(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
        )

    def assert_matches_definition(self, place, arguments, tolerance=None):
        found, expected = self.run(place, arguments), self.define(arguments)
        dtype = arguments[0].dtype
        allowed = tolerance or TOLERANCE[dtype]
        pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
        for tensor, wanted in pairs:
            torch.testing.assert_close(tensor.double(), wanted, atol=allowed, rtol=allowed)


DEPTHWISE = Operator(depthwise, "depthwise_norm_silu_pool")
NORM = Operator(norm, "norm_scale_residual_silu")
CONV3D = Operator(conv3d, "conv3d_silu")


def depthwise_arguments(shape, dtype=torch.float32, eps=1e-3):
    """A large eps shows in the result, and so does its place."""
    draw, channels = _drawer(shape, dtype), shape[-1]
    return draw(*shape), draw(3, 3, channels) / 3, draw(channels), draw(channels), eps


def norm_arguments(shape, dtype=torch.float32, eps=1e-3, has_scale=True, has_residual=True):
    draw, channels = _drawer(shape, dtype), shape[-1]
    x, gain, shift = draw(*shape), draw(channels), draw(channels)
    scale = draw(shape[0], channels) if has_scale else None
    return x, gain, shift, eps, scale, draw(*shape) if has_residual else None


def conv3d_arguments(shape, width, padding, dtype=torch.float32):
    draw, channels = _drawer(shape, dtype), shape[-1]
    weight = draw(2, 2, 2, channels, width) / (8 * channels) ** 0.5
    return draw(*shape), weight, draw(width), padding


def _drawer(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    return lambda *size: torch.randn(size, generator=generator).to(dtype)


def _amid_nan(argument, device):
    if not isinstance(argument, torch.Tensor):
        return argument
    moved = argument.to(device)
    return guarded(moved) if moved.is_contiguous() else moved
