"""How a run is set: a flag, else a `VLA2_*` variable, else the YAML file, else the default."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla2_models.errors import one_line
from vla2_models.files import is_count, is_positive, read_json
from vla2cli.errors import ModelError, UsageError

DEFAULT_BATCH = 8  # clips that are encoded, and prompts that are answered, together
DEFAULT_MAX_NEW_TOKENS = 512  # the reference: 2048; a cut text has finish_reason "length"
DEFAULT_TOP_P = 0.9  # the reference's, when it samples
DEFAULT_TOP_K = 50  # transformers', where generation_config.json has none

# settings of generation_config.json that change the tokens and that vla2 does not apply
UNSUPPORTED_GENERATION = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "min_length": 0,
    "min_new_tokens": None,
    "min_p": None,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "typical_p": 1.0,
}


def is_debug() -> bool:
    """Tell whether `VLA2_DEBUG` asks for tracebacks."""
    return os.environ.get("VLA2_DEBUG", "").lower() not in ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class GenerationSettings:
    """How the language model goes on from a prompt."""

    eos_token_ids: tuple[int, ...]  # any of them ends the text
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # used when temperature is above 0
    top_k: int = 0  # the same; 0 keeps all
    repetition_penalty: float = 1.0  # on generated tokens, in greedy decoding too
    seed: int = 0

    @property
    def is_sampled(self) -> bool:
        """Whether the text depends on the seed."""
        return self.temperature > 0


@dataclass(frozen=True)
class GenerationChoice:
    """What the user asked for; None leaves it to the checkpoint or the default."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UsageError: naming the flag and the value.
        """
        if self.max_new_tokens < 1:
            raise UsageError(f"'--max-new-tokens {self.max_new_tokens}': at least 1 is needed")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"'--temperature {self.temperature}': expected 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"'--top-p {self.top_p}': expected a number above 0, at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"'--top-k {self.top_k}': at least 1 is needed")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise UsageError("'--top-p' and '--top-k' sample; they need '--temperature' above 0")


def resolve_generation(
    choice: GenerationChoice, folder: Path, eos_token_id: int
) -> GenerationSettings:
    """Join the user's choice with the checkpoint's generation_config.json.

    Args:
        choice: the user's.
        folder: the checkpoint's; without a generation_config.json its config.json counts.
        eos_token_id: the tokenizer's, which ends a text in any case.

    Raises:
        CheckpointError: the file is unreadable.
        ModelError: it asks for what is not applied here.
    """
    saved = _read_generation_config(folder)
    for field, default in UNSUPPORTED_GENERATION.items():
        if saved.get(field, default) not in (default, None):
            raise ModelError(
                f"'{folder}': generation_config.json sets {field} to {saved[field]!r}, which vla2 "
                "does not apply; remove it to go on without"
            )
    saved_eos = saved.get("eos_token_id")
    eos = saved_eos if isinstance(saved_eos, list) else [saved_eos]
    penalty = saved.get("repetition_penalty") or 1.0
    numbers = {
        "eos_token_id": (saved_eos, all(i is None or is_count(i) for i in eos), "ids"),
        "top_k": (saved.get("top_k"), is_count(saved.get("top_k") or 0), "a count"),
        "repetition_penalty": (penalty, is_positive(penalty), "a number above 0"),
    }
    for field, (value, is_right, expected) in numbers.items():
        if not is_right:
            raise ModelError(
                f"'{folder}': generation_config.json sets {field} to {value!r}, expected {expected}"
            )
    is_sampled = choice.temperature > 0
    top_k = choice.top_k or saved.get("top_k", DEFAULT_TOP_K) or 0
    return GenerationSettings(
        eos_token_ids=tuple(sorted({i for i in eos if i is not None} | {eos_token_id})),
        max_new_tokens=choice.max_new_tokens,
        temperature=choice.temperature,
        top_p=(choice.top_p or DEFAULT_TOP_P) if is_sampled else 1.0,
        top_k=top_k if is_sampled else 0,
        repetition_penalty=float(penalty),
        seed=choice.seed,
    )


def _read_generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if path.exists():
        return read_json(path)
    return {"eos_token_id": read_json(folder / "config.json").get("eos_token_id")}


def read_config_file(path: Path, known: Collection[str]) -> Mapping[str, Any]:
    """Read a YAML file of settings, named like the long flags without their dashes.

    Args:
        path: the file.
        known: the names a setting may have, with underscores.

    Raises:
        UsageError: the file is unreadable or sets something unknown.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"'{path}' holds no settings; expected lines like 'batch: 4'")
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0].replace('_', '-')}'?" if near else ""
            raise UsageError(f"'{path}' sets '{name}', which this command does not have{hint}")
    return settings
