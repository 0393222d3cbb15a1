"""A checkpoint's folder -> which files hold its weights, told by the files alone.

    whole       model.safetensors, or shards with an index: everything, the tower too
    projector   mm_projector.*: the connector; the language model is that of another folder (-Base).
                The same of sound: mm_projector_a.*, and audio_tower.* where that was trained
    adapter     adapter_model.* and non_lora_trainables.*: LoRA on another folder's model

Tokenizer and generation_config.json are in the folder of the language model. Where no file holds
the vision tower, its own folder does, which may lie inside the checkpoint's.

Source: upstream VideoLLaMA2@c0bb03a, model/__init__.py `load_pretrained_model`, which goes by the
folder's name and leaves the tower of the two small forms random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from .beats_design import BEATsDesign, read_design
from .config import (
    LANGUAGE_CONFIGS,
    CheckpointConfig,
    audio_tower_name,
    read_audio,
    read_config,
    tower_name,
)
from .errors import CheckpointError
from .files import read_json
from .hub import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    PROJECTOR_FILES,
    TOWER,
    TOWER_WITH_WEIGHTS,
    TRAINABLES_FILES,
    WHOLE_FILE,
    WHOLE_PICKLE,
    Located,
    Source,
    Wanted,
    first_of,
    folders_on_disk,
    locate,
    own_tower,
    part_files,
    whole_names,
)
from .names import AUDIO_TOWER_PREFIX, PEFT_PREFIX, TOWER_PREFIX
from .public import suggest
from .tensors import read_shapes

WHOLE_PICKLES = "pytorch_model*.bin"


@dataclass(frozen=True)
class Layer:
    """Weight files of one folder; a layer before it in a checkpoint goes before."""

    files: tuple[Path, ...]
    # how names in the files begin -> how the public ones do; other names are not looked at
    prefixes: Mapping[str, str]
    is_own: bool  # of the checkpoint itself, where a tensor that has no place is an error

    def shapes(self, path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Read the header of one file.

        Yields:
            Public name, name in the file, shape.

        Raises:
            CheckpointError: the file is damaged, or holds more than tensors.
        """
        for key, shape in read_shapes(path).items():
            prefix = next((prefix for prefix in self.prefixes if key.startswith(prefix)), None)
            if prefix is not None:
                yield self.prefixes[prefix] + key.removeprefix(prefix), key, shape


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk whose configuration is understood; no weight is read yet."""

    located: Located
    config: CheckpointConfig
    layers: tuple[Layer, ...]
    form: str  # whole | projector | adapter
    text_folder: Path  # with the tokenizer and generation_config.json
    adapter: Path | None = None  # the file of a LoRA adapter, adapter_config.json beside it

    @property
    def folder(self) -> Path:
        """The folder that holds config.json."""
        return self.located.folder

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(path.stat().st_size for path in self.weight_files())

    def weight_files(self) -> list[Path]:
        """List what decides the weights: the checkpoint's own files first, then the others'."""
        files = [path for layer in self.layers for path in layer.files]
        if self.adapter is not None:
            files[:0] = [self.adapter, self.adapter.with_name(ADAPTER_CONFIG)]
        return files


def open_checkpoint(
    name: str,
    source: Source | None = None,
    *,
    revision: str | None = None,
    allow_pickles: bool = False,
) -> Checkpoint:
    """Find a checkpoint and what it builds on, and read their configuration.

    Args:
        name: a folder, or a hub id.
        source: where to look for it, for the tower and for the language model it names.
        revision: commit, tag or branch on the hub.
        allow_pickles: whether whole models may be pickles, of tensors alone; the small public
            files of Base and LoRA checkpoints always may.

    Raises:
        CheckpointError: it is nowhere, or is not understood.
    """
    source = source or Source()
    located = _locate(name, source, revision)
    folder = located.folder
    raw = read_json(folder / "config.json")
    if "videollama2" not in str(raw.get("model_type")):
        raise CheckpointError(
            f"'{folder}' holds a model of type {raw.get('model_type')!r}, "
            "expected a VideoLLaMA 2 checkpoint (videollama2_…)"
        )
    config = read_config(folder, _tower_folder(tower_name(folder, raw), folder, source, TOWER))
    form = find_form(folder, raw)
    layers, text_folder = _find_layers(folder, form, source)
    if not allow_pickles:
        _refuse_whole_pickles(folder, layers)
    if not any(_holds_tower(layer) for layer in layers):
        layers.append(_tower_layer(config, source))
    if audio_tower_name(folder, raw) is not None:
        config = replace(config, audio=read_audio(config, _audio_design(folder, layers)))
    adapter = first_of(folder, ADAPTER_FILES)
    return Checkpoint(located, config, tuple(layers), form, text_folder, adapter)


def find_form(folder: Path, raw: Mapping[str, Any]) -> str:
    """Tell what a checkpoint is by its files: whole, projector or adapter."""
    if first_of(folder, ADAPTER_FILES):
        return "adapter"
    # a training run may leave both
    is_tuned = bool(raw.get("tune_mm_mlp_adapter"))
    has_parts = bool(part_files(folder))
    return "projector" if has_parts and (is_tuned or not whole_names(folder)) else "whole"


def _locate(name: str, source: Source, revision: str | None) -> Located:
    try:
        return locate(name, source, revision=revision)
    except CheckpointError as error:
        near = suggest(name, folders_on_disk(source.hub_dir))
        if near is None:
            raise
        raise CheckpointError(f"{error}; did you mean '{near}'?") from error


def _find_layers(folder: Path, form: str, source: Source) -> tuple[list[Layer], Path]:
    """Find the files of a checkpoint and of what it builds on, and the folder with its text."""
    if form == "whole":
        return [Layer(_whole_files(folder), {"": ""}, is_own=True)], folder
    own = part_files(folder)
    if form == "adapter":
        trainables = first_of(folder, TRAINABLES_FILES)
        own = () if trainables is None else (trainables,)
    if not own:
        raise CheckpointError(
            f"'{folder}' has an adapter but no {TRAINABLES_FILES[1]}, which holds its connector; "
            "fetch it again"
        )
    layer = Layer(own, {PEFT_PREFIX: "", "": ""}, is_own=True)
    base = _find_base(folder, source)
    base_form = find_form(base, read_json(base / "config.json"))
    if base_form == "adapter" or (base_form, form) == ("projector", "projector"):
        raise CheckpointError(
            f"'{folder}' builds on '{base}', which is no language model but of form {base_form}; "
            f"write that one whole first: vla2 models convert {quote(str(base))} -o FOLDER"
        )
    below, text_folder = _find_layers(base, base_form, source)
    return [layer, *(replace(other, is_own=False) for other in below)], text_folder


def _whole_files(folder: Path) -> tuple[Path, ...]:
    names = whole_names(folder)
    for name in names:
        if not (folder / name).exists():
            raise CheckpointError(
                f"'{folder}' lacks '{name}', which its index names; fetch it again"
            )
    if not names:
        raise CheckpointError(
            f"'{folder}' holds no weights: expected {WHOLE_FILE}, shards with an index, "
            f"{PROJECTOR_FILES[1]} or {ADAPTER_FILES[1]}"
        )
    return tuple(folder / name for name in names)


def _refuse_whole_pickles(folder: Path, layers: Sequence[Layer]) -> None:
    files = (path for layer in layers for path in layer.files)
    pickle = next((path for path in files if path.match(WHOLE_PICKLES)), None)
    if pickle is not None:
        raise CheckpointError(
            f"'{pickle.parent}' holds no safetensors weights, only pickles such as "
            f"'{pickle.name}'; write them anew: vla2 models convert {quote(str(folder))} -o FOLDER"
        )


def _find_base(folder: Path, source: Source) -> Path:
    """Find the model that a projector or an adapter was trained on."""
    raw = read_json(folder / "config.json")
    name = raw.get("_name_or_path")
    if not name and (folder / ADAPTER_CONFIG).exists():
        name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"'{folder}/config.json' has no _name_or_path, which names the language model that "
            "this checkpoint builds on"
        )
    try:
        base = locate(name, source).folder
    except CheckpointError as error:
        raise CheckpointError(
            f"'{folder}' builds on the language model '{name}': {error} (or set _name_or_path in "
            "its config.json to that model's folder)"
        ) from error
    of_base = read_json(base / "config.json")
    found = str(of_base.get("model_type"))
    family = found if found.startswith("videollama2") else f"videollama2_{found}"
    if LANGUAGE_CONFIGS.get(family) is not LANGUAGE_CONFIGS.get(str(raw.get("model_type"))):
        raise CheckpointError(
            f"'{folder}' is of type '{raw.get('model_type')}', but builds on '{base}' of type "
            f"'{found}'; the two do not belong together"
        )
    if of_base.get("quantization_config"):
        raise CheckpointError(
            f"'{folder}' builds on '{base}', whose weights are quantised; it needs them as they "
            "were before"
        )
    return base


def _holds_tower(layer: Layer) -> bool:
    names = (public for path in layer.files for public, _, _ in layer.shapes(path))
    return any(name.startswith(TOWER_PREFIX) for name in names)


def _audio_design(folder: Path, layers: Sequence[Layer]) -> BEATsDesign:
    shapes = {
        public.removeprefix(AUDIO_TOWER_PREFIX): shape
        for layer in reversed(layers)  # the first to hold a tensor is the one that counts
        for path in layer.files
        for public, _, shape in layer.shapes(path)
        if public.startswith(AUDIO_TOWER_PREFIX)
    }
    if not shapes:
        raise CheckpointError(
            f"'{folder}/config.json' names an mm_audio_tower, but no weight file holds a tensor "
            f"{AUDIO_TOWER_PREFIX}*; the checkpoint is incomplete"
        )
    try:
        return read_design(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"'{folder}': {error}") from error


def _tower_folder(name: str, folder: Path, source: Source, wanted: Wanted) -> Path:
    return own_tower(name, folder) or locate(name, source, wanted=wanted).folder


def _tower_layer(config: CheckpointConfig, source: Source) -> Layer:
    name = config.mm_vision_tower
    folder = _tower_folder(name, config.folder, source, TOWER_WITH_WEIGHTS)
    path = first_of(folder, (WHOLE_FILE, WHOLE_PICKLE))
    if path is None:
        raise CheckpointError(
            f"'{folder}' has no {WHOLE_FILE}, and the checkpoint that names this tower does not "
            "hold its weights"
        )
    return Layer((path,), {"vision_model.": TOWER_PREFIX}, is_own=False)
