"""What a training run is told: a YAML file, and settings that go before it.

A key that is not given has the value of the stage (see `stages.STAGES`), or the default here. An
unknown key and a value of a wrong kind are refused before anything is opened.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from vla2_models.errors import one_line
from vla2_models.files import is_count
from vla2cli.errors import UsageError, why
from vla2cli.train.conversation import Form
from vla2cli.train.stages import LANGUAGE_MODEL, PARTS, STAGES, TOWERS, Stage

PRECISIONS = ("auto", "float32", "bfloat16")
FORMS = get_args(Form)
SAVES = ("auto", "full", "projector")
SAVE_DTYPES = ("auto", "float32", "float16", "bfloat16")
MEDIA = ("av", "video", "audio")
EXAM_SEED = 2**20  # of the clips that exams are about
ASPECT_RATIOS = (None, "pad")
# in the place of a stage's settings of how files are seen and heard
MEDIA_OF_WORLD: Mapping[str, Any] = {"image_aspect_ratio": None, "va": False}
# what of a run may change when it goes on: none of it changes what answers teach by more than
# rounding; losses beside the answers' are means over what is computed at once
FREE_KEYS = (
    *("output", "log_steps", "save_steps", "workers"),
    *("per_device_batch", "gradient_checkpointing"),
)


@dataclass(frozen=True)
class DataFile:
    """One JSON file of samples."""

    file: str
    folder: str | None = None  # what its paths start from; None: the file's own folder
    weight: float = 1.0  # how often a sample is seen in one epoch


@dataclass(frozen=True)
class WorldData:
    """Clips of the drawn world, made as they are needed (docs/world.md)."""

    clips: int  # in one epoch
    seed: int = 0  # of the collection
    questions: int = 6  # about each clip, its caption among them; all of them behind it at once
    medium: str | None = None  # what of a clip is given; None: now this, now that
    # of the loss of words that each token of the media is to name; it falls to 0 within a share of
    # the steps
    word_weight: float = 1.0
    word_share: float = 0.5
    apart: float = 0.0  # share of the shapes that have the form or the colour alone
    spelled: float = 0.0  # share of the conversations whose words are cut into smaller pieces
    exam_steps: int | None = None  # between two exams on clips of both splits; None: no exam


@dataclass(frozen=True)
class Lora:
    """An adapter on the linear layers of the language model; the numbers are the scripts'."""

    r: int = 128
    alpha: float = 256
    dropout: float = 0.05


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, nothing left to the stage."""

    model: str  # folder or hub id: of a VideoLLaMA 2, or of the language model to begin from
    stage: str
    output: str  # folder
    train: tuple[str, ...]  # of `PARTS`
    form: Form
    learning_rate: float
    batch: int  # samples of one step, over all devices
    per_device_batch: int  # of these, samples that one device takes at a time
    epochs: float
    image_aspect_ratio: str | None
    va: bool  # whether the sound of videos is heard
    data: tuple[DataFile, ...] = ()
    world: WorldData | None = None  # in the place of files
    max_steps: int | None = None  # goes before epochs
    projector_learning_rate: float | None = None  # of both projectors; None: as the rest
    muon_learning_rate: float | None = None  # of hidden matrices, by Muon; None: AdamW alone
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_length: int = 2048  # tokens of a text, without those of its medium
    pack: int = 1  # conversations about one medium that share its tokens
    num_frames: int | None = None  # None: as the model has it
    precision: str = "auto"  # float32 on the CPU, bfloat16 elsewhere
    gradient_checkpointing: bool = True
    lora: Lora | None = None
    quantize: str | None = None  # 4bit: the language model below an adapter
    connector: str | None = None  # mm_projector_type; another than the model's begins anew
    vision_tower: str | None = None  # where `model` is a language model
    audio_tower: str | None = None  # BEATs, for a model without ears; its projector begins anew
    save: str = "auto"  # projector: the small parts alone; full: the whole model
    save_dtype: str = "auto"  # bfloat16 where products are made in it, else float32
    seed: int = 42
    save_steps: int = 500
    log_steps: int = 1
    workers: int = 2  # processes that read samples; 0: none beside the training itself
    deepspeed: str | Mapping[str, Any] | None = None  # as `TrainingArguments` takes it
    fsdp: str | Mapping[str, Any] | None = None  # the same: `fsdp_config`

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON has them."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and join it with `key=value` settings that go before it.

    Args:
        path: the file.
        overrides: such as `batch=8` or `lora.r=16`; the value is YAML.

    Raises:
        UsageError: naming the key, the value and what was expected.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {why(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"'{path}' holds no settings; expected lines like 'stage: joint'")
    for override in overrides:
        _set(content, override)
    try:
        return make_config(content)
    except UsageError as error:
        raise UsageError(f"'{path}': {error}") from error


def make_config(content: Mapping[str, Any]) -> TrainConfig:
    """Make a configuration of settings, the stage's in the place of those not given.

    Raises:
        UsageError: naming the key, the value and what was expected.
    """
    values = {str(key): value for key, value in content.items()}
    _check_keys(values, [field.name for field in fields(TrainConfig)], "setting")
    for key in ("model", "stage", "output"):
        if values.get(key) is None:
            raise UsageError(f"no {key} is given")
    for key, (is_kind, wanted) in KINDS.items():
        if values.get(key) is not None and not is_kind(values[key]):
            raise UsageError(f"{key} is {_shown(values[key])}, expected {wanted}")
    if values["stage"] not in STAGES:
        hint = _near(values["stage"], STAGES)
        known = ", ".join(STAGES)
        raise UsageError(f"stage is {_shown(values['stage'])}, expected one of {known}{hint}")
    stage = STAGES[values["stage"]]
    if values.get("world") is not None:
        _check_media_keys(values)
        stage = dataclasses.replace(stage, **MEDIA_OF_WORLD)
    config = TrainConfig(**{**_stage_values(stage), **_typed(values)})
    if "batch" in values and "per_device_batch" not in values:
        smaller = min(config.batch, config.per_device_batch)
        config = dataclasses.replace(config, per_device_batch=smaller)
    _check(config)
    return config


def _check_media_keys(values: Mapping[str, Any]) -> None:
    for key in MEDIA_OF_WORLD:
        if values.get(key) is not None:
            raise UsageError(f"{key} is for files; clips of world have their own; leave it out")


def complete_record(record: Any) -> dict[str, Any]:
    """Say the settings that an earlier version wrote down as `TrainConfig.as_dict` does here.

    Settings that came later get their defaults; those that are gone were of no effect.

    Raises:
        UsageError: it is not understood.
    """
    filled = _filled(record, TrainConfig)
    filled["data"] = [_filled(file, DataFile) for file in filled["data"]]
    for key, kind in (("world", WorldData), ("lora", Lora)):
        if filled[key] is not None:
            filled[key] = _filled(filled[key], kind)
    return filled if filled["world"] is None else {**filled, **MEDIA_OF_WORLD}


def _filled(record: Any, kind: type[TrainConfig | DataFile | WorldData | Lora]) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UsageError(f"{_shown(record)}, which is no table of settings")
    known = [field.name for field in fields(kind)]
    for key, value in record.items():
        if key not in known and value:
            raise UsageError(f"{key} {_shown(value)}, which this version does not know")
    defaults = {f.name: f.default for f in fields(kind) if f.default is not dataclasses.MISSING}
    return {**defaults, **{key: value for key, value in record.items() if key in known}}


def _stage_values(stage: Stage) -> dict[str, Any]:
    return {
        "train": stage.trained,
        "form": stage.form,
        "learning_rate": stage.learning_rate,
        "batch": stage.batch,
        "per_device_batch": stage.per_device_batch,
        "epochs": stage.epochs,
        "image_aspect_ratio": stage.image_aspect_ratio,
        "va": stage.va,
    }


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give values their types; what is null is not given, but for what may be none."""
    typed = {key: value for key, value in values.items() if value is not None}
    if "image_aspect_ratio" in values:
        typed["image_aspect_ratio"] = values["image_aspect_ratio"]
    if "train" in typed:
        typed["train"] = tuple(typed["train"])
    if "data" in typed:
        typed["data"] = tuple(map(_data_file, typed["data"]))
    if "lora" in typed:
        # `lora: true` is the scripts' adapter, `lora: false` none
        typed["lora"] = _lora(typed["lora"])
    if "world" in typed:
        typed["world"] = _world(typed["world"])
    return {key: _plain(value, KINDS.get(key)) for key, value in typed.items()}


