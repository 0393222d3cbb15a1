"""Triton kernels that import Triton at their first launch.

Triton is heavy, and Linux alone has it; the contract, the reference and the CPU implementation
that stand in the same file as a kernel must be there without it.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any


class Kernel:
    """A function that `triton.jit` compiles when it is first launched.

    Its body calls what is in `tl`, which is `triton.language` as in any file of Triton kernels,
    and no function of its own file: that would be another `Kernel`, which Triton does not know.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    @cached_property
    def jitted(self) -> Any:
        """The `triton.JITFunction`, or its interpreted twin where TRITON_INTERPRET is 1."""
        import triton

        self.function.__globals__["tl"] = triton.language
        return triton.jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return what launches the kernel over `grid`, as `triton.JITFunction` does."""
        launch: Callable[..., Any] = self.jitted[grid]
        return launch


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least `n`, for `n` of 1 or more."""
    return 1 << (n - 1).bit_length()
