"""A bench from its settings to its rows."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla2_models.packed import can_pack
from vla2cli.bench import rounds
from vla2cli.bench.clip import make_video
from vla2cli.bench.frontends import FLOATS, Variant
from vla2cli.bench.machine import describe_cpu, describe_device, versions
from vla2cli.bench.networks import Networks
from vla2cli.bench.rounds import Case, Limit, measure
from vla2cli.bench.rows import Row, limit_name, make_rows
from vla2cli.bench.stages import (
    FRONT,
    LANGUAGE,
    MEDIA,
    front_cases,
    language_cases,
    media_cases,
    prompt_tokens,
)
from vla2cli.engine import DTYPES
from vla2cli.errors import ModelError


@dataclass(frozen=True)
class Bench:
    """What is measured, and how often."""

    model: str  # as rows name it
    networks: Networks
    num_layers: int  # that the whole language model has
    stages: tuple[str, ...]
    variants: tuple[Variant, ...]  # of the front
    dtypes: tuple[str, ...]  # of the language model
    num_frames: int
    num_rounds: int = 5
    video: str | None = None  # None: one is made
    product_edge: int | None = None  # None: as the device needs it
    copy_bytes: int = rounds.COPY_BYTES

    def run(self, on_stage: Callable[[str], None] = lambda line: None) -> Iterator[Row]:
        """Measure stage after stage.

        Args:
            on_stage: is told what is measured next.

        Raises:
            ModelError: memory runs out, or the language model makes no finite numbers.
            UsageError: the video cannot be used.
        """
        facts = self.facts()
        with tempfile.TemporaryDirectory(prefix="vla2-bench-") as folder:
            for stages, groups in self._groups(Path(folder)):
                with _out_of_memory_in_one_line(self.networks.device):
                    on_stage(f"measuring {' and '.join(stages)} …")
                    for cases in groups():
                        yield from self._rows(cases, stages, facts)
                        del cases  # holds weights
                gc.collect()

    def facts(self) -> dict[str, Any]:
        """State what the times depend on."""
        device, config = self.networks.device, self.networks.config
        return {
            "model": self.model,
            "random_weights": self.networks.stored is None,
            "frames": self.num_frames,
            "layers": config.language.num_hidden_layers,
            "layers_whole": self.num_layers,
            "prompt_tokens": prompt_tokens(config, self.num_frames),
            "rounds": self.num_rounds,
            "device": describe_device(device),
            "cpu": describe_cpu(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def _groups(
        self, folder: Path
    ) -> Iterator[tuple[tuple[str, ...], Callable[[], Iterator[list[Case]]]]]:
        """List what is measured together, with what builds it when its turn comes."""
        media, front, language = (
            tuple(stage for stage in group if stage in self.stages)
            for group in (MEDIA, FRONT, LANGUAGE)
        )
        if media:
            video = self.video or make_video(folder / "clip.mp4")
            yield media, lambda: media_cases(self.networks.config, self.num_frames, video)
        if front:
            yield front, lambda: front_cases(self.networks, self.variants, front, self.num_frames)
        if language:
            yield language, lambda: language_cases(self.networks, self.dtypes, self.num_frames)

    def _rows(
        self, cases: Sequence[Case], stages: Sequence[str], facts: Mapping[str, Any]
    ) -> list[Row]:
        limits = self._limits(cases, stages)
        results, rates = measure(cases, limits, self.num_rounds, self.networks.device)
        return make_rows(results, rates, stages, facts)

    def _limits(self, cases: Sequence[Case], stages: Sequence[str]) -> dict[str, Limit]:
        """Make what the cases are held against: a product of each dtype, a copy."""
        device = self.networks.device
        limits: dict[str, Limit] = {}
        for case in cases:
            dtype = case.variant.dtype
            kinds = {work.limit for stage, work in case.work.items() if stage in stages}
            # of int8 there is no plain product in torch
            if "product" in kinds and dtype in FLOATS:
                name = limit_name("product", dtype)
                assert name is not None
                limits[name] = rounds.product(DTYPES[dtype], device, self.product_edge)
                if can_pack(device, DTYPES[dtype]):
                    packed = rounds.packed_product(DTYPES[dtype], self.product_edge)
                    limits[f"packed {name}"] = packed
            if "copy" in kinds:
                limits["copy"] = rounds.copy(device, self.copy_bytes)
        return limits


@contextmanager
def _out_of_memory_in_one_line(device: torch.device) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        # what torch says of the CPU has no class of its own
        if not is_full and "can't allocate memory" not in str(error):
            raise
        raise ModelError(
            f"the memory of {device} is full; give fewer --layers, --stages, --dtype or --frames"
        ) from error
