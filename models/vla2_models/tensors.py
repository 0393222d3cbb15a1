"""A file of tensors -> its tensors: safetensors, or a PyTorch pickle that holds nothing else.

Of some pickles, those of `read_parts`, settings are read too: text, numbers and lists of them.

A pickle is a program, and whoever wrote it chose what it calls. So its calls are listed before it
runs, and only those that put a tensor together pass. PyTorch's own restricted loader then runs it;
that loader allows more, such as conversions that fill the memory. What comes out is checked too.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from .errors import CheckpointError, one_line
from .files import check_readable

# buffers that older releases of transformers wrote and that are computed, not loaded
COMPUTED_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")

# all that `torch.save` writes for dense tensors, as "module name"
_CALLS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch(\.storage)? \w+Storage|torch u?int\d+|torch b?float\d+\w*"
)
_REFUSED = "refused, and nothing of it was run; ask its author for safetensors"
_MAX_NESTING = 20  # torch.save's own are half as deep; twice a tuple in a tuple is 2 ** 20 parts
_MAX_SETTINGS = 100_000  # texts, numbers and containers; a list of sounds has 527 of each
_NUM_OLD_PICKLES = 5  # before 1.6: magic number, version, machine, content, names of the storages
_LOAD = threading.Lock()  # the loader's additions and Python's warnings belong to the process

_Content = TypeVar("_Content")


class Tensors(Protocol):
    """The tensors of one open file."""

    def keys(self) -> list[str]:
        """List the names."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape; nothing of its content is read."""

    def get(self, key: str) -> Tensor:
        """Return a tensor, on the CPU; memory-mapped where the file allows."""


class _Safetensors:
    def __init__(self, file: safe_open) -> None:
        self._file = file

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def get(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor


class _Pickled:
    def __init__(self, content: dict[str, Tensor]) -> None:
        self._content = content

    def keys(self) -> list[str]:
        return list(self._content)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._content[key].shape)

    def get(self, key: str) -> Tensor:
        return self._content[key]


@contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Open a file of tensors, of the kind that its suffix names.

    Args:
        path: `.safetensors`, or `.bin`, `.pt` or `.pth` for a pickle.

    Raises:
        CheckpointError: the file is absent or damaged, or is a pickle of anything but a dict of
            names and dense tensors of floats or integers.
    """
    check_readable(path)
    match path.suffix:
        case ".safetensors":
            with _open_safetensors(path) as file:
                yield _Safetensors(file)
        case ".bin" | ".pt" | ".pth":
            yield _Pickled(_load_pickle(path, _check_content))
        case _:
            raise CheckpointError(
                f"'{path}' is no file of tensors, expected .safetensors, .bin, .pt or .pth"
            )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a file's tensors; computed buffers are left out.

    Raises:
        CheckpointError: as `open_tensors`.
    """
    with open_tensors(path) as tensors:
        return {
            key: tensors.shape(key)
            for key in tensors.keys()  # noqa: SIM118  no mapping
            if not COMPUTED_BUFFERS.search(key)
        }


