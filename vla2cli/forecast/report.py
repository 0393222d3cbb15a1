"""What `vla2 plan` says: lines for people, or one JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vla2cli.console import count, format_duration, format_rate, format_size
from vla2cli.forecast.run import Forecast
from vla2cli.forecast.survey import Survey
from vla2cli.inputs import Kind
from vla2cli.plan import Plan, count_records

MAX_NAMED = 10  # of what is unreadable, or there twice
NOUNS: Mapping[Kind, str] = {"video": "video", "image": "image", "audio": "sound"}


def as_record(forecast: Forecast, command: str) -> dict[str, Any]:
    """State all of it as one JSON object."""
    survey, plan, trial = forecast.survey, forecast.plan, forecast.trial
    paths = {item.id: item.path for item in survey.items}
    kinds = Counter(item.kind for item in survey.items)
    return {
        "task": forecast.task,
        "files": {
            "videos": kinds["video"],
            "images": kinds["image"],
            "sounds": kinds["audio"],
            "skipped": forecast.num_skipped,
            "size_bytes": survey.size_bytes,
            "duration_s": round(survey.duration_s, 3),
            "probed": survey.num_probed,
        },
        "unreadable": [
            {"id": i, "path": paths[i], "kind": error.kind, "message": str(error)}
            for i, error in survey.unreadable.items()
        ],
        "unlisted_folders": forecast.unlisted,
        "unreadable_files": survey.num_unreadable,
        "duplicates": [list(group) for group in survey.duplicates],
        "not_compared": {
            "files": len(survey.uncompared),
            "size_bytes": sum(survey.sizes[i] for i in survey.uncompared),
        },
        "records": {
            "todo": count_records(plan.todo),
            "done": count_records(plan.done),
            "failed": count_records(plan.failed),
        },
        "tried": trial
        and {
            "records": len(trial.records),
            "errors": sum(record.get("error") is not None for record in trial.records),
            "seconds": round(trial.end.at_s, 3),
        },
        "predicted": _predicted(forecast),
        "command": command,
    }


def _predicted(forecast: Forecast) -> dict[str, Any] | None:
    predicted = forecast.prediction
    if predicted is None:
        return None
    return {
        "seconds": round(predicted.seconds, 1),
        "low_s": round(predicted.low_s, 1),
        "high_s": round(predicted.high_s, 1),
        "start_s": round(predicted.start_s, 1),
        "records_per_s": round(predicted.records_per_s, 4),
        "bottleneck": predicted.bottleneck,
        "busy": {stage: round(share, 4) for stage, share in predicted.busy.items()},
        "memory_bytes": forecast.memory_bytes,
        "gpu_memory_bytes": forecast.gpu_memory_bytes,
        "ledger_bytes": predicted.ledger_bytes,
    }


def as_lines(forecast: Forecast, command: str) -> Iterator[str]:
    """Write it for people; the command comes last, alone on its line."""
    for label, texts in _rows(forecast):
        for text in texts:
            yield f"{label:<12}{text}"
            label = ""
    yield command


def _rows(forecast: Forecast) -> Iterator[tuple[str, list[str]]]:
    yield "files", [_files(forecast)]
    yield "unreadable", _unreadable(forecast)
    yield "duplicates", _duplicates(forecast.survey)
    yield "to do", [_todo(forecast.plan)]
    trial, predicted = forecast.trial, forecast.prediction
    if trial is not None and predicted is None:
        yield "time", [f"unknown: {count(len(trial.records), 'record')} tried, all of them errors"]
    if trial is None or predicted is None:
        return
    low, high = format_duration(predicted.low_s), format_duration(predicted.high_s)
    busy = predicted.busy[predicted.bottleneck]
    yield (
        "time",
        [
            f"{format_duration(predicted.seconds)}, between {low} and {high}; "
            f"{count(len(trial.records), 'record')} tried",
            f"{format_duration(predicted.start_s)} to start, then "
            f"{format_rate(predicted.records_per_s)}; {predicted.bottleneck} {busy:.0%} ◀",
        ],
    )
    gpu = forecast.gpu_memory_bytes
    on_gpu = f", {format_size(gpu)} of a GPU" if gpu is not None else ""
    yield "memory", [format_size(forecast.memory_bytes) + on_gpu]
    yield "ledger", [format_size(predicted.ledger_bytes)]


def _files(forecast: Forecast) -> str:
    survey = forecast.survey
    kinds = Counter(item.kind for item in survey.items)
    parts = [count(kinds[kind], noun) for kind, noun in NOUNS.items() if kinds[kind]]
    if forecast.num_skipped:
        parts.append(f"{forecast.num_skipped:,} skipped")
    sampled = survey.num_probed < len(survey.items)
    facts = [format_size(survey.size_bytes)]
    if survey.duration_s:
        facts.append(f"{'about ' * sampled}{format_duration(survey.duration_s)} long")
    if sampled:
        facts.append(f"{survey.num_probed:,} looked into")
    return f"{', '.join(parts)}; {', '.join(facts)}"


def _unreadable(forecast: Forecast) -> list[str]:
    survey = forecast.survey
    named = [f"{i}: {error}" for i, error in survey.unreadable.items()]
    lines = _few([*forecast.unlisted, *named])
    if others := survey.num_unreadable - len(named):
        lines.append(f"about {others:,} more of those that were not looked into")
    return lines


def _duplicates(survey: Survey) -> list[str]:
    lines = _few([" = ".join(group) for group in survey.duplicates])
    if survey.uncompared:
        size = format_size(sum(survey.sizes[i] for i in survey.uncompared))
        files = count(len(survey.uncompared), "file")
        lines.append(f"not compared, for time: {files} as large as another, {size}")
    return lines


def _few(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MAX_NAMED
    return [*lines[:MAX_NAMED], *[f"{more:,} more, which --json names"] * (more > 0)]


def _todo(plan: Plan) -> str:
    todo, done, failed = map(count_records, (plan.todo, plan.done, plan.failed))
    parts = [count(todo, "record")]
    if done:
        parts.append(f"{done:,} done before")
    if failed:
        parts.append(f"{count(failed, 'error')} from before (--retry-errors tries again)")
    return ", ".join(parts)
