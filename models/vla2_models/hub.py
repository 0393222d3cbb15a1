"""Where a checkpoint's folder is: a path, a local hub folder, the hub cache, or the hub itself.

The name `builtin` means the model that ships with this package, wherever one stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, describe
from .files import read_json

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).with_name(BUILTIN)

# how the parts of a model are named on disk; the first that is there counts
WHOLE_FILE = "model.safetensors"
WHOLE_PICKLE = "pytorch_model.bin"
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
# parts that training may leave alone in a folder: with them comes the model they were trained on
PART_FILES = (
    PROJECTOR_FILES,
    ("mm_projector_a.safetensors", "mm_projector_a.bin"),
    ("audio_tower.safetensors", "audio_tower.bin"),
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TOWER_FACTS = ("config.json", "preprocessor_config.json")  # what describes a vision tower
TRAINABLES_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")


@dataclass(frozen=True)
class Wanted:
    """What is fetched of a model, and how to tell that all of it is there."""

    patterns: tuple[str, ...]
    is_complete: Callable[[Path], bool]


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
    wanted: Wanted | None = None,
) -> Located:
    """Find the folder of `name`, fetching it when it is only on the hub.

    Args:
        name: a folder, a hub id such as `DAMO-NLP-SG/VideoLLaMA2-7B`, or `builtin`.
        source: where to look.
        revision: commit, tag or branch on the hub.
        wanted: what to fetch of it; by default a `CHECKPOINT`.

    Raises:
        CheckpointError: it is nowhere.
    """
    wanted = wanted or CHECKPOINT
    local = _locate_builtin() if name == BUILTIN else _locate_here(name, source)
    if local is not None:
        if revision is not None:
            raise CheckpointError(
                f"'{local}' is a folder on this disk; --revision is for models from the hub"
            )
        return Located(name, local, None)
    if not _is_hub_id(name):
        if os.path.isfile(os.path.expanduser(name)):  # noqa: PTH111, PTH113  any text is a name
            raise CheckpointError(f"'{name}' is a file; give the folder that holds it")
        raise CheckpointError(
            f"'{name}' does not exist; give a folder, or a hub id like 'owner/name'"
        )
    snapshot = _snapshot(name, revision, wanted, cached_only=True, is_final=source.offline)
    if snapshot is None and source.offline:
        where = f" or under '{source.hub_dir}'" if source.hub_dir else ""
        raise CheckpointError(
            f"'{name}' is not in the hub cache{where}, and is not fetched offline"
        )
    if snapshot is None:
        if source.on_fetch:
            source.on_fetch(name)
        snapshot = _snapshot(name, revision, wanted, cached_only=False)
    assert snapshot is not None, f"the hub gave no folder for {name}"
    return Located(name, snapshot, snapshot.name)


def has_builtin() -> bool:
    """Tell whether a model ships with this installation."""
    return (BUILTIN_FOLDER / WHOLE_FILE).exists()


def own_tower(name: str, folder: Path) -> Path | None:
    """Find a tower that lies inside its checkpoint's folder, so that no other place is asked.

    Args:
        name: of the tower; one of its own begins with `./`, as in `./clip-tower`.
        folder: of the checkpoint.

    Returns:
        None where the tower is to be looked for elsewhere.
    """
    is_inside = name.startswith("./") and ".." not in Path(name).parts
    tower = os.path.join(folder, name)  # noqa: PTH118  any text is a name
    return folder / name if is_inside and os.path.isdir(tower) else None  # noqa: PTH112


def folders_on_disk(hub_dir: Path | None) -> dict[str, Path]:
    """List the models of the package, the hub cache and the local hub folder: id -> folder."""
    builtin = {BUILTIN: BUILTIN_FOLDER} if has_builtin() else {}
    return {**builtin, **_in_cache(), **_in_hub_dir(hub_dir)}


def first_of(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first file of these names that the folder has."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def part_files(folder: Path) -> tuple[Path, ...]:
    """List the files of connector, audio projector and audio tower that the folder has alone."""
    found = (first_of(folder, names) for names in PART_FILES)
    return tuple(path for path in found if path is not None)


def shard_names(folder: Path, whole: str = WHOLE_FILE) -> list[str]:
    """List the weight files that the folder's index names; none where there is no index.

    Args:
        folder: of the model.
        whole: what the file would be called if there were only one.

    Raises:
        CheckpointError: the index is not one, or names a file outside the folder.
    """
    path = folder / f"{whole}.index.json"
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


def whole_names(folder: Path) -> list[str]:
    """List the weight files of a whole model, safetensors before pickles; none without any.

    Raises:
        CheckpointError: an index is not one, or names a file outside the folder.
    """
    for whole in (WHOLE_FILE, WHOLE_PICKLE):
        names = shard_names(folder, whole)
        if not names and (folder / whole).exists():
            names = [whole]
        if not names:  # shards may have lost their index
            stem, suffix = whole.split(".")
            names = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.{suffix}"))
            _check_shards(folder, names)
        if names:
            return names
    return []


def _check_shards(folder: Path, names: list[str]) -> None:
    for name in names:
        total = Path(name).stem.rpartition("-of-")[2]
        if not total.isdecimal() or int(total) != len(names):
            raise CheckpointError(
                f"'{folder}' has no index and {len(names)} shards, but '{name}' is one of "
                f"{total}; fetch it again"
            )


def _locate_builtin() -> Path:
    if not has_builtin():
        raise CheckpointError(
            f"'{BUILTIN}' is the model that ships with vla2, and this installation holds none; "
            f"give a folder, or a hub id like 'owner/name' ('./{BUILTIN}' is a folder of that name)"
        )
    return BUILTIN_FOLDER


def _locate_here(name: str, source: Source) -> Path | None:
    if not name:  # not the current folder
        return None
    candidates = [Path(os.path.expanduser(name))]  # noqa: PTH111  '~nobody' stays as it is
    if source.hub_dir is not None:
        candidates.append(source.hub_dir / name)
    # a name may be longer than any file's, or lead where we may not look
    return next((path for path in candidates if os.path.isdir(path)), None)  # noqa: PTH112


def _in_hub_dir(hub_dir: Path | None) -> dict[str, Path]:
    if hub_dir is None:
        return {}
    folders = [path.parent for path in hub_dir.glob("*/*/config.json")]
    return {folder.relative_to(hub_dir).as_posix(): folder for folder in folders}


def _in_cache() -> dict[str, Path]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return {}
    newest = {
        repo.repo_id: max(repo.revisions, key=lambda revision: revision.last_modified)
        for repo in cache.repos
        if repo.repo_type == "model" and repo.revisions
    }
    return {name: revision.snapshot_path for name, revision in newest.items()}


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # by __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _snapshot(
    name: str, revision: str | None, wanted: Wanted, *, cached_only: bool, is_final: bool = False
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
                name,
                revision=revision,
                allow_patterns=list(wanted.patterns),
                local_files_only=cached_only,
            )
        )
    except LocalEntryNotFoundError as error:
        if cached_only:
            # some file of the repository was not fetched; offline that does for one not needed
            partial = getattr(error, "snapshot_path", None)
            is_enough = is_final and partial is not None and wanted.is_complete(Path(partial))
            return Path(partial) if partial is not None and is_enough else None
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
    except Exception as error:  # what breaks on the way has no class of its own
        if cached_only:
            return None
        raise CheckpointError(
            f"'{name}' could not be fetched: {describe(error)}; the same command goes on where it "
            "was"
        ) from error
    # a snapshot that an interrupted download left without its files is as good as none
    return None if cached_only and not wanted.is_complete(folder) else folder


def _is_whole_checkpoint(folder: Path) -> bool:
    try:
        weights = whole_names(folder)
    except CheckpointError:
        return False
    if weights:
        needed = ["tokenizer_config.json", *weights]
    elif first_of(folder, ADAPTER_FILES):
        trainables = first_of(folder, TRAINABLES_FILES)
        needed = [ADAPTER_CONFIG, trainables.name if trainables else TRAINABLES_FILES[0]]
    elif part_files(folder):
        needed = []
    else:
        return False
    return all((folder / name).exists() for name in ["config.json", *needed])


def _is_described_tower(folder: Path) -> bool:
    return all((folder / name).exists() for name in TOWER_FACTS)


def _is_whole_tower(folder: Path) -> bool:
    return _is_described_tower(folder) and bool(first_of(folder, (WHOLE_FILE, WHOLE_PICKLE)))


# never code; of pickles only those that the public Base and LoRA checkpoints consist of, and
# CLIP's tower, which is read as warily (see `tensors`)
CHECKPOINT = Wanted(
    (
        *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"),
        *(PROJECTOR_FILES[1], ADAPTER_FILES[1], TRAINABLES_FILES[1]),
    ),
    _is_whole_checkpoint,
)
TOWER = Wanted(TOWER_FACTS, _is_described_tower)
TOWER_WITH_WEIGHTS = Wanted((*TOWER_FACTS, WHOLE_FILE, WHOLE_PICKLE), _is_whole_tower)
