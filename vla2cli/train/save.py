"""What training leaves: a checkpoint in one of the public forms, which `vla2 --model` loads.

    full        config.json, model.safetensors or shards, tokenizer: all, the towers too
    projector   config.json, mm_projector.bin, mm_projector_a.bin, audio_tower.bin: of these what
                was trained, or began anew; the rest is that of the model in `_name_or_path`
    adapter     config.json, adapter_config.json, adapter_model.bin, non_lora_trainables.bin

Source of the layout: upstream VideoLLaMA2@c0bb03a, train.py, and its branch audio_visual at
8cedfbd. There a run of the audio stages writes the small files beside a whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla2_models.checkpoint import Checkpoint
from vla2_models.files import read_json, write_json
from vla2_models.hub import TRAINABLES_FILES, part_files
from vla2_models.names import PEFT_PREFIX, public_name
from vla2_models.saving import (
    copy_own_tower,
    copy_text_files,
    fill_folder,
    public_config,
    save_weights,
)
from vla2cli.errors import UsageError
from vla2cli.train.config import TrainConfig
from vla2cli.train.lora import merge_state, write_adapter
from vla2cli.train.stages import AUDIO_PROJECTOR, AUDIO_TOWER, CONNECTOR, LANGUAGE_MODEL
from vla2cli.train.start import base_name, write_part

SMALL_PARTS = (CONNECTOR, AUDIO_PROJECTOR, AUDIO_TOWER)


def form_of(config: TrainConfig) -> str:
    """Tell in which form a run is saved: full, projector or adapter."""
    if config.save != "auto":
        return config.save
    if config.lora is not None:
        return "adapter"
    return "projector" if set(config.train) <= set(SMALL_PARTS) else "full"


def check_form(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Refuse a form in which the checkpoint's own form leaves no place, before anything is trained.

    Raises:
        UsageError: naming the way out.
    """
    form = form_of(config)
    if form != "full" and checkpoint.form == "adapter":
        raise UsageError(
            f"model '{config.model}' is an adapter, and another cannot be trained upon it; write "
            "it whole first: vla2 models convert"
        )
    others = [part for part in config.train if part not in (*SMALL_PARTS, LANGUAGE_MODEL)]
    if form != "full" and others:
        raise UsageError(f"{others[0]} is trained, which only 'save: full' keeps")


def save_trained(
    config: TrainConfig,
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    targets: list[str],
) -> None:
    """Write what was trained to the run's folder.

    Args:
        config: of the run.
        checkpoint: what it began from.
        state: of a `VideoLLaMA2`, perhaps with an adapter.
        dtype: what weights are written as.
        targets: the layers that an adapter is on.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    if config.lora is not None and form_of(config) == "full":
        state = merge_state(state, config.lora)

    def write(aside: Path) -> None:
        if form_of(config) == "full":
            fields = _write_full(checkpoint, state, dtype, aside)
        elif form_of(config) == "adapter":
            fields = _write_adapter(config, checkpoint, state, dtype, targets, aside)
        else:
            fields = _write_projector(config, checkpoint, state, dtype, aside)
        if config.num_frames is not None:
            fields["num_frames"] = config.num_frames
        write_json(aside / "config.json", fields)

    fill_folder(Path(config.output), write)


def _write_full(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], dtype: torch.dtype, folder: Path
) -> dict[str, Any]:
    save_weights(_cast(state, dtype), folder)
    copy_text_files(checkpoint, folder)
    return public_config(checkpoint, dtype)


def _write_projector(
    config: TrainConfig,
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    folder: Path,
) -> dict[str, Any]:
    parts = _small_parts(config, checkpoint)
    for part in parts:
        write_part(part, _cast(_part_of(state, part), dtype), folder)
    raw, base = _read_base(config, checkpoint)
    copy_own_tower(checkpoint.config.mm_vision_tower, checkpoint.folder, folder)
    return {
        **raw,
        "_name_or_path": base,
        "tune_mm_mlp_adapter": True,
        "tune_mm_mlp_adapter_a": AUDIO_PROJECTOR in parts,
    }


def _write_adapter(
    config: TrainConfig,
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    targets: list[str],
    folder: Path,
) -> dict[str, Any]:
    assert config.lora is not None
    raw, base = _read_base(config, checkpoint)
    language_model = _part_of(state, LANGUAGE_MODEL)
    write_adapter(language_model, dtype, targets, config.lora, base, folder)
    small = _small_parts(config, checkpoint)
    trained = {name: t for name, t in state.items() if name.partition(".")[0] in small}
    trainables = {
        PEFT_PREFIX + public_name(name): tensor.contiguous()
        for name, tensor in _cast(trained, dtype).items()
    }
    torch.save(trainables, folder / TRAINABLES_FILES[1])
    copy_own_tower(checkpoint.config.mm_vision_tower, checkpoint.folder, folder)
    return {**raw, "_name_or_path": base, "tune_mm_mlp_adapter": False}


def _small_parts(config: TrainConfig, checkpoint: Checkpoint) -> list[str]:
    """Name what was trained, and what the checkpoint has apart from its base."""
    own = {path.stem for path in part_files(checkpoint.folder)}
    own = own if checkpoint.form == "projector" else set()
    return [part for part in SMALL_PARTS if part in config.train or part in own]


def _read_base(config: TrainConfig, checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """Read the config.json, and name the model that the small parts are loaded with."""
    raw = read_json(checkpoint.folder / "config.json")
    return raw, raw["_name_or_path"] if checkpoint.form == "projector" else base_name(config.model)


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


def _part_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
