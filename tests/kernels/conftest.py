"""Where the kernels run in tests: on the GPU, or in Triton's interpreter where there is none."""

import functools

import pytest
import torch

from tests.kernels.buffers import Outputs
from tests.kernels.operators import HAS_GPU

triton = pytest.importorskip("triton")


@pytest.fixture(params=["kernel", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """Where an operator runs: its kernel in the interpreter, its CPU form, its kernel on a GPU."""
    if request.param == "cuda" and not HAS_GPU:
        pytest.skip("needs CUDA")
    if request.param == "kernel" and HAS_GPU:
        pytest.skip("the GPU runs the kernels here")
    return request.param


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Let kernels be interpreted: those decorated from now on, and Triton's own functions."""
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        for module, name, function in _interpreted_language():
            monkeypatch.setattr(module, name, function)


@functools.cache
def _interpreted_language():
    """Twins of Triton's own functions, which chose to be compiled when something imported them."""
    from triton.runtime.interpreter import InterpretedFunction

    twin = functools.cache(InterpretedFunction)
    return [
        (module, name, twin(value.fn))
        for module in (triton.language, triton.language.standard)
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction)
    ]


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    """Fill what the launchers allocate with NaN; find what is written beside it."""
    outputs = Outputs(torch.Tensor.new_empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", outputs.new_empty)
    yield outputs
    outputs.assert_nothing_is_written_beside()
