"""What an export is of: the key that differs wherever its graphs may."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from vla2_models.checkpoint import Checkpoint
from vla2_models.config import NOT_OURS, CheckpointConfig
from vla2_models.fingerprint import hash_weights, is_remembered
from vla2cli.console import Say, format_size
from vla2cli.frontend.manifest import FORMAT, Origin, versions
from vla2cli.frontend.store import LONG_BYTES


def origin_of(checkpoint: Checkpoint, precision: str, say: Say) -> Origin:
    """Say what an export of this checkpoint is of; hashes its weights, unless remembered.

    Args:
        checkpoint: from `open_checkpoint`.
        precision: one of `PRECISIONS`.
        say: told where hashing takes a while.
    """
    if checkpoint.size_bytes > LONG_BYTES and not is_remembered(checkpoint.weight_files()):
        say(f"hashing {format_size(checkpoint.size_bytes)} of weights, once …")
    sha256 = hash_weights(checkpoint.weight_files())
    facts = {
        "format": FORMAT,
        "weights": sha256,
        "design": design_of(checkpoint.config),
        "precision": precision,
        "versions": versions(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Origin(checkpoint.located.id, checkpoint.located.revision, sha256, precision, key)


def design_of(config: CheckpointConfig) -> dict[str, Any]:
    """List what changes the graphs and cannot be told from the weights.

    `stc_connector` and `stc_connector_v35` have the same tensors, and a tower the same whatever
    layer is selected.
    """
    tower = {k: v for k, v in config.vision.to_dict().items() if k not in NOT_OURS}
    audio = config.audio and {
        "projector": config.audio.projector_type,
        "tower": asdict(config.audio.design),
    }
    return {
        "tower": {**tower, "class": type(config.vision).__name__},
        "num_tower_blocks": config.num_tower_blocks,
        "connector": asdict(config.connector),
        "audio": audio,
    }
