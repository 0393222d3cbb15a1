"""One file must not end a batch, and what concerns all files must."""

import pytest
import torch

from vla2cli.errors import InputError, ModelError, is_out_of_memory
from vla2cli.failures import as_input_error, in_parts

MEMORY_ERRORS = {
    "python": lambda: MemoryError(),
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: caught(lambda: torch.empty(2**60)),
    "onednn": lambda: RuntimeError("could not create a primitive"),
}


def caught(function):
    with pytest.raises(RuntimeError) as raised:
        function()
    return raised.value


def test_in_parts_costs_one_row_one_error():
    def double(rows):
        if 3 in rows:
            raise RuntimeError("three\nis odd")
        return [2 * row for row in rows]

    results = in_parts(double, [1, 2, 3, 4], "encode")
    assert [r for r in results if not isinstance(r, InputError)] == [2, 4, 8]
    failure = results[2]
    assert (failure.kind, failure.stage) == ("failed", "encode")
    assert str(failure) == "unexpected RuntimeError: three is odd"


def test_in_parts_tries_a_batch_that_is_too_large_in_halves():
    tried = []

    def double(rows):
        tried.append(list(rows))
        if len(rows) > 2:
            raise MemoryError
        return [2 * row for row in rows]

    assert in_parts(double, [1, 2, 3, 4, 5], "generate") == [2, 4, 6, 8, 10]
    assert tried == [[1, 2, 3, 4, 5], [1, 2], [3, 4, 5], [3], [4, 5]]


def test_in_parts_lets_what_concerns_the_whole_run_through():
    def refuse(rows):
        raise ModelError("the weights are gone")

    with pytest.raises(ModelError):
        in_parts(refuse, [1, 2], "encode")


def test_in_parts_takes_no_rows():
    assert in_parts(lambda rows: rows, [], "encode") == []


@pytest.mark.parametrize("make", MEMORY_ERRORS.values(), ids=MEMORY_ERRORS)
def test_too_little_memory_is_told_from_other_failures(make):
    error = make()
    assert is_out_of_memory(error)
    failure = as_input_error(error, "generate")
    assert (failure.kind, failure.stage) == ("out-of-memory", "generate")
    assert str(failure) == "out of memory; try fewer --frames or a smaller --dtype"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("could not create a primitive descriptor for the matmul primitive"),
        ValueError("can't allocate memory"),
    ],
    ids=["shapes", "descriptor", "value"],
)
def test_other_failures_are_not_called_memory(error):
    assert not is_out_of_memory(error)
    assert as_input_error(error, "encode").kind == "failed"


def test_error_of_a_file_stays_as_it_is():
    error = InputError("no frames", kind="decode", stage="decode")
    assert as_input_error(error, "generate") is error


def test_lost_device_ends_the_run_in_one_line():
    with pytest.raises(ModelError) as raised:
        as_input_error(torch.AcceleratorError("an illegal memory\naccess"), "encode")
    assert str(raised.value) == "the device failed: an illegal memory access"
