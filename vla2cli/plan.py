"""What is asked of which files, and what of it is still to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any, TypeVar

from vla2_models.public import WITH_EARS
from vla2_models.sound import SoundWindow
from vla2cli.errors import InputError, NoInputError, UsageError
from vla2cli.inputs import Item, Kind, encode_name
from vla2cli.ledger import Entry, Key, is_current, key_of, paused_collector
from vla2cli.media.pool import DecodePool
from vla2cli.media.records import ClipRequest, FileState, SoundRequest
from vla2cli.media.sampling import MAX_FRAMES
from vla2cli.preprocess import FrameGeometry

DEFAULT_PROMPT = "Please describe the {medium} in detail."
NO_EARS = f"this model has no audio branch; --modality audio needs {WITH_EARS}"
AUDIO_RANGES = ("same", "whole")
MAX_TIME_S = 1e9  # thirty years
LEAST_EVERY_S = 0.1  # some frames, and far from the milliseconds that a segment's ends are round to
# modality -> kinds of files that it is about; find_items leaves videos out of folders for `audio`
KINDS_OF: Mapping[str, frozenset[Kind]] = {
    "auto": frozenset({"video", "image", "audio"}),
    "video": frozenset({"video"}),
    "image": frozenset({"image"}),
    "audio": frozenset({"audio", "video"}),
    "av": frozenset({"video"}),
}

Conversation = tuple[str, ...]  # questions that follow each other, with the answers in between
Choices = tuple[str, ...]  # what an answer has to be one of; none: the model's own words
Lookup = Callable[[Key], Entry | None]
Result = TypeVar("Result")


def parse_choices(text: str | None) -> Choices:
    """Read options with `|` between them; none where there is no text.

    Raises:
        UsageError: one is empty or there twice, or there is only one.
    """
    if text is None:
        return ()
    choices = tuple(option.strip() for option in text.split("|"))
    if not is_choice(choices):
        raise UsageError(
            f"'--choices {text}': expected two options or more with | between them, each once"
        )
    return choices


def parse_time(text: str | None) -> float | None:
    """Read seconds, or `[hours:]minutes:seconds`.

    Raises:
        UsageError: the text is no time.
    """
    if text is None:
        return None
    seconds = 0.0
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = [-1.0]
    if len(parts) > 3 or not all(0 <= part < MAX_TIME_S for part in parts):
        raise UsageError(f"'{text}' is no time; expected seconds like 12.5, or 1:02:03")
    for part in parts:
        seconds = seconds * 60 + part
    return seconds


def is_choice(options: Sequence[str]) -> bool:
    """Tell whether there are two options or more, none empty and none twice."""
    return len(options) >= 2 and all(map(str.strip, options)) and len({*options}) == len(options)


@dataclass(frozen=True)
class Task:
    """What is asked of every file."""

    name: str  # caption, ask or features
    conversations: tuple[Conversation, ...] = ()  # none: the default prompt of the medium
    options: Mapping[str, Any] = field(default_factory=dict)  # put into a record's `generation`
    choices: Choices = ()  # for every question

    def conversations_about(self, item: Item, medium: str) -> tuple[Conversation, ...]:
        """Return what to ask about an item, every conversation once."""
        own = self.conversations or _default_conversations(medium)
        asked = [own if question is None else ((question,),) for question in item.asked] or [own]
        return tuple(dict.fromkeys(chain.from_iterable(asked)))

    def choices_of(self, item: Item, question: str) -> Choices:
        """Return what the answer to a question about an item has to be one of."""
        return item.asked.get(question, item.asked.get(None, self.choices))


@cache  # one text for a million files
def _default_conversations(medium: str) -> tuple[Conversation, ...]:
    return ((DEFAULT_PROMPT.format(medium=medium),),)


@dataclass(frozen=True)
class Sampling:
    """What of each file is looked at, and what is listened to where the model has ears."""

    num_frames: int
    start_s: float | None = None  # of the items without a range of their own
    end_s: float | None = None
    decoder: str = "pyav"
    modality: str = "auto"  # as the flag: auto, video, image, audio or av
    audio_start_s: float | None = None  # where the window begins in a longer audio file
    audio_range: str = "same"  # same: the sound of the range; whole: of the whole file, as upstream
    every_s: float | None = None  # what is longer is cut, see `segments.cut_items`

    def __post_init__(self) -> None:
        """Refuse what upstream would cut or swap without a word.

        Raises:
            UsageError: naming the flag and the value.
        """
        if self.num_frames < 1:
            raise UsageError(f"'--frames {self.num_frames}': at least 1 frame is needed")
        if self.num_frames > MAX_FRAMES:
            raise UsageError(f"'--frames {self.num_frames}': the model takes at most {MAX_FRAMES}")
        if self.modality not in KINDS_OF:
            raise UsageError(f"'--modality {self.modality}': expected one of {', '.join(KINDS_OF)}")
        if self.end_s is not None and self.end_s <= (self.start_s or 0.0):
            raise UsageError(f"'--end {self.end_s:g}': the range ends before it begins")
        if self.audio_range not in AUDIO_RANGES:
            raise UsageError(
                f"'--audio-range {self.audio_range}': expected {' or '.join(AUDIO_RANGES)}"
            )
        if self.every_s is not None and not LEAST_EVERY_S <= self.every_s < float("inf"):
            raise UsageError(f"'--every {self.every_s:g}': at least {LEAST_EVERY_S} s are needed")
        if self.every_s is not None and self.audio_start_s is not None:
            raise UsageError(
                "--audio-start is one place in a file; with --every each segment is heard from its "
                "beginning"
            )
        begin_s, end_s = self.start_s or 0.0, self.end_s or float("inf")
        if self.audio_range == "whole":
            begin_s, end_s = 0.0, float("inf")
        if self.audio_start_s is not None and not begin_s <= self.audio_start_s < end_s:
            raise UsageError(
                f"'--audio-start {self.audio_start_s:g}' lies outside of --start and --end"
            )

    def medium_of(self, item: Item) -> str:
        """Return what an item is asked about as: image, video or audio.

        A video that is only listened to is `audio`; one that is also listened to stays `video`.
        """
        if item.kind == "image":
            return "image"
        return "audio" if "audio" in (item.kind, self.modality) else "video"

    def is_heard(self, item: Item, window: SoundWindow | None) -> bool:
        """Tell whether the sound of an item is asked for, of a model that hears `window`."""
        medium = self.medium_of(item)
        return window is not None and (
            medium == "audio" or (medium == "video" and self.modality in ("auto", "av"))
        )

    def range_of(self, item: Item) -> tuple[float | None, float | None]:
        """Return where the part of an item begins and ends that is asked about, None: it is open.

        A range of its own goes before that of all files.
        """
        if item.is_part:
            return item.start_s, item.end_s
        if self.audio_range == "whole" and self.medium_of(item) == "audio":
            return None, None
        return self.start_s, self.end_s

    def segment_of(self, item: Item) -> dict[str, float | None] | None:
        """Return the record's `segment`: null for a whole file, and for a picture."""
        start_s, end_s = self.range_of(item)
        if item.kind == "image" or (start_s is None and end_s is None):
            return None
        return {"start_s": start_s, "end_s": end_s}

    def sound_fields(self, item: Item, window: SoundWindow | None) -> dict[str, Any]:
        """Describe for a record's `generation` what decides which sound is heard."""
        if window is None or not self.is_heard(item, window):
            return {}
        # what the public checkpoints do, or what nobody asked for, needs no words
        fields: dict[str, Any] = {}
        if window != SoundWindow():
            fields["sound_window"] = asdict(window)
        if self.medium_of(item) == "audio":
            start_s, _ = self.range_of(item)
            return {**fields, "audio_start_s": self.audio_start_s or start_s or 0.0}
        if self.segment_of(item):
            fields["audio_range"] = self.audio_range
        return {**fields, "modality": self.modality}

    def request(
        self, item: Item, geometry: FrameGeometry, window: SoundWindow | None
    ) -> ClipRequest:
        """Ask the decoder for one file; a model without ears has no window."""
        start_s, end_s = self.range_of(item)
        sound = None
        if window is not None and self.is_heard(item, window):
            is_whole = self.audio_range == "whole" and self.medium_of(item) == "video"
            sound = SoundRequest(
                window=window,
                is_required=self.modality == "av",
                start_s=None if is_whole else start_s,
                end_s=None if is_whole else end_s,
                audio_start_s=self.audio_start_s,
            )
        return ClipRequest(
            path=item.path,
            kind="audio" if self.medium_of(item) == "audio" else item.kind,
            geometry=geometry,
            num_frames=self.num_frames,
            start_s=start_s,
            end_s=end_s,
            decoder=self.decoder,
            sound=sound,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """One item and some conversations about it."""

    item: Item
    conversations: tuple[Conversation, ...]

    @property
    def num_records(self) -> int:
        """Records that this work will make."""
        return sum(map(len, self.conversations))


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    todo: tuple[Work, ...]
    done: tuple[Work, ...]  # there before
    failed: tuple[Work, ...]  # error records that are not tried again


def count_records(works: Iterable[Work]) -> int:
    """Count the records of some works."""
    return sum(work.num_records for work in works)


def key_fields(
    task: Task, sampling: Sampling, item: Item, conversation: Conversation, turn: int
) -> dict[str, Any]:
    """Return the fields that make up the key of one turn's record."""
    return {
        "id": item.id,
        "task": task.name,
        "question": conversation[turn],
        "history": [{"question": question} for question in conversation[:turn]],
        "segment": sampling.segment_of(item),
    }


def outcome(future: Future[Result]) -> Result | InputError:
    """Return what a future gives, or the error of its file."""
    try:
        return future.result()
    except InputError as error:
        return error


def usable_items(
    items: Sequence[Item], pool: DecodePool, modality: str, *, has_ears: bool
) -> list[Item]:
    """Keep what the model can take of what was asked for.

    Args:
        items: of any kind; those whose names do not say what they are, are looked into.
        pool: looks into files.
        modality: as the flag.
        has_ears: of the model. To one without, a nameless file of sound is a video that lacks its
            picture, so that it gets an error record, and a file that is called sound is left out.

    Raises:
        NoInputError: nothing is left.
    """
    kinds = KINDS_OF[modality] - (set() if has_ears else {"audio"})
    usable = [i for i in _settle_kinds(items, pool, has_ears=has_ears) if i.kind in kinds]
    if not usable:
        if modality == "auto" and not has_ears:
            raise NoInputError(f"only audio files were found; {NO_EARS}")
        raise NoInputError(f"nothing of what was found is of --modality {modality}")
    return usable


def _settle_kinds(items: Sequence[Item], pool: DecodePool, *, has_ears: bool) -> list[Item]:
    probes = {
        i: pool.submit_probe(item.path, item.kind)
        for i, item in enumerate(items)
        if item.kind == "unknown"
    }
    settled = list(items)
    for i, probe in probes.items():
        found = outcome(probe)
        kind = "" if isinstance(found, InputError) else found.kind
        is_sound = kind == "audio" and has_ears
        named: Kind = "image" if kind == "image" else "audio" if is_sound else "video"
        settled[i] = replace(items[i], kind=named)
    return settled


@paused_collector()
def make_plan(
    items: Sequence[Item],
    task: Task,
    sampling: Sampling,
    pool: DecodePool,
    *,
    lookup: Lookup | None,
    wanted: Callable[[Item, Conversation], Mapping[str, Any]],
    retry_errors: bool = False,
) -> Plan:
    """Split the items into what is to do, what is done and what failed before.

    A record holds while file, model and settings are the same. Only where nothing but the time of
    a file differs is it hashed again.

    Args:
        items: what to work on, their kinds settled.
        task: what is asked.
        sampling: what of the files is looked at and listened to.
        pool: hashes.
        lookup: finds what was done before.
        wanted: `model_sha256` and `settings` that the records of a conversation about an item must
            come from.
        retry_errors: whether what failed before is to do.

    Raises:
        UsageError: a record would be replaced by that of another file with the same id, or the
            sampling says where sound begins and so does the range of an item.
    """
    _check_audio_start(items, sampling)
    check = _ResumeCheck(task, sampling, pool, lookup, wanted, retry_errors)
    begun = [
        (item, conversation, check.start(item, conversation))
        for item in items
        for conversation in task.conversations_about(item, sampling.medium_of(item))
    ]
    split: dict[str, list[Work]] = {"todo": [], "done": [], "failed": []}
    for item, conversation, decided in begun:
        works = split[decided if isinstance(decided, str) else decided()]
        if works and works[-1].item is item:
            works[-1] = Work(item, (*works[-1].conversations, conversation))
        else:
            works.append(Work(item, (conversation,)))
    return Plan(*map(tuple, (split["todo"], split["done"], split["failed"])))


@dataclass(frozen=True)
class _ResumeCheck:
    """Decides whether the records of a conversation still hold; hashes run side by side."""

    task: Task
    sampling: Sampling
    pool: DecodePool
    lookup: Lookup | None
    wanted: Callable[[Item, Conversation], Mapping[str, Any]]
    retry_errors: bool
    hashes: dict[str, Future[FileState]] = field(default_factory=dict)

    def start(self, item: Item, conversation: Conversation) -> str | Callable[[], str]:
        """Say `todo`, `done` or `failed`, or where a file is hashed for it, begin and say later."""
        known = []
        for turn in range(len(conversation)):
            key = key_of(key_fields(self.task, self.sampling, item, conversation, turn))
            entry = self.lookup(key) if self.lookup else None
            if entry is not None:
                known.append(entry)
        has_errors = any(entry.is_error for entry in known)
        if len(known) < len(conversation) or (self.retry_errors and has_errors):
            return self._todo(item, known)
        size_bytes, mtime_ns = _stat(item.path)
        wanted = self.wanted(item, conversation)
        holds = {
            is_current(entry, size_bytes=size_bytes, mtime_ns=mtime_ns, **wanted) for entry in known
        }
        if "changed" in holds:
            return self._todo(item, known)
        verdict = "failed" if has_errors else "done"
        if "hash" not in holds:
            return verdict
        if item.path not in self.hashes:
            self.hashes[item.path] = self.pool.submit_hash(item.path)
        before = {entry.sha256 for entry in known}
        return lambda: verdict if before == {self._sha256(item)} else self._todo(item, known)

    def _todo(self, item: Item, known: Sequence[Entry]) -> str:
        if known:
            _refuse_other_file(item, known)
        return "todo"

    def _sha256(self, item: Item) -> str | None:
        state = outcome(self.hashes[item.path])
        return None if isinstance(state, InputError) else state.sha256


def _check_audio_start(items: Sequence[Item], sampling: Sampling) -> None:
    parts = [item for item in items if item.is_part]
    if parts and sampling.audio_start_s is not None:
        raise UsageError(
            f"'--audio-start {sampling.audio_start_s:g}': '{parts[0].id}' has a range of its own, "
            "whose sound is heard from its beginning"
        )


def _refuse_other_file(item: Item, known: Sequence[Entry]) -> None:
    """Refuse to replace the record of a file that is still there beside this one.

    A folder that moved, or that is named in another way, leaves nothing at the old path or the
    same file.
    """
    for path in {entry.path for entry in known if entry.path} - {encode_name(item.path)}:
        if os.path.exists(path) and not _is_same_file(path, item.path):  # noqa: PTH110
            raise UsageError(
                f"'{encode_name(item.path)}' would replace the record of another file with the "
                f"same id '{item.id}': '{path}'; name both folders in one command, or choose "
                "another -o"
            )


def _is_same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second)  # noqa: PTH121  names may hold any bytes
    except OSError:
        return False


def _stat(path: str) -> tuple[int | None, int | None]:
    try:
        state = os.stat(path)  # noqa: PTH116  the path may hold any bytes
    except OSError:
        return None, None
    return state.st_size, state.st_mtime_ns
