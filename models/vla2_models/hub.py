"""Where a checkpoint's folder is: a path, a local hub folder, the hub cache, or the hub itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError
from .files import read_json

INDEX_NAME = "model.safetensors.index.json"
# never a pickle, never code
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
TOWER_FILES = ["config.json", "preprocessor_config.json"]


@dataclass(frozen=True)
class Source:
    """Where to look for what is named, in this order: path, `hub_dir`, hub cache, hub."""

    hub_dir: Path | None = None  # holds folders named like hub ids: owner/name
    offline: bool = False  # never go to the hub itself
    on_fetch: Callable[[str], None] | None = None  # told what is about to be fetched


@dataclass(frozen=True)
class Located:
    """A folder on this disk and where it came from."""

    id: str  # as the user or config.json named it
    folder: Path
    revision: str | None  # commit of a hub snapshot


def locate(
    name: str,
    source: Source,
    *,
    revision: str | None = None,
    files: list[str] = CHECKPOINT_FILES,
) -> Located:
    """Find the folder of `name`, fetching it when it is only on the hub.

    Args:
        name: a folder, or a hub id such as `DAMO-NLP-SG/VideoLLaMA2-7B`.
        source: where to look.
        revision: commit, tag or branch on the hub.
        files: patterns of the files to fetch.

    Raises:
        CheckpointError: it is nowhere.
    """
    local = _locate_here(name, source)
    if local is not None:
        if revision is not None:
            raise CheckpointError(
                f"'{local}' is a folder on this disk; --revision is for models from the hub"
            )
        return Located(name, local, None)
    if not _is_hub_id(name):
        raise CheckpointError(
            f"'{name}' does not exist; give a folder, or a hub id like 'owner/name'"
        )
    snapshot = _snapshot(name, revision, files, cached_only=True)
    if snapshot is None and source.offline:
        where = f" or under '{source.hub_dir}'" if source.hub_dir else ""
        raise CheckpointError(
            f"'{name}' is not in the hub cache{where}, and is not fetched offline"
        )
    if snapshot is None:
        if source.on_fetch:
            source.on_fetch(name)
        snapshot = _snapshot(name, revision, files, cached_only=False)
    assert snapshot is not None, f"the hub gave no folder for {name}"
    return Located(name, snapshot, snapshot.name)


def shard_names(folder: Path) -> list[str]:
    """List the weight files that the folder's index names; none where there is no index.

    Raises:
        CheckpointError: the index is not one, or names a file outside the folder.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        return []
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{path}' has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"'{path}' names '{name}', which is outside its folder")
    return names


def _locate_here(name: str, source: Source) -> Path | None:
    if not name:  # not the current folder
        return None
    candidates = [Path(os.path.expanduser(name))]  # noqa: PTH111  '~nobody' stays as it is
    if source.hub_dir is not None:
        candidates.append(source.hub_dir / name)
    return next((path for path in candidates if path.is_dir()), None)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # by __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _snapshot(
    name: str, revision: str | None, files: list[str], *, cached_only: bool
) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, local_files_only=cached_only
            )
        )
    except LocalEntryNotFoundError as error:
        if cached_only:
            return None
        raise CheckpointError(
            f"'{name}' is not on this disk and the hub cannot be reached; "
            "give its folder, or with --hub-dir a folder that holds it as owner/name"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{name}' is gated on the hub; accept its terms there, then: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"'{name}' is neither on this disk nor on the hub") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{name}' has no revision '{revision}' on the hub") from error
    except OSError as error:
        if cached_only:
            return None
        raise CheckpointError(f"'{name}' could not be fetched: {error}") from error
    # a snapshot that an interrupted download left without its files is as good as none
    return None if cached_only and not _is_complete(folder, files) else folder


def _is_complete(folder: Path, files: list[str]) -> bool:
    names = {name for name in files if "*" not in name}
    if not names:  # a whole checkpoint
        try:
            weights = shard_names(folder) or ["model.safetensors"]
        except CheckpointError:
            return False
        names = {"config.json", "tokenizer_config.json", *weights}
    return all((folder / name).exists() for name in names)
