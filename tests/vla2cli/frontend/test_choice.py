import pytest
import torch

from tests.tiny import open_tiny, tiny_engine, write_tiny
from vla2_models.connectors import PROJECTOR_TYPES
from vla2_models.stc import STC_CONNECTOR
from vla2cli.errors import UsageError
from vla2cli.frontend.choice import FrontendChoice

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint of its own, and a cache without exports."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_tiny(write_tiny(tmp_path / "hub"))


def settle(checkpoint, device=CPU, dtype=torch.float32, **flags):
    said = []
    settled = FrontendChoice(**flags).settle(checkpoint, device, dtype, said.append)
    assert not said
    return settled


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"frontend": "torch", "precision": "int8"}, "'--precision int8' is about ONNX graphs"),
        ({"frontend": "torch", "stc": "onnx"}, "'--stc onnx' is about ONNX graphs"),
        ({"frontend": "torch", "use_tensorrt": True}, "'--tensorrt' is about ONNX graphs"),
        ({"stc": "triton"}, "'--stc triton' needs CUDA, and this run is on the cpu"),
        ({"use_tensorrt": True}, "'--tensorrt' needs CUDA, and this run is on the cpu"),
        ({"frontend": "ONNX"}, "'--frontend ONNX': expected auto, onnx, torch"),
        ({"stc": "cuda"}, "'--stc cuda': expected auto, triton, torch, onnx"),
        ({"precision": "fp8"}, "'--precision fp8': expected fp32, fp16, int8"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused(flags, line):
    with pytest.raises(UsageError, match=line):
        FrontendChoice(**flags).check(CPU, STC_CONNECTOR)


def test_on_cuda_all_but_int8_can_be_had():
    FrontendChoice("onnx", "triton", "fp16", use_tensorrt=True).check(CUDA, STC_CONNECTOR)
    with pytest.raises(UsageError, match="'--precision int8' is for the CPU"):
        FrontendChoice(precision="int8").check(CUDA, STC_CONNECTOR)


def test_triton_is_refused_where_the_connector_has_none_of_its_operators():
    with pytest.raises(UsageError, match="the model's connector has no convolutions"):
        FrontendChoice(stc="triton").check(CUDA, PROJECTOR_TYPES["mlp2x_gelu"])


def test_without_an_export_auto_is_torch(checkpoint):
    settled = settle(checkpoint)
    assert (settled.name, settled.stc, settled.precision) == ("torch", "torch", None)


def test_with_an_export_auto_is_onnx_where_the_tokens_are_those_of_the_dtype(checkpoint):
    model = tiny_engine().model
    # of another model: only the file's presence and hash decide
    FrontendChoice("onnx").settle(checkpoint, CPU, torch.float32, print).open(
        checkpoint, model, lambda message: None
    )
    assert settle(checkpoint).name == "onnx"
    assert settle(checkpoint, dtype=torch.bfloat16).name == "torch"
    assert settle(checkpoint, dtype=torch.float16).name == "torch"
    assert settle(checkpoint, frontend="torch").name == "torch"
    int8 = settle(checkpoint, precision="int8")
    assert (int8.frontend, int8.name) == ("onnx", "onnx-int8")


@pytest.mark.parametrize(
    ("device", "dtype", "precision"),
    [
        (CPU, torch.float32, "fp32"),
        (CPU, torch.bfloat16, "fp32"),
        (CPU, torch.float16, "fp32"),
        (CUDA, torch.float32, "fp32"),
        (CUDA, torch.float16, "fp16"),
        (CUDA, torch.bfloat16, "fp16"),
    ],
    ids=str,
)
def test_graphs_are_of_the_dtype_as_far_as_onnx_runtime_has_it(
    checkpoint, device, dtype, precision
):
    assert settle(checkpoint, device, dtype, frontend="onnx").precision == precision


def test_name_says_what_runs_the_connector_where_it_is_another():
    assert FrontendChoice("onnx", "torch", "fp16").name == "onnx-fp16+torch"
    assert FrontendChoice("torch", "triton").name == "torch+triton"
    assert FrontendChoice("onnx", "onnx", "fp32").name == "onnx"
    tensorrt = FrontendChoice("onnx", "triton", "fp16", use_tensorrt=True)
    assert tensorrt.name == "onnx-fp16-tensorrt+triton"


def test_connector_of_another_takes_the_tokens_of_the_tower(checkpoint):
    from vla2_models.loading import load_model

    model = load_model(checkpoint)
    said = []
    mixed = settle(checkpoint, frontend="onnx", stc="torch").open(checkpoint, model, said.append)
    alone = settle(checkpoint, frontend="torch").open(checkpoint, model, said.append)
    pixels = torch.randn(4, 3, 56, 56)
    (found,), (wanted,) = (f.visual_tokens(f.vision_features([pixels])) for f in (mixed, alone))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert any("exporting" in line for line in said)
