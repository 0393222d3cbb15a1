"""What several tests need."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the reference's numbers and real clips, which the repository lacks."""
    beside = Path(__file__).parents[1] / "../shared"
    folder = Path(os.environ.get("VLA2_SHARED", beside)).resolve()
    if not (folder / "golden").is_dir():
        pytest.skip("no shared folder: set VLA2_SHARED to the one with golden/ and media/")
    return folder