def _data_file(entry: Mapping[str, Any]) -> DataFile:
    given = _given(entry, DATA_KINDS, "data")
    if "file" not in given:
        raise UsageError(f"data has an entry without a file: {_shown(entry)}")
    return DataFile(**given)


def _world(value: Mapping[str, Any]) -> WorldData:
    given = _given(value, WORLD_KINDS, "world")
    if "clips" not in given:
        raise UsageError("world has no clips; expected their number in an epoch")
    return WorldData(**given)


def _lora(value: bool | Mapping[str, Any]) -> Lora | None:
    if isinstance(value, bool):
        return Lora() if value else None
    return Lora(**_given(value, LORA_KINDS, "lora"))


def _given(value: Mapping[str, Any], kinds: Mapping[str, Kind], of: str) -> dict[str, Any]:
    """Check a table of settings below a key; what is null is not given."""
    _check_keys(value, kinds, f"setting of {of}")
    given = {key: setting for key, setting in value.items() if setting is not None}
    for key, setting in given.items():
        is_kind, wanted = kinds[key]
        if not is_kind(setting):
            raise UsageError(f"{key} of {of} is {_shown(setting)}, expected {wanted}")
    return {key: _plain(setting, kinds[key]) for key, setting in given.items()}


def _check(config: TrainConfig) -> None:
    _check_world(config)
    is_sharded = config.fsdp is not None or config.deepspeed is not None
    if config.muon_learning_rate is not None and is_sharded:
        raise UsageError(
            "muon_learning_rate is of whole matrices, which fsdp and deepspeed cut; leave it out"
        )
    if config.muon_learning_rate is not None and config.lora is not None:
        raise UsageError("muon_learning_rate is not for the matrices of lora; give one of the two")
    if config.muon_learning_rate is not None and config.projector_learning_rate is not None:
        raise UsageError(
            "projector_learning_rate is of AdamW, and the projectors' matrices are "
            "muon_learning_rate's; give one of the two"
        )
    if config.batch % config.per_device_batch:
        raise UsageError(
            f"batch is {config.batch}, no multiple of per_device_batch {config.per_device_batch}"
        )
    if config.lora is not None and LANGUAGE_MODEL not in config.train:
        raise UsageError(
            f"lora trains an adapter of the language model, which stage {config.stage} keeps "
            "frozen; take video-finetune or joint, or name it under train"
        )
    if config.quantize is not None and config.lora is None:
        raise UsageError("quantize is 4bit, but weights of 4 bits cannot be trained; add lora")
    if config.save == "full" and config.quantize is not None:
        raise UsageError("save is full, but a language model of 4 bits cannot be; leave save out")
    if config.save == "projector" and LANGUAGE_MODEL in config.train:
        raise UsageError("save is projector, but the language model is trained; leave save out")
    if config.deepspeed is not None and config.fsdp is not None:
        raise UsageError("deepspeed and fsdp exclude each other; give one")


