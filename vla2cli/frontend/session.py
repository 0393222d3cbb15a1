"""One graph in ONNX Runtime, on torch's memory.

What goes in is bound where torch has it. What comes out is bound to a tensor of torch's, or is
handed over by DLPack; nothing is copied.

Order on CUDA: torch queues its work on the current stream of the calling thread, ONNX Runtime on a
stream that it is given. That is one of ours and not the current one, because the current one is
mostly the default stream, whose handle is 0, which ONNX Runtime takes for "none given". Before a
run our stream waits for the current one, where the input is still being made and where an earlier
output, whose memory the run may use again, is still being read; after it the current one waits for
ours. So a caller sees the order of plain torch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from vla2cli.errors import FrontendError

TYPES: Mapping[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
}
FATAL = 4  # of ONNX Runtime's levels of logging; whatever else goes wrong is raised, or looked for


class Session:
    """A graph of one input, ready to run.

    Args:
        path: the .onnx file.
        device: `cpu`, or a CUDA device.
        use_tensorrt: run on it what TensorRT can take; the rest stays with CUDA.

    Raises:
        FrontendError: the graph cannot be read, or the device cannot be used.
    """

    def __init__(self, path: Path, device: torch.device, *, use_tensorrt: bool = False) -> None:
        self.device = device
        self.stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here
            if device.type == "cuda"
            else None
        )
        wanted = _providers(path, device, self.stream, use_tensorrt=use_tensorrt)
        self.session = _open(path, wanted)
        first, found = wanted[0][0], self.session.get_providers()
        if first not in found:
            raise FrontendError(_describe_missing(first))
        (node,) = self.session.get_inputs()
        self.input: str = node.name
        self.dtype = TYPES[node.type]
        self.outputs: list[str] = [output.name for output in self.session.get_outputs()]

    def __call__(self, x: Tensor, into: Tensor | None = None) -> list[Tensor]:
        """Run the graph.

        Args:
            x: of the shape of its input; cast and moved where it has another dtype or place.
            into: contiguous, where its first output is to be; by default it is new memory.

        Returns:
            Its outputs, on the session's device.
        """
        x = x.to(self.device, self.dtype).contiguous()
        with self._in_order():
            return self.fetch(self.bind(x, into), into)

    def empty(self, size: int) -> Tensor:
        """Make memory for the first output, of which only the first axis varies."""
        output = self.session.get_outputs()[0]
        shape = (size, *output.shape[1:])
        return torch.empty(shape, dtype=TYPES[output.type], device=self.device)

    def bind(self, x: Tensor, into: Tensor | None = None) -> Any:
        """Tell ONNX Runtime where input and outputs are; see `__call__`."""
        binding = self.session.io_binding()
        binding.bind_input(self.input, *self._place, *_layout(x))
        for i, name in enumerate(self.outputs):
            memory = _layout(into) if into is not None and i == 0 else ()
            binding.bind_output(name, *self._place, *memory)
        return binding

    def fetch(self, binding: Any, into: Tensor | None = None) -> list[Tensor]:
        """Run on what is bound, and take the outputs over."""
        self.session.run_with_iobinding(binding)
        outputs = [from_dlpack(value) for value in binding.get_outputs()]
        return outputs if into is None else [into, *outputs[1:]]

    @property
    def _place(self) -> tuple[str, int]:
        return self.device.type, self.device.index or 0

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        yield
        current.wait_stream(self.stream)


def num_threads() -> int:
    """Return how many threads a session computes with: torch's own number.

    It follows the cores that the process may use, `OMP_NUM_THREADS` and `torch.set_num_threads`.
    """
    return torch.get_num_threads()


def _open(path: Path, providers: list[tuple[str, dict[str, str]]]) -> Any:
    # a missing library of CUDA is logged, past Python, on the way to a session that lacks it
    onnxruntime.set_default_logger_severity(FATAL)
    if providers[0][0] not in onnxruntime.get_available_providers():
        raise FrontendError(_describe_missing(providers[0][0]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = num_threads()
    # a thread with nothing to do would spin on a core that the decoding processes could use
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if len(providers) > 1:
        with contextlib.redirect_stdout(sys.stderr):  # where it complains
            onnxruntime.preload_dlls()  # torch's CUDA and cuDNN
    try:
        # without fallback: it would print to stdout and go on without the device
        return onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime has a class for each of its codes, with no common one
        first = providers[0][0]
        if first.startswith("Tensorrt") and "TensorRT" in str(error):
            raise FrontendError(_describe_missing(first)) from error
        raise FrontendError(f"'{path}' cannot be opened: {error}") from error


def _providers(
    path: Path, device: torch.device, stream: torch.cuda.Stream | None, *, use_tensorrt: bool
) -> list[tuple[str, dict[str, str]]]:
    """List who may run the graph, the first choice first; what one cannot do falls to the next."""
    cpu = ("CPUExecutionProvider", dict[str, str]())
    if stream is None:
        return [cpu]
    shared = {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(stream.cuda_stream),
    }
    # float32 means float32: TF32 keeps ten bits of it
    cuda = ("CUDAExecutionProvider", {**shared, "use_tf32": "0"})
    if not use_tensorrt:
        return [cuda, cpu]
    engines = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(path.parent / "tensorrt"),
    }
    return [("TensorrtExecutionProvider", {**shared, **engines}), cuda, cpu]


def _describe_missing(provider: str) -> str:
    name = "TensorRT" if provider.startswith("Tensorrt") else "CUDA"
    return (
        f"ONNX Runtime cannot use {name} here: {provider} did not start, so a library of "
        f"{name}, the GPU's driver or onnxruntime-gpu is missing; give --frontend torch, or "
        "--device cpu"
    )


def _layout(tensor: Tensor) -> tuple[Any, tuple[int, ...], int]:
    assert tensor.is_contiguous(), f"strides {tensor.stride()} of {tuple(tensor.shape)}"
    element = np.float16 if tensor.dtype == torch.float16 else np.float32
    return element, tuple(tensor.shape), tensor.data_ptr()
