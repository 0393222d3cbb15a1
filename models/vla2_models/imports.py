"""Imports that stay on this machine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_from_the_hub() -> Iterator[None]:
    """Let nothing be fetched while bitsandbytes, or peft, which imports it, is imported.

    On some processors bitsandbytes, as it is imported, runs a kernel that the package `kernels`
    fetches from the hub, or warns that there is no such package.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    before = {name: module for name, module in sys.modules.items() if name == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # how an import is made to fail
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        sys.modules.update(before)
