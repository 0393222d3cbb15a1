"""Turn the arguments of a command into work items with stable ids.

An argument is a file, a folder (searched to any depth), a glob pattern, or `-`: a list on standard
input, one path a line or NUL-separated. Each is found under a root:

    file      its parent folder
    folder    the folder itself
    glob      the folder before the first wildcard
    a list    the current folder for its relative paths, `/` for its absolute ones, so that an id
              does not depend on what else is listed

An id is the path relative to the root. With several roots the root's name stands before it.
"""

import difflib
import errno
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from vla2cli.errors import NoInputError, UsageError, why

Kind = Literal["video", "image", "audio", "unknown"]

_VIDEO = (
    "3g2 3gp asf avi divx dv f4v flv gif h264 h265 hevc ivf m1v m2t m2ts m2v m4v mj2 mjpeg mkv mov"
    " mp4 mpe mpeg mpg mts mxf nut ogm ogv qt rm rmvb ts vob webm wmv y4m"
)
_IMAGE = "bmp jfif jpe jpeg jpg pgm png pnm ppm tif tiff webp"
_AUDIO = (
    "aac ac3 aif aiff amr ape au caf dts flac m4a m4b mka mp2 mp3 mpc oga ogg opus spx tta w64 wav"
    " weba wma wv"
)
_KIND: dict[str, Kind] = {
    **dict.fromkeys(_VIDEO.split(), "video"),
    **dict.fromkeys(_IMAGE.split(), "image"),
    **dict.fromkeys(_AUDIO.split(), "audio"),
}
# modality -> the kinds it keeps, and their name in a message
_KEPT: dict[str, tuple[frozenset[Kind], str]] = {
    "auto": (frozenset({"video", "image", "audio"}), "video, image or audio file"),
    "video": (frozenset({"video"}), "video"),
    "av": (frozenset({"video"}), "video"),
    "image": (frozenset({"image"}), "image"),
    "audio": (frozenset({"audio"}), "audio file"),
}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}


@dataclass(frozen=True, slots=True)
class Item:
    """One file to work on, or a part of one."""

    id: str  # stable, valid UTF-8; parts of one file share it
    path: str  # as the user gave it; bytes that are not UTF-8 are surrogates, see `encode_name`
    kind: Kind  # by extension
    start_s: float | None = None  # a range of its own, which goes before that of the command
    end_s: float | None = None
    # of a manifest: question -> what its answer has to be one of; None is what the command asks
    asked: Mapping[str | None, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @property
    def is_part(self) -> bool:
        """Whether it has a range of its own."""
        return self.start_s is not None or self.end_s is not None


@dataclass(frozen=True)
class Note:
    """What was looked at under one root; hidden files and folders are not."""

    root: str  # the argument as the user gave it, or the folder that several files share
    videos: int
    images: int
    audio: int
    unknown: int  # files named by the user whose extension says nothing
    others: int  # files met in folders that are no media
    skipped: int  # of the videos, images and audio files: not of the modality asked for
    unreadable: tuple[str, ...]  # "'folder': why" for each folder that could not be listed

    @property
    def looked_at(self) -> int:
        """Count every file met."""
        return self.videos + self.images + self.audio + self.unknown + self.others


@dataclass(frozen=True)
class Found:
    """The work items, in the order of the arguments, and one note per root."""

    items: tuple[Item, ...]
    notes: tuple[Note, ...]


def encode_name(path: str) -> str:
    """Write a path as valid UTF-8: each byte that is not becomes `%FF`, the rest stays as it is."""
    if path.isascii():
        return path
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        data = path.encode("utf-8", "surrogatepass")
    text = data.decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: f"%{ord(found[0]) - 0xDC00:02X}", text)


def kind_of(path: str) -> Kind:
    """Tell video, image and audio apart by extension, in any case."""
    name = path.rpartition("/")[2]
    return _KIND.get(name.rpartition(".")[2].lower(), "unknown") if "." in name else "unknown"


