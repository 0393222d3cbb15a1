"""The front-ends on a CUDA device, held to plain PyTorch on the CPU."""

import functools

import pytest
import torch

from tests.goldens import (
    ATOL,
    RUNS,
    assert_stages_match,
    golden_engine,
    pixels_of,
    runs_of,
    tensors_of,
)
from vla2_models.loading import load_model
from vla2cli.config import GenerationChoice
from vla2cli.engine import Ask, Engine, MediaTokens
from vla2cli.errors import FrontendError
from vla2cli.frontend.choice import FrontendChoice
from vla2cli.frontend.pytorch import TorchFrontend
from vla2cli.prompt import Turn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

CASES = ("mistral_clip_stc_8f", "mistral_clip_stc_16f_336", "qwen2_siglip_stcv35_16f_384")
# of what is about 2 to 3 large; half precision is held to its own rounding
RELATIVE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
CHOICES = {
    "torch": FrontendChoice("torch"),
    "triton": FrontendChoice("torch", "triton"),
    "onnx": FrontendChoice("onnx"),
    "onnx and triton": FrontendChoice("onnx", "triton"),
    "tensorrt": FrontendChoice("onnx", use_tensorrt=True),
}


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("case", CASES)
def test_tokens_on_cuda_are_those_of_plain_pytorch(case, name, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine, device = golden_engine(case), torch.device("cuda", 0)
    pixels = [pixels_of(case, "cap")]
    plain = TorchFrontend(engine.model)
    (wanted,) = plain.visual_tokens(plain.vision_features(pixels))
    model = load_model(engine.checkpoint, dtype=dtype, device=device)
    choice = CHOICES[name].settle(engine.checkpoint, device, dtype, lambda line: None)
    try:
        frontend = choice.open(engine.checkpoint, model, lambda line: None)
    except FrontendError as error:
        if "TensorRT" in str(error):
            pytest.skip(f"{error}")
        raise
    for _ in range(3):  # a race between streams would not show each time
        (found,) = frontend.visual_tokens(frontend.vision_features(pixels))
        error = (found.float().cpu() - wanted).norm() / wanted.norm()
        assert error < RELATIVE[dtype]
        if dtype == torch.float32:
            torch.testing.assert_close(found.cpu(), wanted, atol=ATOL["projector_tokens"], rtol=0)


@functools.cache
def cuda_engine(case, stc):
    """The golden checkpoint's engine in float32 on CUDA."""
    checkpoint = golden_engine(case).checkpoint
    choice = FrontendChoice("torch", stc)
    return Engine(checkpoint, device="cuda", dtype="float32", frontend=choice)


@pytest.mark.parametrize("stc", ["torch", "triton"])
@pytest.mark.parametrize(("case", "run"), RUNS, ids=["-".join(run) for run in RUNS])
def test_float32_on_cuda_says_what_the_reference_says(case, run, stc):
    engine, about, expected = cuda_engine(case, stc), runs_of(case)[run], tensors_of(case, run)
    media, history, question = MediaTokens(), (), about["instruct"]
    if about["modal"] != "text":
        pixel_values = pixels_of(case, "cap" if run == "mt" else run)
        (features,) = engine.frontend.vision_features([pixel_values])
        if about["modal"] == "image":
            features = engine.model.repeat_image(features)
        media = MediaTokens(engine.frontend.visual_tokens([features])[0])
    if not isinstance(question, str):
        first, answer, question = (message["content"] for message in question)
        history = (Turn(first, answer),)
    settings = engine.settings(GenerationChoice(max_new_tokens=about["max_new_tokens"]))
    (said,) = engine.answer([Ask(question, about["modal"], media, history)], settings)
    assert list(said.generation.ids) == expected["generated_ids"].tolist()
    found = {"first_logits": said.generation.first_logits.cpu()}
    assert_stages_match(f"{case} {run} {stc}", found, expected)
