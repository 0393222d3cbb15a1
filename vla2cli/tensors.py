"""What the networks make of a clip, stage by stage, as one safetensors file for each clip."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla2cli.cache import Encoded
from vla2cli.config import GenerationSettings
from vla2cli.errors import InputError, LedgerError, UsageError, why
from vla2cli.failures import in_parts
from vla2cli.inputs import Item
from vla2cli.jobs import Job
from vla2cli.ledger import Record
from vla2cli.media.records import Clip
from vla2cli.plan import Sampling, Work
from vla2cli.record import clip_fields, error_field, make_record
from vla2cli.stats import Stats

if TYPE_CHECKING:
    from torch import Tensor

    from vla2cli.engine import Ask, Engine

LEDGER_NAME = "features.jsonl"
LONGEST_NAME = 200  # bytes; a file system takes 255, and endings follow
# name -> shape, in the order in which the stages make them; `T` frames, `N` patches of width `C`,
# `R` rows of 10 ms, `L` positions of width `D`, `V` the vocabulary
VISUAL = {
    "frame_indices": "(T,) int64",
    "timestamps_s": "(T,) float64",
    "pixel_values": "(T, 3, S, S) float32",
    "vision_features": "(T, N, C)",
    "projector_tokens": "(1, num_visual, D)",
}
AUDIO = {
    "fbank": "(1, R, 128) bfloat16",
    "beats_features": "(1, num_audio, C)",
    "audio_tokens": "(1, num_audio, D)",
}
PROMPT = {
    "input_ids": "(L0,) int64, negative where the media belong",
    "attention_mask_spliced": "(L,) int64",
    "inputs_embeds": "(L, D)",
    "first_logits": "(V,) float32",
    "generated_ids": "(num_new,) int64",
}
TENSORS = {**VISUAL, **AUDIO, **PROMPT}
DEFAULT_TENSORS = (
    *("frame_indices", "timestamps_s", "vision_features", "projector_tokens"),
    *("beats_features", "audio_tokens"),
)


def parse_tensors(names: str | None) -> tuple[str, ...]:
    """Read the value of `--tensors`: names with commas between them, or `all`.

    Raises:
        UsageError: a name is none of `TENSORS`.
    """
    if names is None:
        return DEFAULT_TENSORS
    wanted = set(TENSORS) if names.strip() == "all" else {n.strip() for n in names.split(",")}
    for name in sorted(wanted):
        if name not in TENSORS:
            raise UsageError(f"'--tensors {name}': expected all, or any of {', '.join(TENSORS)}")
    return tuple(name for name in TENSORS if name in wanted)


def check_tensors(names: tuple[str, ...], engine: Engine, sampling: Sampling) -> None:
    """Refuse names of which no file can have any.

    Raises:
        UsageError: only pictures or only sound is wanted, and the other is looked at or heard.
    """
    made = set(PROMPT)
    if sampling.modality != "audio":
        made |= set(VISUAL)
    if engine.has_ears and sampling.modality in ("auto", "audio", "av"):
        made |= set(AUDIO)
    if not made & set(names):
        why = f"--modality {sampling.modality}" if engine.has_ears else "a model without ears"
        raise UsageError(f"'--tensors {','.join(names)}': {why} makes none of them")


def feature_path(folder: Path, job: Job, item: Item, question: str) -> Path:
    """Return where the tensors of one record go, another place for each key; inside `folder`.

    `a/1.mp4.safetensors`, or `a/1.mp4@2-6.5.safetensors` for a range; a question of the user's
    adds `~` and eight digits of its hash. A video that is only listened to adds `~audio`.
    """
    *parents, name = (part if part != ".." else "%2E%2E" for part in item.id.split("/"))
    segment = job.sampling.segment_of(item)
    if segment:
        # all digits: two ranges that differ in milliseconds are two files
        start, end = ("" if t is None else str(t).removesuffix(".0") for t in segment.values())
        name += f"@{start}-{end}"
    if item.kind == "video" and job.sampling.medium_of(item) == "audio":
        name += "~audio"
    if job.task.conversations:
        name += f"~{_digest(question)[:8]}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f"{os.fsencode(name)[:LONGEST_NAME].decode(errors='ignore')}~{_digest(name)[:8]}"
    return folder.joinpath(*filter(None, parents), f"{name}.safetensors")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def is_missing(work: Work, job: Job, folder: Path) -> bool:
    """Tell whether a file of a work is gone or not whole, though its record is there."""
    return not all(
        _is_whole(feature_path(folder, job, work.item, question))
        for (question,) in work.conversations
    )


def _is_whole(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # the header says how long the file has to be
            return True
    except (OSError, SafetensorError):
        return False


def run_features(
    job: Job,
    works: Iterable[Work],
    folder: Path,
    names: tuple[str, ...],
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Write the tensors of each clip, then its record.

    Args:
        job: its batch is the number of clips decoded together; they are run one by one.
        works: what is to do.
        folder: where the files go.
        names: any of `TENSORS`.
        should_stop: asked between clips.
    """
    job.engine.load_weights()  # no work of any stage
    job.stats.start(job.pool.worker_pids())
    for outcomes in job.clips(works, should_stop=should_stop):
        for work, found in outcomes:
            if should_stop():
                return
            assert not isinstance(found, Encoded), "what is written here is not in a cache"
            for record in _records(job, work, found, folder, names):
                job.write(record)
                yield record