def _check_world(config: TrainConfig) -> None:
    world = config.world
    if config.stage == TOWERS and world is None:
        raise UsageError(f"stage {TOWERS} learns from the drawn world alone; give world")
    if world is None:
        return
    if config.data:
        raise UsageError("world and data exclude each other; give one")
    if config.num_frames is not None:
        raise UsageError(
            "num_frames is for files; clips of world have the model's own; leave it out"
        )
    if config.pack != 1:
        raise UsageError("pack is for files; world.questions about a clip are packed; leave it out")
    if config.stage == TOWERS and world.exam_steps is not None:
        raise UsageError(f"world.exam_steps: stage {TOWERS} answers no questions; leave it out")
    if config.stage == TOWERS and (world.apart or world.spelled):
        raise UsageError(
            f"world.apart and world.spelled are for stages with text; leave them out of {TOWERS}"
        )
    if config.stage == TOWERS and config.train != STAGES[TOWERS].trained:
        raise UsageError(f"stage {TOWERS} trains both towers and nothing else; leave train out")
    if world.exam_steps is not None and world.seed == EXAM_SEED:
        raise UsageError(f"seed of world is {world.seed}, that of the exams' clips; give another")
    if world.exam_steps is not None and (config.fsdp is not None or config.deepspeed is not None):
        raise UsageError(
            "world.exam_steps: one process asks a whole network, which fsdp and deepspeed cut; "
            "leave it out"
        )


