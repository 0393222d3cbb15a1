"""A loaded checkpoint: clips and questions in, answers out.

It knows nothing of files on the user's side, of ledgers or of the command line; `vla2cli.jobs`
drives it over a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from vla2_models.checkpoint import Checkpoint, open_checkpoint
from vla2_models.fingerprint import hash_weights
from vla2_models.hub import Source
from vla2_models.loading import check_weights
from vla2_models.packed import can_pack, linear_bytes, pack_in_place
from vla2_models.public import WITH_EARS
from vla2_models.sound import SoundWindow
from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.config import GenerationChoice, GenerationSettings, resolve_generation
from vla2cli.console import Say
from vla2cli.engines.base import Generation, Ids, LanguageEngine, Request, Scores, Shared, run
from vla2cli.engines.hf import HFEngine
from vla2cli.engines.scoring import Choice, as_generation, choose
from vla2cli.errors import ModelError, UsageError
from vla2cli.frontend.base import Frontend
from vla2cli.frontend.choice import FrontendChoice
from vla2cli.layout import Layout
from vla2cli.media.records import Clip
from vla2cli.media.sampling import MAX_FRAMES
from vla2cli.memory import free_bytes
from vla2cli.plan import Sampling
from vla2cli.preprocess import FrameGeometry, fbank, normalise
from vla2cli.prompt import Prompt, Turn, build_prompt, continue_prompt
from vla2cli.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# a text whose end is one unit over and over: at least so many times and so many tokens
REPEATS = 4
REPEATED_TOKENS = 16
LONGEST_UNIT = 64


@dataclass(frozen=True)
class MediaTokens:
    """What the language model is given of one clip, at its one placeholder."""

    visual: Tensor | None = None  # (num_visual, D)
    audio: Tensor | None = None  # (num_audio, D)

    @property
    def num_visual(self) -> int:
        """Visual tokens, 0 for sound alone."""
        return 0 if self.visual is None else len(self.visual)

    @property
    def num_audio(self) -> int:
        """Audio tokens, 0 where nothing is heard."""
        return 0 if self.audio is None else len(self.audio)

    def parts(self) -> list[Tensor]:
        """List the tokens in the order in which the checkpoints were trained: sound comes last."""
        return [tokens for tokens in (self.visual, self.audio) if tokens is not None]


@dataclass(frozen=True)
class Ask:
    """One prompt about one clip."""

    question: str
    medium: str  # video (with or without its sound), image, audio or text
    media: MediaTokens = MediaTokens()  # none for text
    history: tuple[Turn, ...] = ()
    seed: int = 0  # of this row's own generator
    choices: tuple[str, ...] = ()  # what the answer has to be one of; none: the model's own words


@dataclass(frozen=True)
class Asked:
    """A prompt as the language model is given it."""

    ask: Ask
    prompt: Prompt
    options: tuple[Ids, ...]  # of each choice its ids
    request: Request


@dataclass(frozen=True)
class Answer:
    """What the model said, and how it came about."""

    text: str
    prompt: Prompt
    generation: Generation
    flags: tuple[str, ...]  # empty, repeating, not-finite
    num_visual: int  # visual tokens in the prompt
    num_audio: int  # audio tokens in it
    choice: Choice | None = None  # where there were options

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, with those of the media."""
        placeholders = sum(i < 0 for i in self.prompt.input_ids)
        num_media = self.num_visual + self.num_audio
        return len(self.prompt.input_ids) - placeholders + num_media


