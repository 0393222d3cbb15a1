"""Where a run begins: a checkpoint, and new connectors where it has none or others are wanted.

New parts are written, drawn by the seed, as a checkpoint of the small form to OUTPUT/start, whose
config.json names the model that they belong to. From there on all is loaded in one way, checked as
every checkpoint is, and a run that goes on begins from the same numbers.

    model                      wanted                        OUTPUT/start
    a VideoLLaMA 2             its own connectors            -
    a VideoLLaMA 2             another connector             mm_projector.bin
    a VideoLLaMA 2 without     audio_tower: a file of BEATs  mm_projector_a.bin, audio_tower.bin
    ears
    a language model           vision_tower, connector       mm_projector.bin
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla2_models.beats import build_audio_projector
from vla2_models.beats_file import load_beats
from vla2_models.checkpoint import Checkpoint, find_form, open_checkpoint
from vla2_models.config import DEFAULT_NUM_FRAMES, LANGUAGE_CONFIGS, tower_name
from vla2_models.connectors import PROJECTOR_TYPES, build_connector
from vla2_models.files import read_json, write_json
from vla2_models.hub import BUILTIN, TOWER, Source, locate, part_files
from vla2_models.saving import copy_own_tower, fill_folder
from vla2cli.errors import UsageError
from vla2cli.train.config import TrainConfig
from vla2cli.train.stages import AUDIO_PROJECTOR, AUDIO_TOWER, CONNECTOR, HEARING

START = "start"  # folder of the new parts, below the run's
AUDIO_PROJECTOR_TYPE = "mlp2x_gelu"  # as in the public scripts
SELECT_LAYER = -2  # of the vision tower, the same

Parts = dict[str, dict[str, Tensor]]  # part of `VideoLLaMA2` -> its state


def open_start(config: TrainConfig, source: Source) -> Checkpoint:
    """Find what a run begins from, writing new parts where they are wanted and not there yet.

    Raises:
        UsageError: the model cannot be what the configuration wants of it.
        CheckpointError: it is nowhere, or not understood.
    """
    folder = Path(config.output) / START
    located = locate(config.model, source)
    raw = read_json(located.folder / "config.json")
    is_whole_family = "videollama2" in str(raw.get("model_type"))
    wants = _new_parts(config, raw, is_whole_family)
    if wants and not (folder / "config.json").exists():
        base = _base_name(config, located.folder, raw, is_whole_family)
        _write_start(config, source, folder, raw, base, wants, located.folder)
    checkpoint = open_checkpoint(str(folder) if wants else config.model, source)
    _check(config, checkpoint)
    return checkpoint


def _new_parts(config: TrainConfig, raw: Mapping[str, Any], is_whole_family: bool) -> list[str]:
    """Name the parts that begin anew."""
    if not is_whole_family:
        for key in ("vision_tower", "connector"):
            if getattr(config, key) is None:
                raise UsageError(
                    f"model is '{config.model}' of type {raw.get('model_type')!r}, no VideoLLaMA "
                    f"2; to begin from it give {key} as well"
                )
        if f"videollama2_{raw.get('model_type')}" not in LANGUAGE_CONFIGS:
            raise UsageError(
                f"model is '{config.model}' of type {raw.get('model_type')!r}, expected a Mistral, "
                "Mixtral or Qwen2 model"
            )
    elif config.vision_tower is not None:
        raise UsageError(
            f"vision_tower is given, but model '{config.model}' has one; it is for language models"
        )
    parts = []
    if not is_whole_family or config.connector not in (None, raw.get("mm_projector_type")):
        parts.append(CONNECTOR)
    if config.audio_tower is not None:
        if raw.get("mm_audio_tower"):
            raise UsageError(
                f"audio_tower is given, but model '{config.model}' has one; leave it out"
            )
        parts += HEARING
    return parts


def _base_name(
    config: TrainConfig, folder: Path, raw: Mapping[str, Any], is_whole_family: bool
) -> str:
    """Name the model that the new parts are loaded with, as `_name_or_path` has it."""
    form = find_form(folder, raw) if is_whole_family else "whole"
    if form == "adapter":
        raise UsageError(
            f"model '{config.model}' is an adapter; to give it new parts write it whole first: "
            "vla2 models convert"
        )
    if form == "projector":
        return str(raw.get("_name_or_path"))
    return base_name(config.model)


def base_name(name: str) -> str:
    """Return a hub id, and `builtin`, as it is, and a folder with its whole path."""
    if name == BUILTIN:
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _write_start(
    config: TrainConfig,
    source: Source,
    folder: Path,
    raw: Mapping[str, Any],
    base: str,
    wants: list[str],
    model_folder: Path,
) -> None:
    raw = dict(raw)
    if CONNECTOR in wants:
        raw = _with_connector(config, source, raw)
    parts: Parts = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if CONNECTOR in wants:
            parts[CONNECTOR] = _connector(raw).state_dict()
        if AUDIO_TOWER in wants:
            raw |= _add_ears(config, raw, parts)
    kept = [path for path in part_files(model_folder) if path.stem not in parts]

    def write(aside: Path) -> None:
        for path in kept if base != base_name(config.model) else ():
            shutil.copyfile(path, aside / path.name)
        for part, state in parts.items():
            write_part(part, state, aside)
        copy_own_tower(tower_name(model_folder, raw), model_folder, aside)
        fields = {**raw, "_name_or_path": base, "tune_mm_mlp_adapter": True}
        write_json(aside / "config.json", fields)

    fill_folder(folder, write)


def _with_connector(config: TrainConfig, source: Source, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the connector that is wanted, and the tower below it, in a config.json."""
    projector_type = config.connector or "linear"
    if projector_type not in PROJECTOR_TYPES:
        raise UsageError(
            f"connector is '{projector_type}', expected one of {', '.join(PROJECTOR_TYPES)}"
        )
    fields = {**raw, "mm_projector_type": projector_type}
    fields.pop("mm_projector_padding", None)  # of the one before
    if config.vision_tower is not None:
        tower = read_json(locate(config.vision_tower, source, wanted=TOWER).folder / "config.json")
        vision = tower.get("vision_config", tower)
        fields |= {
            "model_type": f"videollama2_{raw['model_type']}",
            "mm_vision_tower": base_name(config.vision_tower),
            "mm_hidden_size": vision["hidden_size"],
            "mm_vision_select_layer": SELECT_LAYER,
            "mm_vision_select_feature": "patch",
            "num_frames": config.num_frames or DEFAULT_NUM_FRAMES,
            "use_mm_proj": True,
        }
    return fields