def find_items(
    arguments: Sequence[str], *, stdin: BinaryIO | None = None, modality: str = "auto"
) -> Found:
    """Find the files that the arguments name or hold.

    Args:
        arguments: files, folders, glob patterns, `-`.
        stdin: where the list for `-` comes from, by default standard input.
        modality: `auto` keeps every kind; `video`, `av`, `image` and `audio` keep one kind and
            count the others as skipped. A named file of unknown kind always stays, and for `audio`
            a named video, which has sound as well.

    Raises:
        UsageError: an argument does not exist or cannot be read.
        NoInputError: a pattern matches nothing, or nothing of the wanted kind was found.
    """
    if modality not in _KEPT:
        raise ValueError(f"modality '{modality}', expected one of {', '.join(_KEPT)}")
    if not arguments:
        raise UsageError("no file or folder was given")
    if arguments.count("-") > 1:
        raise UsageError("'-' was given twice; there is one list on standard input")
    search = _Search()
    for argument in arguments:
        if argument == "-":
            search.add_list((stdin or sys.stdin.buffer).read())
        else:
            search.add_argument(argument)
    return _identify(search, modality)


_Identity = tuple[int, int]  # device and inode


class _Hit(NamedTuple):
    root: "_Root"
    relative: str
    path: str
    kind: Kind
    is_named: bool  # by an argument or a list, not met in a folder


@dataclass(eq=False)
class _Root:
    folder: Path  # absolute, as it is called
    label: str  # for people
    shared_label: str  # the same once several arguments lie here
    others: set[str] = field(default_factory=set)  # relative paths of files that are no media
    unreadable: dict[str, None] = field(default_factory=dict)  # an ordered set
    counts: Counter[str] = field(default_factory=Counter)


class _Search:
    """What the arguments held so far: roots in order of appearance, and the hits under them."""

    def __init__(self) -> None:
        self.roots: dict[str, _Root] = {}
        self.hits: list[_Hit] = []

    def root(self, folder: str, label: str, shared_label: str | None = None) -> _Root:
        absolute = Path(os.path.normpath(Path(folder).absolute()))
        new = _Root(absolute, label, shared_label or label)
        root = self.roots.setdefault(os.path.realpath(folder), new)
        if root.label != label:
            root.label = root.shared_label
        return root

    def add_argument(self, argument: str) -> None:
        if not argument:
            raise UsageError("'' is not a path; is a variable unset?")
        try:
            is_folder = _is_folder(argument)
        except OSError as error:
            if error.errno in _GONE and any(map(_has_wildcard, argument.split("/"))):
                self.add_glob(argument)
                return
            raise UsageError(_explain(argument, error)) from error
        if is_folder:
            self.add_folder(self.root(argument, argument), argument, "")
            return
        parent = _parent(argument)
        root = self.root(parent, argument, parent.rstrip("/") + "/")
        self.add_file(root, argument.rpartition("/")[2], argument, is_named=True)

    def add_file(self, root: _Root, relative: str, path: str, *, is_named: bool) -> None:
        kind = kind_of(path)
        if kind == "unknown" and not is_named:
            root.others.add(relative)
        else:
            self.hits.append(_Hit(root, relative, path, kind, is_named))

    def add_folder(
        self, root: _Root, folder: str, prefix: str, above: frozenset[_Identity] = frozenset()
    ) -> None:
        for relative in sorted(_walk(folder, root.unreadable, above), key=_sort_key):
            self.add_file(root, _join(prefix, relative), _join(folder, relative), is_named=False)

    def add_glob(self, pattern: str) -> None:
        parts = pattern.split("/")
        first = next(i for i, part in enumerate(parts) if _has_wildcard(part))
        folder = "/".join(parts[:first]) or ("/" if first else "")
        wants_folder = pattern.endswith("/")
        root = self.root(folder or ".", pattern)
        walked: set[str] = set()
        is_empty = True
        tail = [part for part in parts[first:] if part]
        for relative in sorted(set(_match(folder, tail, root.unreadable)), key=_sort_key):
            path = _join(folder, relative)
            parents = [relative[: slash.start()] for slash in re.finditer("/", relative)]
            parents += [""] if relative else []
            if walked.intersection(parents):
                continue
            if _is_folder_or_false(path):
                walked.add(relative)
                above = frozenset(_identity(_join(folder, parent)) for parent in parents)
                self.add_folder(root, path, relative, above)
            elif wants_folder:
                continue
            else:
                self.add_file(root, relative, path, is_named=False)
            is_empty = False
        if is_empty:
            raise NoInputError(f"'{pattern}' matches no file or folder")

    def add_list(self, data: bytes) -> None:
        separator = b"\0" if b"\0" in data else b"\n"
        entries = [entry for entry in data.split(separator) if entry.strip()]
        if not entries:
            raise NoInputError("the list on standard input is empty")
        roots: dict[str, _Root] = {}
        for entry in entries:
            path = os.fsdecode(entry)
            if path.endswith("\r") and separator == b"\n" and not os.path.lexists(path):
                path = path[:-1]  # a list with Windows line ends
            # what is not there becomes an error record when it is to be read
            is_folder = _is_folder_or_false(path)
            folder, relative = _split_listed(path)
            if folder not in roots:
                roots[folder] = self.root(folder, "-")
            if is_folder:
                self.add_folder(roots[folder], path, relative)
            else:
                self.add_file(roots[folder], relative, path, is_named=True)