class Engine:
    """A checkpoint that answers; its weights are read at their first use.

    Args:
        checkpoint: found and understood, see `Engine.load` for the short way.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on the CPU, bfloat16 elsewhere), or one of `DTYPES`.
        layout: whether the language model is quantised, or spread over several devices.
        frontend: what runs towers and connector.
        say: told what is waited for.

    Raises:
        UsageError: the device, the dtype, the layout or the front-end cannot be had.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        layout: Layout | None = None,
        frontend: FrontendChoice | None = None,
        say: Say = lambda message: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = pick_device(device)
        self.layout = layout or Layout()
        if self.layout.device_map and device != "auto":
            raise UsageError(
                f"'--device {device}' is one device and '--device-map' takes all; give one of them"
            )
        self.dtype = pick_dtype(dtype, self.device, is_quantised=self.layout.load_in is not None)
        self.layout.check(checkpoint.config.language, self.device)
        self._choice = frontend or FrontendChoice()
        self._choice.check(self.device, checkpoint.config.connector)
        self._say = say
        self._kept: tuple[int, LanguageEngine] | None = None  # rows, and an engine of so many

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        hub_dir: str | Path | None = None,
        offline: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        layout: Layout | None = None,
        frontend: FrontendChoice | None = None,
        say: Say = lambda message: None,
    ) -> Engine:
        """Load a checkpoint from a folder or the hub.

        Args:
            model: a folder, or a hub id such as `DAMO-NLP-SG/VideoLLaMA2-7B`.
            revision: commit, tag or branch on the hub.
            hub_dir: a folder with folders named like hub ids, looked into before the hub.
            offline: never go to the hub.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            dtype: `auto` (float32 on the CPU, bfloat16 elsewhere), or one of `DTYPES`.
            layout: whether the language model is quantised, or spread over several devices.
            frontend: what runs towers and connector.
            say: told what is waited for, such as an export.

        Raises:
            CheckpointError: the checkpoint is nowhere or not whole.
            UsageError: the device, the dtype, the layout or the front-end cannot be had.
        """
        source = Source(Path(hub_dir) if hub_dir else None, offline)
        checkpoint = open_checkpoint(model, source, revision=revision)
        engine = cls(
            checkpoint, device=device, dtype=dtype, layout=layout, frontend=frontend, say=say
        )
        engine.load_weights()
        return engine

    def check(self) -> int:
        """Check all the files of the checkpoint without reading its weights.

        Returns:
            The number of parameters.

        Raises:
            CheckpointError, ModelError: one line about the first thing that is wrong.
        """
        config = self.checkpoint.config
        if config.num_frames > MAX_FRAMES:
            raise ModelError(
                f"'{config.folder}/config.json': num_frames is {config.num_frames}, the reference "
                f"keeps at most {MAX_FRAMES}"
            )
        # one token fits into any context: how many are wanted is not the checkpoint's fault
        _ = self.tokenizer, self.geometry, self.settings(GenerationChoice(max_new_tokens=1))
        try:
            self.prompt(Ask("What happens?", "video"))
        except ModelError as error:
            raise ModelError(f"'{self.checkpoint.text_folder}': {error}") from error
        return check_weights(self.checkpoint)

    def load_weights(self) -> None:
        """Read the weights now; without this call the first clip waits for them.

        Raises:
            CheckpointError, ModelError: they cannot be read.
            FrontendError: an ONNX front-end cannot be made or run.
        """
        _ = self.frontend

    @cached_property
    def model(self) -> VideoLLaMA2:
        """The networks, on the engine's device or as the layout asks."""
        try:
            model = self.layout.load(self.checkpoint, self.dtype, self.device)
            self._pack(model.language_model)
            return model
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ModelError(
                f"'{self.checkpoint.folder}' does not fit into the memory of {self.device} in "
                f"{_dtype_name(self.dtype)}; try --dtype bfloat16, --load-in 4bit, or "
                "--device-map auto"
            ) from error

    def _pack(self, language_model: PreTrainedModel) -> None:
        """Lay a language model's weights out for the CPU, where they can be and fit into memory."""
        if self.layout != Layout() or not can_pack(self.device, self.dtype):
            return
        free, needed = free_bytes(self.device), linear_bytes(language_model)
        if free is not None and needed > free:  # as loaded, they may be pages of files
            self._say(
                f"the language model is left as it is, which is slower: to lay it out for this "
                f"processor takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            )
            return
        pack_in_place(language_model)

    @cached_property
    def frontend(self) -> Frontend:
        """What turns frames and sound into tokens."""
        return self.choice.open(self.checkpoint, self.model, self._say)

    @cached_property
    def choice(self) -> FrontendChoice:
        """Which front-end that is, nothing left to `auto`."""
        return self._choice.settle(self.checkpoint, self.device, self.dtype, self._say)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, checked against its vocabulary."""
        tokenizer = load_tokenizer(self.checkpoint.text_folder)
        vocab_size = self.checkpoint.config.language.vocab_size
        if tokenizer.num_tokens > vocab_size:
            raise ModelError(
                f"'{self.checkpoint.text_folder}': the tokenizer has {tokenizer.num_tokens} "
                f"tokens, the model's vocabulary {vocab_size}; the folder mixes two models"
            )
        return tokenizer

    @cached_property
    def geometry(self) -> FrameGeometry:
        """How frames are fitted to the tower."""
        return read_geometry(self.checkpoint)

    @property
    def sound_window(self) -> SoundWindow | None:
        """Which sound the model hears; None where it has no ears."""
        audio = self.checkpoint.config.audio
        return None if audio is None else audio.window

    @property
    def has_ears(self) -> bool:
        """Whether the model takes sound."""
        return self.sound_window is not None

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """What a record says of the model: `id`, `revision`, `sha256`."""
        return identify(self.checkpoint)

    @property
    def backends(self) -> dict[str, str | None]:
        """What a record says of how the stages run: `frontend`, `engine`, `dtype`, `quant`."""
        return {
            "frontend": self.choice.name,
            "engine": HFEngine.name,
            "dtype": _dtype_name(self.dtype),
            "quant": self.layout.load_in,
        }

    def settings(self, choice: GenerationChoice) -> GenerationSettings:
        """Join the user's choice with what the checkpoint's files ask for.

        Raises:
            UsageError: so many new tokens do not fit into the model's context.
        """
        context = self.checkpoint.config.language.max_position_embeddings
        if choice.max_new_tokens > context:
            raise UsageError(
                f"'--max-new-tokens {choice.max_new_tokens}': the model's context is {context}"
            )
        return resolve_generation(choice, self.checkpoint.text_folder, self.tokenizer.eos_token_id)

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse what the model cannot see or hear.

        Raises:
            UsageError: it has no ears, or the connector would leave no token of so few frames.
        """
        config = self.checkpoint.config
        fewest = config.connector.min_frames
        if sampling.num_frames < fewest:
            raise UsageError(
                f"'--frames {sampling.num_frames}': the model's {config.projector_type} "
                f"needs at least {fewest}"
            )
        needs_ears = {
            f"--modality {sampling.modality}": sampling.modality in ("audio", "av"),
            "--audio-start": sampling.audio_start_s is not None,
            f"--audio-range {sampling.audio_range}": sampling.audio_range == "whole",
        }
        for flag, is_given in needs_ears.items():
            if is_given and not self.has_ears:
                raise UsageError(
                    f"{flag} needs a model with an audio branch; {self.checkpoint.located.id} has "
                    f"none (try {WITH_EARS})"
                )

    def pixel_values(self, clip: Clip) -> Tensor:
        """Normalise the fitted frames of a clip: (T, 3, S, S) float32."""
        assert clip.frames is not None, f"this {clip.kind} has no frames, or no longer"
        return torch.from_numpy(normalise(clip.frames, self.geometry))

    def fbank(self, clip: Clip) -> Tensor:
        """Make what the audio tower reads of a clip's sound: (1, R, 128) bfloat16."""
        assert clip.sound is not None, "nothing of this clip is heard"
        assert clip.sound.waveform is not None, "this clip's samples were dropped"
        return fbank(clip.sound.waveform)[None]

    def vision_features(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Run the tower on several clips: (T, N, C) each, an image's one frame repeated T times."""
        features = self.frontend.vision_features([self.pixel_values(clip) for clip in clips])
        return [
            self.model.repeat_image(of_clip) if clip.kind == "image" else of_clip
            for of_clip, clip in zip(features, clips, strict=True)
        ]

    def encode(self, clips: Sequence[Clip]) -> list[MediaTokens]:
        """Turn what is seen and heard of several clips into tokens."""
        seen = [clip for clip in clips if clip.is_seen]
        visual = iter(self.frontend.visual_tokens(self.vision_features(seen)) if seen else ())
        return [
            MediaTokens(
                visual=next(visual) if clip.is_seen else None,
                audio=None if clip.sound is None else self._hear(clip),
            )
            for clip in clips
        ]

    def _hear(self, clip: Clip) -> Tensor:
        # one after the other: the attention of a batch would take 100 MB a layer for each sound
        return self.frontend.listen(self.fbank(clip))[1][0]

    def prompt(self, ask: Ask) -> Prompt:
        """Render and tokenise what is asked."""
        return build_prompt(
            self.tokenizer,
            self.checkpoint.config.model_type,
            ask.question,
            medium=ask.medium,
            history=ask.history,
        )

    @torch.inference_mode()
    def embed(self, prompt: Prompt, media: MediaTokens) -> Tensor:
        """Splice one prompt: (L, D) inputs_embeds."""
        parts = media.parts()
        return self.model.splice(prompt.input_ids, [torch.cat(parts)] if parts else [])

    def ask(self, ask: Ask, settings: GenerationSettings, *, clip: Hashable | None = None) -> Asked:
        """Make a request of a question.

        Args:
            ask: the question, with what it is about.
            settings: how the model goes on.
            clip: the same for all questions about one clip, which is then read once for all.
        """
        prompt = self.prompt(ask)
        options = tuple(
            tuple(continue_prompt(self.tokenizer, prompt, ask.medium, text)) for text in ask.choices
        )
        shared = None
        if clip is not None and ask.media.parts():
            place = next(i for i, token in enumerate(prompt.input_ids) if token < 0)
            shared = Shared(clip, place + sum(map(len, ask.media.parts())))
        embeds = self.embed(prompt, ask.media)
        return Asked(ask, prompt, options, Request(embeds, settings, ask.seed, options, shared))

    def read(self, asked: Asked, result: Generation | Scores) -> Answer:
        """Turn what the language model made of a request into words."""
        ask, choice = asked.ask, None
        if isinstance(result, Scores):
            choice = choose(ask.choices, result.logprobs)
            generation = as_generation(choice, dict(zip(ask.choices, asked.options)), result)
            text = choice.text or ""
        else:
            generation = result
            text = self.tokenizer.decode(result.ids).strip()
        return Answer(
            text,
            asked.prompt,
            generation,
            find_flags(text, generation),
            ask.media.num_visual,
            ask.media.num_audio,
            choice,
        )

    def language_engine(self, num_rows: int) -> LanguageEngine:
        """Make what answers several prompts at a time."""
        return HFEngine(
            self.model.language_model, num_rows, device=self.model.device, say=self._say
        )

    def _answering(self, num_rows: int) -> LanguageEngine:
        # one is kept, for who asks again and again
        if self._kept is None or self._kept[0] != num_rows:
            self._kept = num_rows, self.language_engine(num_rows)
        return self._kept[1]

    def answer(self, asks: Sequence[Ask], settings: GenerationSettings) -> list[Answer]:
        """Answer several prompts together; a row's text depends on no other."""
        asked = [self.ask(ask, settings) for ask in asks]
        results = run(self._answering(len(asks)), [row.request for row in asked])
        return [self.read(row, result) for row, result in zip(asked, results, strict=True)]


def find_flags(text: str, generation: Generation) -> tuple[str, ...]:
    """Name what makes a text no answer."""
    ids = generation.ids[:-1] if generation.finish_reason == "stop" else generation.ids
    found = {
        "empty": not text,
        "repeating": is_repeating(ids),
        "not-finite": not generation.is_finite,
    }
    return tuple(flag for flag, is_so in found.items() if is_so)


def is_repeating(ids: Sequence[int]) -> bool:
    """Tell whether a text ends in one unit of tokens over and over."""
    for unit in range(1, min(LONGEST_UNIT, len(ids) // REPEATS) + 1):
        length = max(unit * REPEATS, REPEATED_TOKENS)
        tail = ids[-length:]
        if len(tail) == length and all(a == b for a, b in zip(tail, tail[unit:])):
            return True
    return False


def pick_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names.

    Raises:
        UsageError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"'--device {name}': expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"'--device {name}': expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device; --device auto would run on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"'--device {name}': there are {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str, device: torch.device, *, is_quantised: bool = False) -> torch.dtype:
    """Return the dtype of that name; `auto` is float32 on the CPU and bfloat16 elsewhere.

    Quantised weights are multiplied in bfloat16 on the CPU too, where float32 is many times slower.

    Raises:
        UsageError: there is none.
    """
    if name == "auto":
        is_exact = device.type == "cpu" and not is_quantised
        return torch.float32 if is_exact else torch.bfloat16
    if name not in DTYPES:
        raise UsageError(f"'--dtype {name}': expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_geometry(checkpoint: Checkpoint) -> FrameGeometry:
    """Read how the tower wants its frames.

    Raises:
        ModelError: its preprocessor_config.json is not understood.
    """
    config = checkpoint.config
    try:
        geometry = FrameGeometry.from_config(dict(config.preprocessor))
    except ValueError as error:
        raise ModelError(
            f"'{config.mm_vision_tower}': preprocessor_config.json is not understood: {error}"
        ) from error
    size, wanted = (geometry.height, geometry.width), config.vision.image_size
    if size != (wanted, wanted):
        raise ModelError(
            f"'{config.mm_vision_tower}': preprocessor_config.json makes frames of {size[0]} x "
            f"{size[1]}, the tower takes {wanted} x {wanted}"
        )
    return geometry


def identify(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Name a checkpoint as records do; reads all weights unless their hash is remembered."""
    return {
        "id": checkpoint.located.id,
        "revision": checkpoint.located.revision,
        "sha256": hash_weights(checkpoint.weight_files()),
    }
