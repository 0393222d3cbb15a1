"""The flags of all commands, each named once; the same flag means the same everywhere.

A value comes from the flag, else from `VLA2_<FLAG>`, else from the `--config` file, else it is the
default that `--help` shows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vla2cli.cache import DEFAULT_CACHE_SIZE, parse_size
from vla2cli.config import GenerationChoice, read_config_file
from vla2cli.errors import UsageError
from vla2cli.plan import Sampling, parse_time
from vla2cli.shards import Shard, parse_shard
from vla2cli.stats import check_stats


def epilog(*examples: str) -> str:
    """Write the examples that end a command's help."""
    return "\b\nExamples (after make demo):\n" + "\n".join(f"  {example}" for example in examples)


def _option(*names: str, help: str, env: bool = True, **more: Any) -> Any:
    variable = "VLA2_" + names[0].split("/")[0].lstrip("-").replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=variable if env else None, **more)


def _use_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's settings the defaults of this command; runs before other flags are read."""
    if path is not None:
        # a file is read too late for --debug
        params = {p.name: p for p in ctx.command.params if p.name}
        settings = read_config_file(path, params.keys() - {"config", "help", "debug"})
        for name, value in settings.items():
            is_flag = getattr(params[name], "is_flag", False)
            if isinstance(value, dict) or (isinstance(value, bool) and not is_flag):
                flag = name.replace("_", "-")
                raise UsageError(f"'{path}' sets '{flag}' to {value!r}, which it cannot be")
        ctx.default_map = {
            name: [value] if _takes_several(params[name]) and isinstance(value, str) else value
            for name, value in settings.items()
        }
    return path


def _takes_several(param: Any) -> bool:
    return param.nargs == -1 or getattr(param, "multiple", False)


_PATHS = typer.Argument(
    metavar="PATH",
    help="Files, folders (searched to any depth), globs, or - for a list on stdin.",
    show_default=False,
)
Paths = Annotated[list[str], _PATHS]
PathsOrNone = Annotated[list[str] | None, _PATHS]
ManifestFile = Annotated[
    str | None,
    typer.Option(
        "--manifest",
        metavar="FILE",
        help="JSON Lines, or CSV with a header line: path, and perhaps id, question, start_s, "
        "end_s and choices; - for JSON Lines on stdin. Paths start from its folder.",
    ),
]
Config = Annotated[
    Path | None,
    _option(
        "--config",
        help="YAML file of settings, named like the long flags.",
        is_eager=True,
        callback=_use_config,
    ),
]

# the model
Model = Annotated[
    str | None,
    _option(
        "--model",
        "-m",
        help="Checkpoint: a folder, a hub id (owner/name), or builtin, the demonstration model.",
        show_default="builtin",
    ),
]
Revision = Annotated[
    str | None, _option("--revision", help="Commit, tag or branch of a model on the hub.")
]
HubDir = Annotated[
    Path | None,
    _option(
        "--hub-dir",
        help="Folder of models as owner/name; looked into before the hub.",
        exists=True,
        file_okay=False,
    ),
]
Offline = Annotated[bool, _option("--offline", help="Never use the network.")]
Device = Annotated[str, _option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    _option("--dtype", help="auto is float32 on the CPU and bfloat16 on CUDA."),
]
Precision = Annotated[
    Literal["fp32", "fp16", "int8"],
    _option("--precision", help="Of exported graphs; int8 is for the weights of matrix products."),
]
LoadIn = Annotated[
    Literal["4bit", "8bit"] | None,
    _option("--load-in", help="Quantise the language model; needs pip install bitsandbytes."),
]
DeviceMap = Annotated[
    Literal["auto"] | None,
    _option("--device-map", help="Spread the language model over all GPUs, the CPU and the disk."),
]
FrontendName = Annotated[
    Literal["auto", "onnx", "torch"],
    _option(
        "--frontend",
        help="What runs towers and connector. onnx exports them once; auto uses an export that "
        "is there (vla2 export) and is of the run's dtype, else torch.",
    ),
]
Stc = Annotated[
    Literal["auto", "triton", "torch", "onnx"],
    _option("--stc", help="What runs the connector: auto as --frontend; triton needs CUDA."),
]
RunPrecision = Annotated[
    Literal["fp32", "fp16", "int8"] | None,
    _option(
        "--precision",
        help="Of the ONNX graphs; int8 changes the texts.",
        show_default="fp32 on the CPU, on CUDA that of --dtype or fp16",
    ),
]
TensorRT = Annotated[
    bool, _option("--tensorrt", help="On CUDA, let TensorRT run what it can of the ONNX graphs.")
]
Batch = Annotated[
    int, _option("--batch", help="Clips that are encoded, and prompts that are answered, together.")
]
Overlap = Annotated[
    bool,
    _option(
        "--overlap/--no-overlap",
        help="Decode, encode and answer at the same time, or one after the other.",
    ),
]
Cache = Annotated[
    Path | None,
    _option(
        "--cache",
        metavar="DIR",
        help="Keep encoded clips here: another question skips decoding and encoding.",
    ),
]
CacheSize = Annotated[
    str,
    _option("--cache-size", help="What it may hold; what was not used for longest goes first."),
]
Stats = Annotated[
    Path | None,
    _option("--stats", metavar="FILE", help="Write how busy each stage was, and counts, as JSON."),
]

