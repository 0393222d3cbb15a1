"""What an exported folder says of itself: manifest.json, beside the graphs.

VideoLLaMA2-7B/
  manifest.json
  tower.onnx      tower.onnx.data
  connector.onnx  connector.onnx.data
  sound.onnx      sound.onnx.data       where the checkpoint has ears
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vla2_models.files import is_count
from vla2_models.fingerprint import hash_files
from vla2cli import __version__
from vla2cli.errors import FrontendError

FORMAT = 2  # to be raised with every change to the graphs or to this file
MANIFEST = "manifest.json"
PRECISIONS = ("fp32", "fp16", "int8")

# distributions whose code decides what a graph looks like, or whether it can be run
_MAKERS = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "timm")


@dataclass(frozen=True)
class Origin:
    """Of which weights an export is, and in which precision."""

    id: str
    revision: str | None
    sha256: str  # of the weights
    precision: str  # one of `PRECISIONS`
    key: str  # 64 hexadecimal digits that differ wherever the graphs may


@dataclass(frozen=True)
class Difference:
    """How far a graph is from PyTorch in float32, at the worst of the sizes it was checked at."""

    max_abs: float  # of any value
    relative: float  # Euclidean length of the difference over that of the values


@dataclass(frozen=True)
class Manifest:
    """What was exported, by what, and how well it does."""

    format: int
    origin: Origin
    versions: Mapping[str, str]
    frame_bytes: int  # memory that a frame takes while it is in the tower
    patch_rows: int | None  # rows of the fbank come in multiples of this; None: no ears
    graphs: Mapping[str, Difference]
    files: Mapping[str, tuple[int, str]]  # size in bytes, SHA-256

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            FrontendError: there is none, or it is not one of this format.
        """
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise FrontendError(f"'{path}' is of format {raw['format']}, this is {FORMAT}")
            raw["origin"] = Origin(**raw["origin"])
            raw["graphs"] = {name: Difference(**found) for name, found in raw["graphs"].items()}
            raw["files"] = {name: (size, sha256) for name, (size, sha256) in raw["files"].items()}
            manifest = cls(**raw)
            manifest._check()
            return manifest
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise FrontendError(f"'{path}' is not the manifest of an export: {error}") from error

    def _check(self) -> None:
        """Refuse what no export of ours says.

        Raises:
            ValueError: naming it.
        """
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file beside it")
        missing = [name for name in self.graphs if f"{name}.onnx" not in self.files]
        if missing or not self.graphs:
            raise ValueError(f"it has no file for {', '.join(missing) or 'any graph'}")
        numbers = [self.frame_bytes, *(size for size, _ in self.files.values())]
        if not isinstance(self.versions, dict) or not all(map(is_count, numbers)):
            raise ValueError("its versions, sizes or frame_bytes are something else")

    def write(self, folder: Path) -> None:
        """Write it into its folder."""
        text = json.dumps(asdict(self), indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(size for size, _ in self.files.values())

    def paths(self, folder: Path) -> list[Path]:
        """List the files that are to be in its folder."""
        return [folder / name for name in self.files]

    def find_missing(self, folder: Path) -> str | None:
        """Say which file is missing or of another size; None where none is."""
        for path in self.paths(folder):
            wanted, _ = self.files[path.name]
            if not path.is_file():
                return f"'{path}' is missing"
            if path.stat().st_size != wanted:
                return f"'{path}' has {path.stat().st_size:,} bytes of {wanted:,}"
        return None

    def find_changed(self, folder: Path) -> str | None:
        """Say which file holds something else than was exported; None where none does.

        A file is read again only where its size or time has changed since it last was.
        """
        for path, digest in hash_files(self.paths(folder)).items():
            if digest != self.files[path.name][1]:
                return f"'{path}' holds something else than was exported"
        return None


def hash_new_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Take size and SHA-256 of every file in a folder, for its manifest."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.name] = path.stat().st_size, digest
    return found


def versions(names: Sequence[str] = _MAKERS) -> dict[str, str]:
    """List the versions of vla2 and of what takes part, without loading any of it."""
    return {"vla2": __version__, **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    # one of two distributions provides onnxruntime
    for distribution in (f"{name}-gpu", name) if name == "onnxruntime" else (name,):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"
