"""What the compiled kernels need on GPUs of 2020 and later, without one: read, not measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MAX_REGISTERS = {"depthwise": 128, "norm": 80, "conv3d": 240}  # as read now, rounded up
MAX_SHARED_BYTES = {"depthwise": 16 << 10, "norm": 1 << 10, "conv3d": 96 << 10}
NVIDIA = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What each launch of public size needs, by dtype."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = Path(__file__).with_name("compiling.py")
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    for row in found["torch.bfloat16"]:
        print(row)  # noqa: T201  a table for people: pytest -s
    return found


def rows(compiled, kernel, *targets, dtype="torch.bfloat16"):
    found = [row for row in compiled[dtype] if row["launch"].startswith(kernel)]
    found = [row for row in found if row["target"] in targets]
    assert found
    return found


@pytest.mark.parametrize("kernel", MAX_REGISTERS)
def test_kernel_neither_spills_nor_keeps_a_stack(compiled, kernel):
    for row in rows(compiled, kernel, *NVIDIA):
        assert (row["spills"], row["stack_bytes"]) == (0, 0), row


@pytest.mark.parametrize("kernel", MAX_REGISTERS)
def test_kernel_stays_within_registers_and_shared_memory(compiled, kernel):
    for row in rows(compiled, kernel, *NVIDIA):
        assert row["registers"] <= MAX_REGISTERS[kernel], row
        assert row["shared_bytes"] <= MAX_SHARED_BYTES[kernel], row
        assert row["registers"] * row["warps"] * 32 <= 1 << 16, row  # a multiprocessor has as many


@pytest.mark.parametrize("kernel", MAX_REGISTERS)
def test_kernel_reads_16_bytes_at_a_time(compiled, kernel):
    for row in rows(compiled, kernel, *NVIDIA):
        assert row["wide_loads"] > 0, row


def test_conv3d_uses_the_matrix_units(compiled):
    assert all(row["mma"] >= 32 for row in rows(compiled, "conv3d", "sm_80"))
    assert all(row["wgmma"] >= 4 for row in rows(compiled, "conv3d", "sm_90"))


def test_conv3d_in_float32_keeps_to_float32(compiled):
    found = rows(compiled, "conv3d", *NVIDIA, dtype="torch.float32")
    assert not any(row["mma"] or row["wgmma"] or row["spills"] for row in found)


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float32"])
@pytest.mark.parametrize("kernel", MAX_REGISTERS)
def test_kernel_compiles_for_amd_within_64_kib(compiled, kernel, dtype):
    for row in rows(compiled, kernel, "gfx942", dtype=dtype):
        assert row["shared_bytes"] <= 64 << 10, row