def read_parts(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a pickle of a dict that has its tensors in one dict, and settings beside it.

    Args:
        path: a PyTorch pickle, whatever its suffix.
        name: of the dict of tensors.

    Returns:
        The settings, a copy made of dict, list, tuple, str, int, float, bool and None; and the
        tensors by name.

    Raises:
        CheckpointError: as `open_tensors`; or `name` is absent, or anything else stands beside it.
    """
    check_readable(path)
    return _load_pickle(path, lambda path, content: _check_parts(path, name, content))


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"'{path}' is not a whole safetensors file: {_printable(str(error))}"
        ) from error


def _load_pickle(path: Path, check: Callable[[Path, Any], _Content]) -> _Content:
    try:
        is_zip = _check_program(path)
        with _strict_loader():
            # weights_only in so many words: an environment variable turns the default off
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        return check(path, content)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # the reason stands between a preamble and advice to load the file unsafely
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(
            f"'{path}' is a pickle that PyTorch's safe loader does not take "
            f"({_printable(reason)}); {_REFUSED}"
        ) from error
    except (IndexError, KeyError) as error:
        raise CheckpointError(f"'{path}' is not a whole PyTorch file: it is damaged") from error
    except Exception as error:
        # every kind, since whoever wrote the file chose where the loader stumbles
        reason = _printable(str(error)) or type(error).__name__
        raise CheckpointError(f"'{path}' is not a whole PyTorch file: {reason}") from error


@contextmanager
def _strict_loader() -> Iterator[None]:
    """Take away what other libraries allowed PyTorch's loader to call, and its warnings."""
    with _LOAD, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        added = get_safe_globals()
        clear_safe_globals()
        try:
            yield
        finally:
            add_safe_globals(added)


def _check_program(path: Path) -> bool:
    """Check what the pickle would call, without running it; tell whether the file is a zip."""
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if head.startswith(b"PK\3\4"):
            with ZipFile(file) as archive:
                _check_archive(path, archive)
            return True
        if head[257:262] == b"ustar":
            raise CheckpointError(f"'{path}' is a tar of PyTorch before 0.1.11; {_REFUSED}")
        for _ in range(_NUM_OLD_PICKLES):
            _check_calls(path, file)
        return False


def _check_archive(path: Path, archive: ZipFile) -> None:
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
        raise CheckpointError(f"'{path}' is a TorchScript archive, which is code; {_REFUSED}")
    for entry in archive.infolist():
        # the loader maps the bytes as they lie, and unpacks a pickle of any size
        if entry.compress_type != ZIP_STORED:
            raise CheckpointError(
                f"'{path}' is a compressed archive, PyTorch writes none; fetch it again"
            )
        if entry.filename.endswith("/data.pkl"):
            with archive.open(entry) as program:
                _check_calls(path, program)


def _check_calls(path: Path, program: IO[bytes]) -> None:
    strings = ["", ""]
    nesting = _Nesting()
    for opcode, arg, _ in pickletools.genops(program):
        if nesting.add(opcode, arg) > _MAX_NESTING:
            raise CheckpointError(
                f"'{path}' holds containers in containers, {_MAX_NESTING} deep and more; {_REFUSED}"
            )
        if opcode.name in ("GLOBAL", "INST"):
            _check_call(path, str(arg))
        elif opcode.name == "STACK_GLOBAL":
            # only to name it: the loader takes no such opcode
            _check_call(path, " ".join(strings))
        elif opcode.name.startswith("EXT"):
            _check_call(path, f"copyreg extension {arg}")
        elif isinstance(arg, str):
            strings = [strings[1], arg]


class _Nesting:
    """How deep the objects on a pickle's stack are nested, followed without making any.

    Python's hash of a tuple goes down to its innermost part, however deep, and a million of them
    end the process.
    """

    def __init__(self) -> None:
        self._stack: list[int | None] = []  # None is a mark
        self._memo: dict[Any, int] = {}

    def add(self, opcode: pickletools.OpcodeInfo, arg: Any) -> int:
        """Follow one step; return how deep its result is nested."""
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            key = len(self._memo) if arg is None else int(arg)
            self._memo[key] = depth = self._stack[-1] or 0
            return depth
        if "GET" in opcode.name:
            self._stack.append(self._memo.get(int(arg), 0))
            return 0
        if opcode.name == "MARK":
            self._stack.append(None)
            return 0
        taken = self._take(opcode)
        # what is put into a container nests below it; other results hold all that was taken
        is_filled = bool(taken) and opcode.stack_before[:1] == opcode.stack_after[:1]
        inside = taken[1:] if is_filled else taken
        depth = max([1 + depth for depth in inside] + taken[: 1 if is_filled else 0], default=0)
        self._stack += [depth] * len(opcode.stack_after)
        return depth

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """Take the operands off the stack, the lowest first."""
        taken = []
        for kind in reversed(opcode.stack_before):
            if kind is pickletools.stackslice:
                while self._stack[-1] is not None:
                    taken.append(self._stack.pop())
            else:
                taken.append(self._stack.pop())
        return [depth for depth in reversed(taken) if depth is not None]


def _check_call(path: Path, call: str) -> None:
    if _CALLS.fullmatch(call):
        return
    name = f"{call.replace(' ', '.')!r:.100}"
    if call.startswith("torch._utils _rebuild_"):
        raise CheckpointError(
            f"'{path}' holds a tensor of another kind ({name}), expected dense floats or integers"
        )
    raise CheckpointError(f"'{path}' is a pickle with more than tensors in it ({name}); {_REFUSED}")


def _check_content(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(content).__name__}, expected a dict of tensors"
        )
    size_bytes = path.stat().st_size
    # not content.items(): a pickle may give its OrderedDict an attribute of that name
    return {
        _check_key(path, key, value): _check_tensor(path, key, value, size_bytes)
        for key, value in dict.items(content)
    }