def make_folder(folder: Path) -> Path:
    """Make the folder for the files and return the ledger's path in it.

    Raises:
        LedgerError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(f"cannot make '{folder}': {why(error)}") from error
    return folder / LEDGER_NAME


def _records(
    job: Job, work: Work, found: Clip | InputError, folder: Path, names: tuple[str, ...]
) -> Iterator[Record]:
    from vla2cli.engine import Ask

    if isinstance(found, InputError):
        yield from job.failures(work, found, found.state)
        return
    for (question,) in work.conversations:
        ask = Ask(question, job.sampling.medium_of(work.item))
        (tensors,) = in_parts(
            lambda rows: [compute(job.engine, found, rows[0], job.settings, names, job.stats)],
            [ask],
            "encode",
        )
        fields = job.fields(work.item, (question,), 0, found.state)
        fields |= clip_fields(found)
        if isinstance(tensors, InputError):
            yield make_record(**fields, error=error_field(tensors))
            continue
        path = feature_path(folder, job, work.item, question)
        _save(tensors, path)
        fields["flags"] = [*job.demo_flags, *found.flags]
        yield make_record(
            **fields,
            file=os.fspath(path.relative_to(folder)),
            tensors={name: list(tensor.shape) for name, tensor in tensors.items()},
        )


def compute(
    engine: Engine,
    clip: Clip,
    ask: Ask,
    settings: GenerationSettings,
    names: Iterable[str],
    stats: Stats,
) -> dict[str, Tensor]:
    """Run the stages up to the last one that is wanted.

    Args:
        engine: the model.
        clip: fitted frames, sound or both.
        ask: the prompt, for the stages from `input_ids` on; its media are ignored.
        settings: for `generated_ids`.
        names: any of `TENSORS`; those of what is not seen or not heard are left out.
        stats: told how long each stage works.

    Returns:
        The wanted tensors on the CPU, named and shaped as in `TENSORS`.

    Raises:
        InputError: the clip has none of them.
    """
    wanted = set(names)
    needs_media = bool(wanted & set(list(PROMPT)[1:]))
    last = {"projector_tokens", "audio_tokens"}  # what the prompt takes
    made: dict[str, Tensor] = {}
    with stats.working("tower"):
        if clip.is_seen:
            made |= _visual_tensors(engine, clip, wanted | last if needs_media else wanted)
        if clip.sound is not None:
            made |= _audio_tensors(engine, clip, wanted | last if needs_media else wanted)
    if wanted & set(PROMPT):
        with stats.working("language"):
            made |= _prompt_tensors(engine, made, ask, settings, wanted)
    if not wanted & set(made):
        listed = ", ".join(name for name in TENSORS if name in wanted)
        raise InputError(
            f"{clip.kind} without {'sound' if clip.sound is None else 'frames'} gives no {listed}",
            kind="no-tensors",
            stage="encode",
        )
    with stats.working("tower"):  # a GPU has only been told what to do
        return {name: made[name].cpu().contiguous() for name in made if name in wanted}


def _visual_tensors(engine: Engine, clip: Clip, wanted: set[str]) -> dict[str, Tensor]:
    import torch

    made = {
        "frame_indices": torch.tensor(clip.indices, dtype=torch.long),
        "timestamps_s": torch.tensor(clip.timestamps_s, dtype=torch.float64),
    }
    if "pixel_values" in wanted:
        made["pixel_values"] = engine.pixel_values(clip)
    if wanted & {"vision_features", "projector_tokens"}:
        (made["vision_features"],) = features = engine.vision_features([clip])
        made["projector_tokens"] = engine.frontend.visual_tokens(features)[0][None]
    return made


def _audio_tensors(engine: Engine, clip: Clip, wanted: set[str]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    if wanted & set(AUDIO):
        made["fbank"] = engine.fbank(clip)
    if wanted & {"beats_features", "audio_tokens"}:
        made["beats_features"], made["audio_tokens"] = engine.frontend.listen(made["fbank"])
    return made


def _prompt_tensors(
    engine: Engine,
    media: dict[str, Tensor],
    ask: Ask,
    settings: GenerationSettings,
    wanted: set[str],
) -> dict[str, Tensor]:
    import torch

    from vla2cli.engine import MediaTokens

    prompt = engine.prompt(ask)
    made = {"input_ids": torch.tensor(prompt.input_ids, dtype=torch.long)}
    if wanted & set(PROMPT) == {"input_ids"}:
        return made
    visual, audio = media.get("projector_tokens"), media.get("audio_tokens")
    tokens = MediaTokens(
        visual=None if visual is None else visual[0], audio=None if audio is None else audio[0]
    )
    embeds = engine.embed(prompt, tokens)
    made["attention_mask_spliced"] = torch.ones(len(embeds), dtype=torch.long)
    made["inputs_embeds"] = embeds
    if wanted & {"first_logits", "generated_ids"}:
        num_new = settings.max_new_tokens if "generated_ids" in wanted else 1
        (answer,) = engine.answer(
            [replace(ask, media=tokens)], replace(settings, max_new_tokens=num_new)
        )
        assert answer.generation.first_logits is not None, "this engine gives them"
        made["first_logits"] = answer.generation.first_logits
        made["generated_ids"] = torch.tensor(answer.generation.ids, dtype=torch.long)
    return made


def _save(tensors: dict[str, Any], path: Path) -> None:
    """Write aside, sync and rename, so that a file is whole or not there."""
    from safetensors.torch import save

    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise LedgerError(f"cannot write '{path}': {why(error)}") from error
