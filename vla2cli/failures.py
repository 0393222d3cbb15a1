"""What to make of an exception in the middle of a batch: one file must not end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from vla2_models.errors import one_line
from vla2cli.errors import InputError, ModelError, Vla2Error, is_out_of_memory

Row = TypeVar("Row")
Result = TypeVar("Result")


def in_parts(
    function: Callable[[list[Row]], Sequence[Result]], rows: list[Row], stage: str
) -> list[Result | InputError]:
    """Run a function on a batch; where that fails, on each half of it.

    Returns:
        One result for each row; the error of a row that fails alone too stands in its place.

    Raises:
        Vla2Error: one that is not about a file.
    """
    try:
        return list(function(rows))
    except Exception as error:
        failure = as_input_error(error, stage)
    if len(rows) == 1:
        return [failure]
    half = len(rows) // 2
    return [
        *in_parts(function, rows[:half], stage),
        *in_parts(function, rows[half:], stage),
    ]


def as_input_error(error: Exception, stage: str) -> InputError:
    """Describe an exception as the error of a file.

    Raises:
        Vla2Error: it is about more than a file: every further call would fail as well.
    """
    import torch

    if isinstance(error, InputError):
        return error
    if isinstance(error, Vla2Error):
        raise error
    if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
        raise ModelError(f"the device failed: {one_line(error)[:300]}") from error
    if is_out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return InputError(
            "out of memory; try fewer --frames or a smaller --dtype",
            kind="out-of-memory",
            stage=stage,
        )
    return InputError(
        f"unexpected {type(error).__name__}: {one_line(error)[:300]}", kind="failed", stage=stage
    )
