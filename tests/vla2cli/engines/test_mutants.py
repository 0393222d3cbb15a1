"""Faults put into the engine by hand: its ids and scores must tell each of them.

The unchanged source goes the same way and must pass, else a failure would prove nothing.
"""

import dataclasses
import functools

import pytest
import torch

from tests.mutants import changed
from tests.vla2cli.engines.prompts import (
    WIDTH,
    by_transformers,
    logprobs_of,
    model_of,
    ragged,
    random_prompt,
    settings_of,
    sharing,
    work_off,
)
from vla2cli.engines import passes
from vla2cli.engines.base import Request
from vla2cli.engines.hf import HFEngine
from vla2cli.engines.passes import Passes
from vla2cli.engines.slots import SlotCache

pytestmark = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with")

MUTANTS = {
    "mask: sees the next column": (
        Passes,
        "_read",
        "distance >= 0 if visible",
        "distance >= -1 if visible",
    ),
    "mask: sees all columns": (
        Passes,
        "_read",
        "distance >= 0 if visible",
        "distance < 1e9 if visible",
    ),
    "mask: window one too wide": (Passes, "_mask", "distance < window", "distance <= window"),
    "mask: no window": (Passes, "_mask", "if window is None", "if True"),
    "decode: position does not follow the prompt": (
        Passes,
        "decode",
        "torch.tensor(positions, device=self.device)",
        "torch.tensor([max(positions)] * len(positions), device=self.device)",
    ),
    "decode: position one too far": (
        Passes,
        "_decode",
        "self._read(rows, positions, positions,",
        "self._read(rows, positions, positions + 1,",
    ),
    "prefill: begins at 0 behind a beginning": (
        Passes,
        "prefill",
        "positions.expand(len(prompts), -1)",
        "(positions - start).expand(len(prompts), -1)",
    ),
    "prefill: last of the longest prompt": (
        Passes,
        "prefill",
        "[len(prompt) - 1 for prompt in prompts]",
        "[max(map(len, prompts)) - 1] * len(prompts)",
    ),
    "prefill: each piece the first": (
        Passes,
        "prefill",
        "            first,\n",
        "            start,\n",
    ),
    "slots: row does not move": (
        SlotCache,
        "move",
        "tensor[source, :, :length]",
        "tensor[target, :, :length]",
    ),
    "slots: row moves but for its last column": (
        SlotCache,
        "move",
        "tensor[target, :, :length] = tensor[source, :, :length]",
        "tensor[target, :, : length - 1] = tensor[source, :, : length - 1]",
    ),
    "slots: what is not finite stays": (SlotCache, "clear", "tensor[slot] = 0", "pass"),
    "slots: growth forgets": (
        SlotCache,
        "_grown",
        "grown[: len(tensor), :, : tensor.shape[2]] = tensor",
        "pass",
    ),
    "beginning: pasted too short": (
        SlotCache,
        "paste",
        "tensor[slot, :, : prefix.length] = part",
        "tensor[slot, :, : prefix.length - 1] = part[:, :-1]",
    ),
    "beginning: copied from the first slot": (
        HFEngine,
        "_prefill",
        "cache.copy(slot + i,",
        "cache.copy(0,",
    ),
    "beginning: one for all": (
        HFEngine,
        "_prefill",
        "self._prefixes[row.shared_key])",
        "next(iter(self._prefixes.values())))",
    ),
    "options: see each other": (Passes, "_weigh", "(is_own & is_before)", "is_before"),
    "options: see what comes": (Passes, "_weigh", "(is_own & is_before)", "is_own"),
    "options: stand behind each other": (
        Passes,
        "_weigh",
        "positions = length + step",
        "positions = columns",
    ),
    "options: all begin like the first": (
        Passes,
        "_weigh",
        "[ids[0] for ids in of_row]",
        "[of_row[0][0] for ids in of_row]",
    ),
    "options: the end is not counted": (
        Passes,
        "_weigh",
        "one + part.sum()",
        "one + part[:-1].sum()",
    ),
    "rows: a place too early": (
        HFEngine,
        "_leave",
        "len(self._rows), slot, last",
        "max(0, len(self._rows) - 1), slot, last",
    ),
}
NAN = float("nan")
OPTIONS = ((5, 9, 2), (9, 8, 7, 2), (5, 9, 8, 7, 6, 2), (96, 2))
MODELS = ("mistral", "mistral, window")


def requests():
    """Prompts with all that the engine can do: texts, options, beginnings in common, NaN."""
    bad = Request(torch.full((160, WIDTH), NAN), settings_of(3))
    each = [
        ragged(),  # one of them lets the slots grow while others are inside
        [bad, dataclasses.replace(bad, options=OPTIONS)] * 3,
        [
            dataclasses.replace(request, options=OPTIONS if i == 2 else ())
            for key in ("one", "two")
            for i, request in enumerate(sharing(key, 4, length=30))
        ],
        [Request(random_prompt(n), settings_of(1), options=OPTIONS) for n in (12, 3, 30)],
        [Request(random_prompt(n), settings_of(8, eos_token_ids=())) for n in (124, 120, 126)],
        [bad] * 4,  # in every slot, and short rows beside long ones come next
        [Request(random_prompt(n), settings_of(6, eos_token_ids=())) for n in (150, 20, 30, 140)],
    ]
    return [request for part in each for request in part]


@functools.cache
def expected(name):
    """What transformers says: ids of texts, sums of options, None for what is not finite."""
    found = []
    for request in requests():
        embeds = request.inputs_embeds
        if not embeds.isfinite().all():
            found.append(None)
        elif request.options:
            found.append([sum(logprobs_of(model_of(name), embeds, o)) for o in request.options])
        else:
            found += by_transformers(model_of(name), [request])
    return found


def check(name):
    """Hold the engine to that."""
    results = work_off(HFEngine(model_of(name), 4), requests())
    for request, result, right in zip(requests(), results, expected(name), strict=True):
        if right is None:
            continue
        assert not isinstance(result, Exception), f"it fails: {result}"
        if request.options:
            assert result.logprobs == pytest.approx(right, abs=1e-4), "scores differ"
        else:
            assert result.ids == right, "ids differ"


@pytest.fixture
def run_changed(monkeypatch, tmp_path):
    """Hold an engine to the right ids of which one function is changed."""

    def run(owner, name, old, new):
        monkeypatch.setattr(passes, "MOST_TOKENS", 60)  # so that all is read in several passes
        mutant = changed(getattr(owner, name), old, new, tmp_path / f"{name}.py")
        monkeypatch.setattr(owner, name, mutant)
        for model in MODELS:
            check(model)

    return run


@pytest.mark.parametrize("mutant", MUTANTS)
def test_another_way_would_be_noticed(run_changed, mutant):
    with pytest.raises(AssertionError, match=r"ids differ|scores differ|it fails"):
        run_changed(*MUTANTS[mutant])


def test_unchanged_source_passes_the_same_way(run_changed):
    for owner, name in dict.fromkeys(mutant[:2] for mutant in MUTANTS.values()):
        run_changed(owner, name, f"def {name}(", f"def {name}(")