def _identify(search: _Search, modality: str) -> Found:
    """Give each hit its id, drop the same file found twice, keep the wanted kinds, count."""
    kept, noun = _KEPT[modality]
    roots = list(search.roots.values())
    prefixes = _name_roots(roots) if len(roots) > 1 else {id(roots[0]): ""}
    paths: dict[str, str] = {}
    named = {os.path.realpath(hit.path) for hit in search.hits if hit.is_named}
    items = []
    for root, relative, path, kind, _ in search.hits:
        plain = prefixes[id(root)] + encode_name(relative)
        item_id, number = plain, 1
        while item_id in paths and os.path.realpath(paths[item_id]) != os.path.realpath(path):
            number += 1
            item_id = f"{plain}-{number}"
        if item_id in paths:
            continue
        paths[item_id] = path
        root.counts[kind] += 1
        # also where its folder was named before it
        is_heard = (modality, kind) == ("audio", "video") and os.path.realpath(path) in named
        if kind in kept or kind == "unknown" or is_heard:
            items.append(Item(item_id, path, kind))
        else:
            root.counts["skipped"] += 1
    notes = tuple(
        Note(
            root=root.label,
            videos=root.counts["video"],
            images=root.counts["image"],
            audio=root.counts["audio"],
            unknown=root.counts["unknown"],
            others=len(root.others),
            skipped=root.counts["skipped"],
            unreadable=tuple(root.unreadable),
        )
        for root in roots
    )
    if not items:
        raise NoInputError(_describe_nothing(notes, noun))
    return Found(tuple(items), notes)


def _name_roots(roots: list[_Root]) -> dict[int, str]:
    prefixes: dict[int, str] = {}
    for root in roots:
        name = encode_name(root.folder.name) or "root"
        prefix, number = f"{name}/", 1
        while prefix in prefixes.values():
            number += 1
            prefix = f"{name}-{number}/"
        prefixes[id(root)] = prefix
    return prefixes


def _describe_nothing(notes: tuple[Note, ...], noun: str) -> str:
    names = [f"'{note.root}'" for note in notes]
    if len(names) > 3:
        names[3:] = [f"{len(names) - 3} more"]
    count = sum(note.looked_at for note in notes)
    unreadable = [line for note in notes for line in note.unreadable]
    is_deaf = noun == _KEPT["audio"][1] and any(note.videos for note in notes)
    return (
        f"{', '.join(names)} {'holds' if len(names) == 1 else 'hold'} no {noun}"
        f" (looked at {count:,} {'file' if count == 1 else 'files'})"
        + (f"; cannot read {unreadable[0]}" if unreadable else "")
        + ("; name a video itself to hear only its sound" if is_deaf else "")
    )


