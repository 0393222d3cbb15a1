"""Turn folders of videos into true, traceable text with VideoLLaMA 2.

    from vla2cli import Engine, caption, ask

    engine = Engine.load("DAMO-NLP-SG/VideoLLaMA2-7B")
    for record in caption(["videos/"], engine):
        print(record["id"], record["text"])

The names are loaded at their first use, so that `import vla2cli` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "FrontendChoice",
    "Layout",
    "Sampling",
    "ask",
    "ask_manifest",
    "caption",
    "features",
    "read_manifest",
]

if TYPE_CHECKING:
    from vla2cli.api import ask, ask_manifest, caption, features
    from vla2cli.engine import Engine
    from vla2cli.frontend.choice import FrontendChoice
    from vla2cli.layout import Layout
    from vla2cli.manifest import read_manifest
    from vla2cli.plan import Sampling

# ONNX Runtime reports to its maker as soon as it is imported, unless it is told not to
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Engine": "engine",
    "FrontendChoice": "frontend.choice",
    "Layout": "layout",
    "Sampling": "plan",
    "read_manifest": "manifest",
    **dict.fromkeys(("ask", "ask_manifest", "caption", "features"), "api"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"vla2cli.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vla2cli' has no attribute '{name}'")
