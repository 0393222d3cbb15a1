"""Recorded passes say what plain ones say, whatever rows come and go."""

import pytest
import torch

from tests.tiny import tiny_language_model
from vla2cli.config import GenerationSettings
from vla2cli.engines.base import Request, run
from vla2cli.engines.hf import HFEngine
from vla2cli.engines.passes import can_record

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def ragged_requests(device, num=20):
    """Prompts of many lengths whose texts end at many others."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 300, (num,), generator=generator).tolist()
    ends = torch.randint(1, 200, (num,), generator=generator).tolist()
    return [
        Request(
            torch.randn(size, 64, generator=generator).to(device),
            GenerationSettings(eos_token_ids=(2,), max_new_tokens=end, repetition_penalty=1.2),
        )
        for size, end in zip(sizes, ends)
    ]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_ids_of_recorded_passes_are_those_of_the_cpu(family, num_rows):
    model = tiny_language_model(family)
    plain = run(HFEngine(model, num_rows), ragged_requests("cpu"))
    cuda = torch.device("cuda")
    model = tiny_language_model(family).to(cuda)
    assert can_record(model, cuda)
    recorded = run(HFEngine(model, num_rows), ragged_requests(cuda))
    assert [row.ids for row in recorded] == [row.ids for row in plain]


@pytest.mark.gpu
@needs_cuda
def test_a_mixture_of_experts_is_not_recorded_and_says_the_same():
    cuda = torch.device("cuda")
    plain = run(HFEngine(tiny_language_model("mixtral"), 3), ragged_requests("cpu"))
    model = tiny_language_model("mixtral").to(cuda)
    assert not can_record(model, cuda)
    assert [r.ids for r in run(HFEngine(model, 3), ragged_requests(cuda))] == [r.ids for r in plain]


def test_nothing_is_recorded_on_the_cpu():
    assert not can_record(tiny_language_model("mistral"), torch.device("cpu"))
