"""Turn folders of videos into true, traceable text with VideoLLaMA 2.

    from vla2cli import Engine, caption, ask

    engine = Engine.load("DAMO-NLP-SG/VideoLLaMA2-7B")
    for record in caption(["videos/"], engine):
        print(record["id"], record["text"])

The names are loaded at their first use, so that `import vla2cli` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "Layout", "Sampling", "ask", "caption", "features"]

if TYPE_CHECKING:
    from vla2cli.api import ask, caption, features
    from vla2cli.engine import Engine
    from vla2cli.layout import Layout
    from vla2cli.plan import Sampling


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from vla2cli.engine import Engine

        return Engine
    if name == "Layout":
        from vla2cli.layout import Layout

        return Layout
    if name == "Sampling":
        from vla2cli.plan import Sampling

        return Sampling
    if name in ("ask", "caption", "features"):
        from vla2cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'vla2cli' has no attribute '{name}'")
