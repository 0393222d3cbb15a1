"""Clips that were encoded before: `--cache DIR`.

An entry is a safetensors file: `visual` and `audio`, what the language model is given of a clip,
and in its metadata what a record says of the clip. Neither pixels nor samples are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla2cli.bounded import BoundedFolder
from vla2cli.console import Say
from vla2cli.errors import UsageError
from vla2cli.frontend.manifest import versions
from vla2cli.media import wire
from vla2cli.media.records import Clip, ClipRequest, FileState

if TYPE_CHECKING:
    from torch import Tensor

    from vla2cli.engine import Engine, MediaTokens

FORMAT = 1  # to be raised with every change to an entry, and to what is made of the same request
# A mistake of theirs, or of ours, that a version mends must not live on in a cache; a record names
# the version of vla2. What computes is not here: torch and its like, the device and the batch move
# the last bits, of which no record speaks and on which no id in float32 depends.
READERS = ("av", "decord", "pillow")

DEFAULT_CACHE_SIZE = "20GB"
LEAST_CACHE_BYTES = 10**6  # of a 7B's clips one takes several times that
_UNITS = {"mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(rf"([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?) ?({'|'.join(_UNITS)})")


@dataclass(frozen=True)
class Encoded:
    """A clip when it has been through towers and connector."""

    clip: Clip  # stripped
    media: MediaTokens  # on the CPU where they come from a cache


def parse_size(text: str) -> int:
    """Read a size in bytes: `20GB`, `500 MB`, `1.5tb`; units of 10, as on the disk's box.

    Raises:
        UsageError: the text is no size, or less than 1MB.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    size_bytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size_bytes < LEAST_CACHE_BYTES:
        raise UsageError(
            f"'--cache-size {text}': expected a size like 20GB or 500MB, and at least 1MB"
        )
    return size_bytes


def encoder_of(engine: Engine) -> dict[str, Any]:
    """List what, besides a clip, decides its tokens; hashes weights, unless remembered."""
    from vla2cli.frontend.origin import design_of

    config = engine.checkpoint.config
    return {
        "format": FORMAT,
        "versions": versions(READERS),
        "weights": engine.identity["sha256"],
        "design": design_of(config),
        "num_frames": config.num_frames,  # for so many, an image stands
        "frontend": engine.backends["frontend"],
        "dtype": engine.backends["dtype"],
    }


def entry_key(sha256: str, request: ClipRequest, encoder: Mapping[str, Any]) -> str:
    """Name the entry of a clip: 64 hexadecimal digits that differ wherever it may.

    Args:
        sha256: of the file's content; one that changed while it was decoded is not to be kept.
        request: what of it is wanted. Of the path only the ending counts, from which decoders guess
            what a file is.
        encoder: from `encoder_of`.
    """
    wanted = asdict(request)
    wanted["path"] = os.path.splitext(request.path)[1]  # noqa: PTH122 its bytes may be any
    facts = {"file": sha256, "request": wanted, "encoder": encoder}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """Encoded clips in a folder that any number of processes share.

    A run never fails because of it: an entry that is not what was put there is removed and missed.
    """

    def __init__(self, files: BoundedFolder) -> None:
        self._files = files

    @classmethod
    def open(cls, folder: Path, max_bytes: int, say: Say = lambda message: None) -> TokenCache:
        """Open a folder, which is made where it is absent.

        Args:
            folder: the entries'.
            max_bytes: of all entries; the least recently used go first.
            say: told, once, why nothing more can be kept.

        Raises:
            UsageError: it is no folder, or cannot be made.
        """
        return cls(BoundedFolder(folder, max_bytes, say))

    def get(self, key: str, state: FileState) -> Encoded | None:
        """Find a clip by its key.

        Args:
            key: from `entry_key`.
            state: of the file that is asked about; the entry may have been made of another one
                with the same content.

        Returns:
            The clip, which took its `timings_s` to be read, and its tokens on the CPU; None where
            there is no entry that can be used.
        """
        started = time.perf_counter()
        data = self._files.read(key)
        if data is None:
            return None
        found = _unpack(data, key, state, started)
        if found is None:
            self._files.remove(key)
        return found

    def put(self, key: str, encoded: Encoded) -> None:
        """Keep a clip, unless its tokens are not finite: such an answer is looked into anew."""
        if all(map(_is_finite, encoded.media.parts())):
            self._files.write(key, _pack(key, encoded))


def _pack(key: str, encoded: Encoded) -> bytes:
    from safetensors.torch import save

    media = {"visual": encoded.media.visual, "audio": encoded.media.audio}
    tensors = {n: t.detach().cpu().contiguous() for n, t in media.items() if t is not None}
    facts, body = wire.pack_clip(encoded.clip.stripped())
    assert not body, "nothing of a stripped clip is left to send"
    del facts["state"], facts["timings_s"]  # of one file and one run
    clip = json.dumps(facts)
    return save(tensors, {"clip": clip, "sha256": _digest(key, clip, tensors)})


def _unpack(data: bytes, key: str, state: FileState, started: float) -> Encoded | None:
    """Read an entry; None where it is not whole, not of this key, or not what was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from vla2cli.engine import MediaTokens

    try:
        tensors = load(data)  # the header says how long the file has to be
        about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        is_right = about["sha256"] == _digest(key, about["clip"], tensors)
        if not is_right or not all(map(_is_finite, tensors.values())):
            return None
        media = MediaTokens(**tensors)
        facts = json.loads(about["clip"]) | {"state": asdict(state), "timings_s": {}}
        facts["timings_s"] = {"read": time.perf_counter() - started, "preprocess": 0.0}
        return Encoded(wire.unpack_clip(facts, bytearray()), media)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def _digest(key: str, clip: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash all that an entry says: the header shows neither a flipped bit nor another's name."""
    import torch

    digest = hashlib.sha256(f"{key}\0{clip}\0".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_finite(tokens: Tensor) -> bool:
    return bool(tokens.isfinite().all())