def _check_key(path: Path, key: object, value: object) -> str:
    if not isinstance(key, str):
        raise CheckpointError(f"'{path}' holds a name of type {type(key).__name__}, expected text")
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"'{path}' holds a {type(value).__name__} as {key!r:.100}, expected only tensors"
        )
    return key


def _check_tensor(path: Path, key: str, tensor: Tensor, size_bytes: int) -> Tensor:
    dtype = tensor.dtype
    is_number = dtype.is_floating_point or str(dtype).startswith(("torch.int", "torch.uint"))
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not is_number:
        raise CheckpointError(
            f"'{path}' holds {key!r:.100} as {tensor.layout} {dtype} on {tensor.device}, "
            "expected dense floats or integers"
        )
    # strides of zero make any size of a single number
    stored_bytes = min(tensor.untyped_storage().nbytes(), size_bytes)
    if tensor.numel() * tensor.itemsize > stored_bytes:
        raise CheckpointError(
            f"'{path}': tensor {key!r:.100} is {list(tensor.shape)!s:.100}, but only "
            f"{stored_bytes} bytes of it are stored; fetch the file again"
        )
    return tensor.detach()


def _check_parts(path: Path, name: str, content: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(content).__name__}, expected a dict with {name!r}"
        )
    parts = dict(dict.items(content))
    if name not in parts:
        raise CheckpointError(
            f"'{path}' holds no {name!r}, expected a dict of tensors of that name"
        )
    tensors = _check_content(path, parts.pop(name))
    copy = _Settings(path).copy(parts)
    assert isinstance(copy, dict)
    for key in copy:
        if not isinstance(key, str):
            raise CheckpointError(
                f"'{path}' holds a name of type {type(key).__name__}, expected text"
            )
    return copy, tensors


class _Settings:
    """Copies plain containers, so that what comes out is a tree, with an end and of a bounded size.

    What is read may hold itself, and a list of two of one list, again and again, has no end either.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_left = _MAX_SETTINGS

    def copy(self, value: Any, depth: int = 0) -> Any:
        """Copy a text, a number, or a container of them."""
        self._num_left -= 1
        if depth > _MAX_NESTING or self._num_left < 0:
            raise CheckpointError(
                f"'{self._path}' holds settings of more than {_MAX_SETTINGS:,} parts or "
                f"{_MAX_NESTING} levels; {_REFUSED}"
            )
        # the type itself: what a class of one's own would do is unknown
        if type(value) in (dict, OrderedDict):
            pairs = dict.items(value)
            return {self._scalar(key): self.copy(part, depth + 1) for key, part in pairs}
        if type(value) in (list, tuple):
            parts = [self.copy(part, depth + 1) for part in value]
            return parts if type(value) is list else tuple(parts)
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if value is None or type(value) in (str, bool, float):
            return value
        # a message can hold no number of thousands of digits
        if type(value) is int and abs(value) < 2**63:
            return value
        kind = "number beyond 64 bits" if type(value) is int else type(value).__name__
        raise CheckpointError(
            f"'{self._path}' holds a {kind} among its settings, expected text and numbers"
        )


def _printable(text: str) -> str:
    text = "".join(char if char.isprintable() else " " for char in text)
    return one_line(text)[:200]
