"""Compile the kernels for GPUs that are not there, and read what they need; prints JSON.

Run as a program of its own: `TRITON_INTERPRET=1`, which the other tests set, excludes a compiler.
Every launch is recorded from the launcher itself, on tensors without memory, so that what is
compiled is what a GPU would get.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vla2_kernels import conv3d, depthwise, norm
from vla2_kernels.jit import Kernel

# frames (F, side, C) of s1 and s2; clips (B, T, side, C, padding) of the sampler
STAGES = {
    "7B, 8 frames": (8, 24, 4096),
    "7B, 5 slots": (5, 13, 4096),
    "Qwen2-7B, 16 frames": (16, 27, 3584),
    "72B, 16 frames": (16, 27, 8192),
}
SAMPLERS = {
    "7B, 8 frames": (1, 8, 24, 4096, 1),
    "7B, 8 clips": (8, 8, 24, 4096, 1),
    "Qwen2-7B, 16 frames": (1, 16, 27, 3584, 0),
    "72B, 16 frames": (1, 16, 27, 8192, 0),
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def launches(dtype):
    """Yield a name, a launcher and its arguments, of no memory, for each launch of public size."""

    def empty(*size):
        return torch.empty(size, dtype=dtype, device="meta")

    for name, (frames, side, C) in STAGES.items():
        x, vector = empty(frames, side, side, C), empty(C)
        yield f"depthwise: {name}", depthwise.launch, (x, empty(3, 3, C), vector, vector, 1e-5)
        yield f"norm: {name}", norm.launch, (x, vector, vector, 1e-5)
        parts = empty(frames, C), x
        yield f"norm, all parts: {name}", norm.launch, (x, vector, vector, 1e-5, *parts)
    for name, (clips, frames, side, C, padding) in SAMPLERS.items():
        x, weight = empty(clips, frames, side, side, C), empty(2, 2, 2, C, C)
        yield f"conv3d: {name}", conv3d.launch, (x, weight, empty(C), padding)


def record(launch, inputs):
    """Return the kernel that a launcher launches, its arguments by name, and its options."""
    calls = []

    def getitem(kernel, _grid):
        return lambda *args, **kwargs: calls.append((kernel.jitted, args, kwargs))

    with mock.patch.object(Kernel, "__getitem__", getitem):
        launch(*inputs)
    ((kernel, args, kwargs),) = calls
    arguments = dict(zip(kernel.arg_names, args))
    arguments |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    return kernel, arguments, options


def specialise(kernel, arguments):
    """Give Triton's compiler the types and facts that a launch with these arguments gives it."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name], is_aligned = POINTERS[value.dtype], True
        elif kernel.params[index].is_constexpr or value is None or value == 1:
            signature[name], constants[(index,)], is_aligned = "constexpr", value, False
        elif isinstance(value, int):
            signature[name], is_aligned = "i32", value % 16 == 0
        else:
            signature[name], is_aligned = "fp32", False
        if is_aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def read_cubin(cubin):
    """Count registers, stack, spills and matrix instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [NVIDIA_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "mma": len(re.findall(r"\bHMMA\b", code)),
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.\S*128\b", code)),
    }


def compile_all(dtype):
    """Return what each launch needs on each target."""
    found = []
    for name, launch, inputs in launches(dtype):
        kernel, arguments, options = record(launch, inputs)
        source = specialise(kernel, arguments)
        for target_name, target in TARGETS.items():
            compiled = triton.compile(source, target=target, options=options)
            about = {"launch": name, "target": target_name, "warps": options["num_warps"]}
            about["shared_bytes"] = compiled.metadata.shared
            if target.backend == "cuda":
                about |= read_cubin(compiled.asm["cubin"])
            found.append(about)
    return found


if __name__ == "__main__":
    found = {str(dtype): compile_all(dtype) for dtype in (torch.bfloat16, torch.float32)}
    print(json.dumps(found))  # noqa: T201  it is what the program is for