# what of a file is looked at
Modality = Annotated[
    Literal["auto", "video", "image", "audio", "av"],
    _option(
        "--modality",
        help="auto uses what the model and the file have. video and image: pictures only. "
        "audio: sound files, and of a video that is named itself only the sound. "
        "av: videos with their sound, silence where there is none.",
    ),
]
Start = Annotated[
    str | None, _option("--start", help="Begin here: seconds, or [hours:]minutes:seconds.")
]
End = Annotated[str | None, _option("--end", help="End here, in the same form.")]
Every = Annotated[
    str | None,
    _option(
        "--every",
        metavar="TIME",
        help="Cut longer videos and sounds into segments of this length, each a record of its own.",
    ),
]
AudioStart = Annotated[
    str | None,
    _option(
        "--audio-start",
        help="Where in a longer audio file the 30 s begin that are heard.",
        show_default="its beginning",
    ),
]
AudioRange = Annotated[
    Literal["same", "whole"],
    _option(
        "--audio-range",
        help="Sound of --start to --end (same), or of the whole file, as the reference does.",
    ),
]
Frames = Annotated[
    int | None, _option("--frames", help="Frames of each video, 1 to 32; the model's by default.")
]
Decoder = Annotated[
    Literal["pyav", "decord"],
    _option("--decoder", help="decord repeats the reference where it reads wrong frames, too."),
]
DecodeTimeout = Annotated[
    float,
    _option("--decode-timeout", help="Seconds that one file may take to decode, given a core."),
]
DecodeMemory = Annotated[
    float, _option("--decode-memory", help="GB of memory that one file may take to decode.")
]
Workers = Annotated[
    int | None, _option("--workers", help="Decoding processes; by default one a core, up to 16.")
]

# how the model goes on
MaxNewTokens = Annotated[
    int, _option("--max-new-tokens", help="A longer text is cut; finish_reason says so.")
]
Temperature = Annotated[float, _option("--temperature", help="0 is greedy; above 0 samples.")]
TopP = Annotated[
    float | None, _option("--top-p", help="Sample from this share of probability; 0.9 by default.")
]
TopK = Annotated[
    int | None,
    _option("--top-k", help="Sample from so many tokens; the checkpoint's or 50 by default."),
]
Seed = Annotated[int, _option("--seed", help="Of sampling; no batch size changes its texts.")]

# which of the items
ShardName = Annotated[
    str | None,
    _option(
        "--shard",
        metavar="I/N",
        help="Do the I-th of N parts of the items; an id is in the same part on any machine.",
    ),
]

# the output
Output = Annotated[
    str | None,
    _option("--output", "-o", help="Ledger to append to; what it holds is not run again."),
]
Force = Annotated[
    bool, _option("--force", "-f", help="Begin anew; the old output becomes FILE.bak-N.")
]
RetryErrors = Annotated[
    bool, _option("--retry-errors", help="Try files again that have an error record.")
]
DryRun = Annotated[
    bool, _option("--dry-run", "-n", help="Say what would be done, as JSON Lines, and end.")
]
Json = Annotated[bool, _option("--json", help="JSON Lines on stdout, at a terminal too.")]
Quiet = Annotated[bool, _option("--quiet", "-q", help="Nothing on stderr but what ends the run.")]
Verbose = Annotated[bool, _option("--verbose", "-v", help="Say more on stderr.")]
Debug = Annotated[bool, _option("--debug", help="Show the traceback of what went wrong.")]

