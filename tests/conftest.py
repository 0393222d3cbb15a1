"""What several tests need."""

import os
import signal
from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def _heard_ctrl_c() -> None:
    """Let commands under test take notice of Ctrl-C, also where a shell sent these tests behind."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from the exports and hashes that this machine's user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
