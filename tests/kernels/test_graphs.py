"""The operators in PyTorch's graphs: schemas, tracing, and taken apart for an exporter."""

import subprocess
import sys

import onnxruntime
import pytest
import torch
from torch import nn

from tests.kernels.operators import (
    CONV3D,
    DEPTHWISE,
    NORM,
    conv3d_arguments,
    depthwise_arguments,
    norm_arguments,
)
from vla2_kernels import conv3d_silu, depthwise_norm_silu_pool, norm_scale_residual_silu

FRAMES = (2, 4, 6, 8)
CALLS = {
    "depthwise": (DEPTHWISE, depthwise_arguments(FRAMES)),
    "norm": (NORM, norm_arguments(FRAMES)),
    "norm alone": (NORM, norm_arguments(FRAMES, has_scale=False, has_residual=False)),
    "conv3d": (CONV3D, conv3d_arguments((1, *FRAMES), 5, 1)),
    "conv3d, not padded": (CONV3D, conv3d_arguments((1, *FRAMES), 5, 0)),
}


@pytest.mark.parametrize("call", CALLS)
def test_operator_keeps_pytorchs_rules(call):
    operator, arguments = CALLS[call]
    torch.library.opcheck(operator.overload, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("call", CALLS)
def test_operator_keeps_pytorchs_rules_on_a_gpu(call, monkeypatch):
    monkeypatch.undo()  # outputs in the midst of NaN begin elsewhere than those that are traced
    operator, arguments = CALLS[call]
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(operator.overload, tuple(moved))


class Tiny(nn.Module):
    """Frames (F, H, W, 8) through every operator, as a stage and a sampler would."""

    def __init__(self):
        super().__init__()
        for name, tensor in zip(("filters", "gain", "shift"), depthwise_arguments(FRAMES)[1:4]):
            self.register_buffer(name, tensor)
        _, weight, bias, _ = conv3d_arguments((1, *FRAMES), 5, 1)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x):
        y, mean = depthwise_norm_silu_pool(x, self.filters, self.gain, self.shift, 1e-5)
        y = norm_scale_residual_silu(y, self.gain, self.shift, 1e-5, mean.sigmoid(), x)
        return conv3d_silu(y[None], self.weight, self.bias, 1)


@pytest.fixture(scope="module")
def exported():
    frames = torch.export.Dim("frames", min=2, max=64)
    example = (depthwise_arguments((4, *FRAMES[1:]))[0],)
    return torch.export.export(Tiny(), example, dynamic_shapes=({0: frames},))


def custom_calls(program):
    return {str(node.target) for node in program.graph.nodes if "vla2" in str(node.target)}


def test_operators_export_as_one_node_each_for_any_number_of_frames(exported):
    names = {operator.name for operator in (DEPTHWISE, NORM, CONV3D)}
    assert custom_calls(exported) == {f"vla2.{name}.default" for name in names}
    (x, *_) = depthwise_arguments((7, *FRAMES[1:]))
    torch.testing.assert_close(exported.module()(x), Tiny()(x))


@pytest.fixture(scope="module")
def apart(exported):
    table = torch.export.default_decompositions()
    table.update({op.overload: op.reference for op in (DEPTHWISE, NORM, CONV3D)})
    return exported.run_decompositions(table)


def test_references_take_the_operators_apart_into_pytorchs_own(apart):
    assert not custom_calls(apart)
    (x, *_) = depthwise_arguments((7, *FRAMES[1:]))
    torch.testing.assert_close(apart.module()(x), Tiny()(x), atol=1e-5, rtol=1e-5)


def test_importing_the_package_imports_neither_pytorch_nor_triton():
    code = "import sys, vla2_kernels; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_operators_work_where_there_is_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, vla2_kernels\n"
        "x, one = torch.randn(1, 2, 2, 4), torch.ones(4)\n"
        "vla2_kernels.norm_scale_residual_silu(x, one, one, 1e-5)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error():
    import vla2_kernels

    with pytest.raises(AttributeError, match="has no attribute 'conv4d'"):
        vla2_kernels.conv4d  # noqa: B018  the look-up is the test


def test_taken_apart_operators_become_standard_onnx(apart, tmp_path):
    path = str(tmp_path / "tiny.onnx")
    torch.onnx.export(apart, dynamo=True).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (x, *_) = depthwise_arguments((7, *FRAMES[1:]))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Tiny()(x), atol=1e-5, rtol=1e-5)
