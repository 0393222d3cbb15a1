"""Where the kernels run in tests: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch

from tests.kernels.buffers import Outputs

INTERPRETED = not torch.cuda.is_available()

with pytest.MonkeyPatch.context() as patch:
    if INTERPRETED:
        # Triton decides at import whether its own functions are interpreted or compiled
        patch.setenv("TRITON_INTERPRET", "1")
    triton = pytest.importorskip("triton")


@pytest.fixture(params=["kernel", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """Where an operator runs: its kernel in the interpreter, its CPU form, its kernel on a GPU."""
    if (request.param == "cuda") == INTERPRETED and request.param != "cpu":
        pytest.skip("needs CUDA" if INTERPRETED else "the GPU runs the kernels here")
    return request.param


@pytest.fixture
def device():
    """Where a kernel takes its tensors."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert triton.knobs.runtime.interpret
        assert not isinstance(triton.language.sum, triton.JITFunction), (
            "triton was imported before tests/kernels/conftest.py: its functions are compiled, "
            "not interpreted"
        )


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    """Fill what the launchers allocate with NaN; find what is written beside it."""
    outputs = Outputs(torch.Tensor.new_empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", outputs.new_empty)
    yield outputs
    outputs.assert_nothing_is_written_beside()