def _explain(argument: str, error: OSError) -> str:
    """Say why an argument cannot be used, and which neighbour may have been meant."""
    if error.errno not in _GONE - {errno.ENAMETOOLONG}:
        return f"'{argument}' cannot be read: {why(error)}"
    path = Path(argument)
    if path.is_symlink():
        return f"'{argument}' is a link to '{path.readlink()}', which does not exist"
    try:
        siblings = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        siblings = []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if not close:
        return f"'{argument}' does not exist"
    head = argument.rstrip("/").rpartition("/")
    meant = head[0] + head[1] + close[0]
    meant += "/" if _is_folder_or_false(meant) else ""
    return f"'{argument}' does not exist; did you mean '{meant}'?"


def _walk(folder: str, unreadable: dict[str, None], above: frozenset[_Identity]) -> Iterator[str]:
    """Yield the relative path of each file below a folder, in no order.

    Each folder carries those it was reached through, `above`: a link back to one is a loop.
    """
    stack = [("", above)]
    while stack:
        relative, above = stack.pop()
        here = _join(folder, relative)
        identity = _identity(here)
        if identity in above:
            continue
        for name, is_folder in _list(here, unreadable):
            if name.startswith("."):
                continue
            if is_folder:
                stack.append((_join(relative, name), above | {identity}))
            else:
                yield _join(relative, name)


def _match(folder: str, parts: list[str], unreadable: dict[str, None]) -> Iterator[str]:
    """Yield the relative path of each file and folder that a pattern matches, in no order.

    `glob.glob` would follow a link that leads back up forty times over.
    """
    stack: list[tuple[str, int, frozenset[_Identity]]] = [("", 0, frozenset())]
    while stack:
        relative, index, above = stack.pop()
        if index == len(parts):
            yield relative
            continue
        part, is_last = parts[index], index + 1 == len(parts)
        here = _join(folder, relative)
        if part == "**":
            identity = _identity(here)
            if identity in above:
                continue
            stack.append((relative, index + 1, frozenset()))
            if is_last:
                continue  # the whole folder matches
            for name, is_folder in _list(here, unreadable):
                if is_folder and not name.startswith("."):
                    stack.append((_join(relative, name), index, above | {identity}))
        elif _has_wildcard(part):
            for name, is_folder in _list(here, unreadable):
                is_shown = part.startswith(".") or not name.startswith(".")
                if is_shown and (is_last or is_folder) and fnmatchcase(name, part):
                    stack.append((_join(relative, name), index + 1, frozenset()))
        elif os.path.lexists(_join(here, part)):
            stack.append((_join(relative, part), index + 1, frozenset()))


def _list(folder: str, unreadable: dict[str, None]) -> list[tuple[str, bool]]:
    """Name the entries of a folder and whether each is a folder; links are followed."""
    try:
        with os.scandir(folder or ".") as entries:
            return [(entry.name, _entry_is_folder(entry)) for entry in entries]
    except NotADirectoryError:
        return []
    except OSError as error:
        unreadable[f"'{folder or '.'}': {why(error)}"] = None
        return []


def _entry_is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or into a folder that is closed to us
        return False


def _is_folder(path: str) -> bool:
    is_folder = stat.S_ISDIR(Path(path).stat().st_mode)
    if path.endswith("/") and not is_folder:  # Path drops the slash
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return is_folder


def _is_folder_or_false(path: str) -> bool:
    try:
        return _is_folder(path)
    except OSError:
        return False


def _identity(folder: str) -> _Identity:
    try:
        status = Path(folder or ".").stat()
    except OSError:  # it will not list either
        return (-1, -1)
    return (status.st_dev, status.st_ino)


def _split_listed(path: str) -> tuple[str, str]:
    """Split a listed path into its root and the rest: `/`, the current folder or one above it."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/"):
        return "/", "/".join(parts)
    num_up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return "/".join(parts[:num_up]) or ".", "/".join(parts[num_up:])


def _join(folder: str, relative: str) -> str:
    """Join as the user wrote it: `./a` stays `./a`, which Path would shorten."""
    if not folder or not relative:
        return folder or relative
    return f"{folder.rstrip('/')}/{relative}"


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def _sort_key(relative: str) -> tuple[bytes, str]:
    return encode_name(relative).encode(), relative


def _has_wildcard(part: str) -> bool:
    return any(char in part for char in "*?[")