MAX_BATCH = 1024  # clips and prompts of so many are held at once
DEFAULT_DECODE_TIMEOUT = 60.0  # seconds
DEFAULT_DECODE_MEMORY = 4.0  # GB


@dataclass(frozen=True)
class RunOptions:
    """The flags that all batch commands share, as typed."""

    model: str | None
    revision: str | None
    hub_dir: Path | None
    offline: bool
    device: str
    dtype: str
    load_in: str | None
    device_map: str | None
    frontend: str
    stc: str
    precision: str | None
    tensorrt: bool
    batch: int
    modality: str
    start: str | None
    end: str | None
    every: str | None
    audio_start: str | None
    audio_range: str
    frames: int | None
    decoder: str
    decode_timeout: float
    decode_memory: float
    workers: int | None
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int
    shard: str | None
    output: str | None
    force: bool
    retry_errors: bool
    dry_run: bool
    json: bool
    quiet: bool
    verbose: bool
    debug: bool
    # features are of the file itself, and made one after the other
    overlap: bool = True
    cache: Path | None = None
    cache_size: str = DEFAULT_CACHE_SIZE
    stats: Path | None = None

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> RunOptions:
        """Take the shared flags out of a command's arguments."""
        return cls(
            **{field.name: flags[field.name] for field in fields(cls) if field.name in flags}
        )

    def check(self) -> None:
        """Refuse values that mean nothing, before anything is opened.

        Raises:
            UsageError: naming the flag and the value.
        """
        for flag, value in (("batch", self.batch), ("workers", self.workers)):
            if value is not None and value < 1:
                raise UsageError(f"'--{flag} {value}': at least 1 is needed")
        if self.batch > MAX_BATCH:
            raise UsageError(f"'--batch {self.batch}': at most {MAX_BATCH:,}")
        limits = {"decode-timeout": self.decode_timeout, "decode-memory": self.decode_memory}
        for flag, limit in limits.items():
            if not 0 < limit < float("inf"):
                raise UsageError(f"'--{flag} {limit}': expected a number above 0")
        if self.decoder == "decord" and importlib.util.find_spec("decord") is None:
            raise UsageError("'--decoder decord': decord is not installed here; use pyav")
        if self.output == "":
            raise UsageError("'-o' is empty; give a file, or - for stdout")
        if self.output in (None, "-") and (self.force or self.retry_errors):
            raise UsageError("--force and --retry-errors are about a ledger; they need -o FILE")
        if self.stats is not None:
            check_stats(self.stats, self.ledger_path)
        _ = self.generation, self.sampling(1), self.part, parse_size(self.cache_size)

    @property
    def generation(self) -> GenerationChoice:
        """How the model goes on."""
        return GenerationChoice(
            self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed
        )

    def without_generation(self) -> RunOptions:
        """Return the same with the defaults of generation."""
        default = GenerationChoice()
        return replace(
            self,
            max_new_tokens=default.max_new_tokens,
            temperature=default.temperature,
            top_p=default.top_p,
            top_k=default.top_k,
            seed=default.seed,
        )

    def sampling(self, num_frames: int) -> Sampling:
        """What is looked at and listened to; `num_frames` is the checkpoint's own number."""
        return Sampling(
            num_frames=self.frames if self.frames is not None else num_frames,
            start_s=parse_time(self.start),
            end_s=parse_time(self.end),
            decoder=self.decoder,
            modality=self.modality,
            audio_start_s=parse_time(self.audio_start),
            audio_range=self.audio_range,
            every_s=parse_time(self.every),
        )

    @property
    def part(self) -> Shard | None:
        """Which of the items are done; None for all."""
        return None if self.shard is None else parse_shard(self.shard)

    @property
    def ledger_path(self) -> str | None:
        """The ledger's path; None where records go to stdout."""
        return None if self.output in (None, "-") else self.output