def _connector(raw: Mapping[str, Any]) -> nn.Module:
    design = PROJECTOR_TYPES[raw["mm_projector_type"]]
    return build_connector(design, raw["mm_hidden_size"], raw["hidden_size"])


def _add_ears(config: TrainConfig, raw: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """Add BEATs and a new audio projector to the parts; return what config.json says of them."""
    assert config.audio_tower is not None
    tower = load_beats(Path(config.audio_tower))
    width, hidden_size = tower.design.hidden_size, raw["hidden_size"]
    projector = build_audio_projector(AUDIO_PROJECTOR_TYPE, width, hidden_size)
    parts[AUDIO_TOWER], parts[AUDIO_PROJECTOR] = tower.state_dict(), projector.state_dict()
    return {
        "mm_audio_tower": config.audio_tower,
        "mm_projector_a_type": AUDIO_PROJECTOR_TYPE,
        "mm_hidden_size_a": width,
        "hidden_size_a": hidden_size,
    }


def _check(config: TrainConfig, checkpoint: Checkpoint) -> None:
    audio = checkpoint.config.audio
    hearing = [part for part in config.train if part in HEARING]
    if audio is None and (hearing or config.va):
        what = f"{hearing[0]} is trained" if hearing else "va is true"
        raise UsageError(
            f"{what}, but model '{config.model}' has no audio tower; give audio_tower, a file of "
            "BEATs"
        )
    fewest = checkpoint.config.connector.min_frames
    if config.num_frames is not None and config.num_frames < fewest:
        raise UsageError(
            f"num_frames is {config.num_frames}, but the {checkpoint.config.projector_type} needs "
            f"at least {fewest}"
        )


def write_part(part: str, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write one part as the public scripts do: mm_projector.bin and the like.

    Args:
        part: attribute of `VideoLLaMA2`.
        state: its tensors, by their names there.
        folder: gets the file.
    """
    tensors = {f"model.{part}.{name}": tensor.contiguous() for name, tensor in state.items()}
    torch.save(tensors, folder / f"{part}.bin")