def _set(content: dict[str, Any], override: str) -> None:
    """Put a `key=value` setting into the content of a file."""
    name, separator, text = override.partition("=")
    keys = [key.strip().replace("-", "_") for key in name.split(".")]
    if not separator or not all(keys):
        raise UsageError(f"'--set {override}': expected key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"'--set {override}': {one_line(error)}") from error
    for key in keys[:-1]:
        below = content.get(key)
        content[key] = dict(below) if isinstance(below, dict) else {}
        content = content[key]
    content[keys[-1]] = value


def _check_keys(values: Mapping[str, Any], known: Collection[str], what: str) -> None:
    for key in values:
        if key not in known:
            raise UsageError(f"'{key}' is no {what}{_near(key, known)}")


def _near(name: object, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:100]


def _plain(value: Any, kind: Kind | None) -> Any:
    """Make a number of a text that stands for one."""
    is_number = kind is not None and kind[0] in (
        _is_positive,
        _is_below_1,
        _is_share,
        _is_number_from_0,
    )
    return float(value) if is_number else value


def _is_number(value: Any) -> bool:
    # YAML reads 1e-3 as text
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_positive(value: Any) -> bool:
    return _is_number(value) and float(value) > 0


def _is_share(value: Any) -> bool:
    return _is_number_from_0(value) and float(value) <= 1


def _is_seed(value: Any) -> bool:
    return is_count(value) and value < 2**32  # as NumPy takes it


def _is_below_1(value: Any) -> bool:
    return _is_number(value) and 0 <= float(value) < 1


def _is_number_from_0(value: Any) -> bool:
    return _is_number(value) and float(value) >= 0


def _is_from_1(value: Any) -> bool:
    return is_count(value) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _one_of(*allowed: str | None) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in allowed, "one of " + ", ".join(map(str, allowed))


def _is_parts(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_list and all(part in PARTS for part in value)


def _is_entries(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


Kind = tuple[Callable[[Any], bool], str]  # whether a value is one, and what one is in words

_COUNT: Kind = (_is_from_1, "a whole number from 1")
_TEXT: Kind = (_is_text, "a text")
_SWITCH: Kind = (_is_bool, "true or false")
_FILE_OR_TABLE: Kind = (
    lambda value: _is_text(value) or isinstance(value, dict),
    "a file, or its content",
)

KINDS: Mapping[str, Kind] = {
    "model": _TEXT,
    "stage": _TEXT,
    "output": _TEXT,
    "train": (_is_parts, f"a list of {', '.join(PARTS)}"),
    "form": _one_of(*FORMS),
    "learning_rate": (_is_positive, "a number above 0"),
    "projector_learning_rate": (_is_positive, "a number above 0"),
    "batch": _COUNT,
    "per_device_batch": _COUNT,
    "epochs": (_is_positive, "a number above 0"),
    "max_steps": _COUNT,
    "image_aspect_ratio": _one_of(*ASPECT_RATIOS),
    "va": _SWITCH,
    "data": (_is_entries, "a list of {file, folder, weight}"),
    "world": (lambda value: isinstance(value, dict), "{clips, seed, questions, …}"),
    "muon_learning_rate": (_is_positive, "a number above 0"),
    "warmup_ratio": (_is_below_1, "a number from 0 to below 1"),
    "weight_decay": (_is_number_from_0, "a number from 0"),
    "max_length": _COUNT,
    "pack": _COUNT,
    "num_frames": _COUNT,
    "precision": _one_of(*PRECISIONS),
    "gradient_checkpointing": _SWITCH,
    "lora": (lambda value: isinstance(value, bool | dict), "{r, alpha, dropout}, true or false"),
    "quantize": _one_of("4bit"),
    "connector": _TEXT,
    "vision_tower": _TEXT,
    "audio_tower": _TEXT,
    "save": _one_of(*SAVES),
    "save_dtype": _one_of(*SAVE_DTYPES),
    "seed": (_is_seed, "a whole number from 0 to below 2^32"),
    "save_steps": _COUNT,
    "log_steps": _COUNT,
    "workers": (is_count, "a whole number from 0"),
    "deepspeed": _FILE_OR_TABLE,
    "fsdp": _FILE_OR_TABLE,
}
DATA_KINDS: Mapping[str, Kind] = {
    "file": _TEXT,
    "folder": _TEXT,
    "weight": (_is_positive, "a number above 0"),
}
WORLD_KINDS: Mapping[str, Kind] = {
    "clips": _COUNT,
    "seed": (is_count, "a whole number from 0"),
    "questions": _COUNT,
    "medium": _one_of(*MEDIA),
    "word_weight": (_is_number_from_0, "a number from 0"),
    "word_share": (_is_number_from_0, "a number from 0"),
    "apart": (_is_share, "a number from 0 to 1"),
    "spelled": (_is_share, "a number from 0 to 1"),
    "exam_steps": _COUNT,
}
LORA_KINDS: Mapping[str, Kind] = {
    "r": _COUNT,
    "alpha": (_is_positive, "a number above 0"),
    "dropout": (_is_below_1, "a number from 0 to below 1"),
}
