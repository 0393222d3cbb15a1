"""Files of tensors: public pickles open like safetensors, hostile ones are never run."""

import copyreg
import functools
import importlib
import io
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
import timeit
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.goldens import golden, golden_audio
from vla2_models import tensors as tensors_module
from vla2_models.errors import CheckpointError
from vla2_models.tensors import open_tensors, read_parts, read_shapes

MAGIC = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]  # ahead of an old file's content
EXTENSION = 0xF0  # a code for private use, which one hostile pickle calls by number


def write_zip(path, program):
    """Wrap a pickle as torch.save does today."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")


def write_old(path, program):
    """Wrap a pickle as torch.save did before 1.6."""
    head = b"".join(pickle.dumps(part, 2) for part in MAGIC)
    path.write_bytes(head + program + pickle.dumps([], 2))


def write_bare(path, program):
    path.write_bytes(program)


WRAPPERS = pytest.mark.parametrize(
    "wrap", [write_zip, write_old, write_bare], ids=["zip", "old", "bare"]
)


def open_all(path):
    with open_tensors(path) as opened:
        return {key: opened.get(key) for key in opened.keys()}  # noqa: SIM118  no mapping


def refusal(path):
    """Open a file that must be refused; return the line, which names the file first."""
    with pytest.raises(CheckpointError) as raised:
        open_all(path)
    line = str(raised.value)
    assert line.startswith(f"'{path}'")
    assert line.isprintable(), line
    assert len(line) < len(str(path)) + 400
    return line


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert type(found[key]) is torch.Tensor
        torch.testing.assert_close(found[key], tensor.detach(), atol=0, rtol=0)


def public_tensors():
    wide = torch.arange(35, dtype=torch.float32).reshape(5, 7)
    return OrderedDict(
        {
            "a.weight": wide.half(),
            "a.bias": torch.randn(1).bfloat16(),
            "b.weight": wide.T,
            "b.row": wide[3],
            "bn.num_batches_tracked": torch.tensor(100),
            "parameter": torch.nn.Parameter(torch.randn(2, 3)),
            "empty": torch.zeros(0, 7),
        }
    )


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_saved_dict_opens_with_the_same_tensors(tmp_path, suffix, is_zip):
    path = tmp_path / f"weights{suffix}"
    content = public_tensors()
    if is_zip:  # the old form never learned of these
        content["small"] = torch.ones(3).to(torch.float8_e4m3fn)
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert_same(open_all(path), content)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_state_dict_of_a_module_opens(tmp_path, is_zip):
    # it carries an attribute, _metadata
    state = torch.nn.Sequential(torch.nn.Linear(7, 3), torch.nn.BatchNorm1d(3)).state_dict()
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=is_zip)
    assert_same(open_all(tmp_path / "a.bin"), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shape_and_dtype_are_those_of_the_tensor(tmp_path, suffix):
    content = {"a": torch.zeros(5, 7, dtype=torch.bfloat16), "b": torch.tensor(3)}
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(content, path)
    with open_tensors(path) as opened:
        assert sorted(opened.keys()) == ["a", "b"]
        assert [opened.shape(key) for key in "ab"] == [(5, 7), ()]
        assert [opened.get(key).dtype for key in "ab"] == [torch.bfloat16, torch.int64]
        assert torch.equal(opened.get("b"), content["b"])


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_tensor_outlives_its_file(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.arange(100)}, path)
    tensor = open_all(path)["a"]
    path.unlink()
    assert tensor.sum() == 4950


def test_protocol_three_opens_without_a_warning(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin", pickle_protocol=3)
    assert open_all(tmp_path / "a.bin")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_computed_buffers_have_no_shape(tmp_path, suffix):
    kept = ["a.weight", "my_position_ids", "position_ids.weight"]
    computed = [
        "embeddings.position_ids",
        "position_ids",
        "rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    content = {key: torch.zeros(1, 7) for key in kept + computed}
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(content, path)
    assert read_shapes(path) == dict.fromkeys(kept, (1, 7))


@pytest.mark.parametrize(
    "name",
    [
        "mistral_clip_stc_8f_Base/mm_projector.bin",
        "mistral_clip_stc_8f_lora/adapter_model.bin",
        "mistral_clip_stc_8f_lora/non_lora_trainables.bin",
    ],
)
def test_file_of_the_reference_opens_as_with_torch(name):
    path = golden(f"checkpoints/{name}")
    expected = torch.load(path, map_location="cpu", weights_only=True)
    assert_same(open_all(path), expected)
    assert read_shapes(path) == {key: tuple(tensor.shape) for key, tensor in expected.items()}


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Only so that pickle takes it for the function of another call."""


class Plain:
    """An object with nothing but attributes."""


class Trap(OrderedDict):
    """A dict that leaves the marker when a pickle sets its state."""

    def __setstate__(self, state):
        Path(state["marker"]).touch()


class Slot:
    """What a Plain can turn into; leaves the marker as Trap does."""

    def __setstate__(self, state):
        Path(state["marker"]).touch()


def calls(marker):
    """Objects whose pickles leave the marker, through the functions that attackers use."""
    shell, code = f"touch '{marker}'", f"open({str(marker)!r}, 'w').close()"
    inner = marker.with_name("inner.pt")
    load = functools.partial(torch.load, inner, weights_only=False)
    hub = functools.partial(torch.hub.load, str(marker.parent), "entry", source="local")
    saved = io.BytesIO()
    torch.save(Call(os.system, shell), saved)
    trap = Trap()
    trap.marker = str(marker)
    return {
        "os.system": Call(os.system, shell),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "check_call": Call(subprocess.check_call, ["touch", str(marker)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "compile": Call(exec, Call(compile, code, "x", "exec")),
        "open": Call(open, str(marker), "w"),
        "io.FileIO": Call(io.FileIO, str(marker), "w"),
        "Path.touch": Call(Path.touch, marker),
        "partial": Call(functools.partial(os.system, shell)),
        "getattr": Call(Call(getattr, Call(importlib.import_module, "os"), "system"), shell),
        "__import__": Call(Call(getattr, Call(__import__, "os"), "system"), shell),
        "runpy": Call(runpy.run_path, str(marker.with_name("hubconf.py")), None, "main"),
        "timeit": Call(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, shell), 2)),
        "numpy.load": Call(np.load, str(marker.with_name("inner.npy")), None, True),
        "torch.load": Call(load),
        "torch.hub": Call(hub),
        "torch.storage": Call(torch.storage._load_from_bytes, saved.getvalue()),
        "dotted_name": Call(Call(torch._utils._import_dotted_name, "os.system"), shell),
        "dict_subclass": trap,
        "in_a_state_dict": OrderedDict(a=torch.Size([1]), b=Call(os.system, shell)),
        "as_a_name": {Call(os.system, shell): 1},
    }


def text(string):
    """A string as opcodes; in the one form that the restricted loader takes, so that it goes on."""
    return b"X" + len(string).to_bytes(4, "little") + string.encode()


def opcodes(marker):
    """Programs put together by hand, one for each way in which a pickle can call."""
    shell = text(f"touch '{marker}'")
    state = b"}" + text("marker") + text(str(marker)) + b"s"
    trap, plain, slot = (f"c{__name__}\n{name}\n".encode() for name in ("Trap", "Plain", "Slot"))
    ordered = b"ccollections\nOrderedDict\n)R"
    programs = {
        "GLOBAL": b"cos\nsystem\n(" + shell + b"tR",
        "GLOBAL_posix": b"cposix\nsystem\n" + shell + b"\x85R",
        "GLOBAL_python2": b"c__builtin__\neval\n" + text(f"open({str(marker)!r}, 'w')") + b"\x85R",
        "INST": b"(" + shell + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + shell + b"o",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93" + shell + b"\x85R",
        "STACK_GLOBAL_from_memo": (
            text("system") + b"q\0" + text("os") + b"h\0\x93" + shell + b"\x85R"
        ),
        "EXT1": bytes([0x82, EXTENSION]) + shell + b"\x85R",
        "EXT2": bytes([0x83, EXTENSION, 0]) + shell + b"\x85R",
        "EXT4": bytes([0x84, EXTENSION, 0, 0, 0]) + shell + b"\x85R",
        "NEWOBJ_BUILD": trap + b")\x81" + state + b"b",
        "NEWOBJ_EX_BUILD": trap + b")}\x92" + state + b"b",
        # an instance's own __setstate__ is called with the next state
        "BUILD_setstate": (
            ordered + b"}" + text("__setstate__") + b"cos\nsystem\nsb" + shell + b"b"
        ),
        "BUILD_class": plain + b")R(N}" + text("__class__") + slot + b"stb" + state + b"b",
        "thrown_away": b"cos\nsystem\n" + shell + b"\x85R0}",
        "then_a_clean_dict": b"(cos\nsystem\n" + shell + b"\x85R1}",
    }
    return {name: b"\x80\x02" + program + b"." for name, program in programs.items()}


def corpus(marker):
    """Hostile pickles by name."""
    return {name: pickle.dumps(call, 2) for name, call in calls(marker).items()} | opcodes(marker)


HOSTILE = pytest.mark.parametrize("name", list(corpus(Path("marker"))))


@pytest.fixture
def marker(tmp_path):
    """A file that only a pickle that ran leaves; beside it lie the files that some pickles use."""
    marker = tmp_path / "marker"
    run = Call(os.system, f"touch '{marker}'")
    (tmp_path / "inner.npy").write_bytes(pickle.dumps(run, 2))
    torch.save(run, tmp_path / "inner.pt")
    touch = f"open({str(marker)!r}, 'w').close()"
    (tmp_path / "hubconf.py").write_text(
        f"def entry():\n    {touch}\nif __name__ == 'main':\n    entry()\n"
    )
    copyreg.add_extension("os", "system", EXTENSION)
    yield marker
    copyreg.remove_extension("os", "system", EXTENSION)


@HOSTILE
def test_hostile_pickle_does_run_under_plain_pickle(marker, name):
    # else the tests below would prove nothing
    result = pickle.loads(corpus(marker)[name])
    if isinstance(result, subprocess.Popen):
        result.wait()
    if isinstance(result, io.IOBase):
        result.close()
    assert marker.exists()


@WRAPPERS
@HOSTILE
def test_hostile_pickle_is_refused_and_never_runs(marker, tmp_path, wrap, name):
    path = tmp_path / "weights.bin"
    wrap(path, corpus(marker)[name])
    line = refusal(path)
    assert not marker.exists()
    assert "refused, and nothing of it was run; ask its author for safetensors" in line


@WRAPPERS
@HOSTILE
def test_loader_alone_runs_no_hostile_pickle(marker, tmp_path, monkeypatch, wrap, name):
    # a container that two readers understand in two ways gets past the list of calls
    monkeypatch.setattr(tensors_module, "_check_calls", lambda path, program: None)
    path = tmp_path / "weights.bin"
    wrap(path, corpus(marker)[name])
    refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("os.system", "posix.system"),
        ("GLOBAL", "os.system"),
        ("INST", "os.system"),
        ("STACK_GLOBAL", "os.system"),
        ("eval", "__builtin__.eval"),
        ("check_call", "commands.check_call"),  # protocol 2 writes the modules of Python 2
        ("EXT2", "copyreg.extension.240"),
        ("in_a_state_dict", "torch.Size"),
        ("thrown_away", "os.system"),
    ],
)
@WRAPPERS
def test_first_foreign_call_is_named(marker, tmp_path, wrap, name, called):
    wrap(tmp_path / "a.pth", corpus(marker)[name])
    wanted = f"is a pickle with more than tensors in it ('{called}'); refused, and nothing of it"
    assert wanted in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("value", "called"),
    [
        (np.float64(1.5), "multiarray.scalar"),
        (np.arange(3), "multiarray._reconstruct"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (b"bytes", "_codecs.encode"),
        (Path("a"), "pathlib.PosixPath"),
    ],
    ids=["numpy_scalar", "numpy_array", "module", "bytes", "path"],
)
def test_harmless_object_among_tensors_is_named(tmp_path, value, called, is_zip):
    content = {"a": torch.ones(2), "b": value}
    torch.save(content, tmp_path / "a.bin", _use_new_zipfile_serialization=is_zip)
    line = refusal(tmp_path / "a.bin")
    assert "is a pickle with more than tensors in it" in line
    assert called in line


@pytest.mark.parametrize("checks_calls", [True, False], ids=["whole", "loader_alone"])
def test_calls_that_others_allowed_stay_refused(marker, tmp_path, monkeypatch, checks_calls):
    if not checks_calls:
        monkeypatch.setattr(tensors_module, "_check_calls", lambda path, program: None)
    path = tmp_path / "a.bin"
    write_zip(path, corpus(marker)["NEWOBJ_BUILD"])
    with torch.serialization.safe_globals([Trap, Plain]):
        refusal(path)
        assert not marker.exists()
        assert {Trap, Plain} <= set(torch.serialization.get_safe_globals())
        torch.load(path, weights_only=True)  # what the refusal kept from happening
        assert marker.exists()


def test_environment_does_not_weaken_the_loader(marker, tmp_path):
    path = tmp_path / "a.bin"
    write_zip(path, corpus(marker)["GLOBAL"])
    script = """
import sys, warnings, torch
from pathlib import Path
from vla2_models import tensors
path, marker = map(Path, sys.argv[1:])
warnings.simplefilter("ignore")
tensors._check_calls = lambda path, program: None
try:
    tensors.read_shapes(path)
except tensors.CheckpointError:
    assert not marker.exists(), "run in spite of weights_only"
    torch.load(path)
    assert marker.exists(), "the variable has no effect, so this test proves nothing"
    print("refused")
"""
    env = os.environ | {
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", script, str(path), str(marker)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "refused\n"), run.stderr


@WRAPPERS
@pytest.mark.parametrize(
    "program",
    [
        b"Pos.system\n.",
        b"Vos.system\nQ.",
        b"(Vmodule\nccollections\nOrderedDict\nVa.py\nVx\ntQ.",
        b"(Vstorage\nctorch\nFloatStorage\nV../../etc/passwd\nVcpu\nK\x01tQ.",
        b"K\x00Q.",
    ],
    ids=["text", "binary", "module", "path", "number"],
)
def test_persistent_id_of_anything_but_a_storage_is_refused(tmp_path, program, wrap):
    wrap(tmp_path / "a.bin", program)
    refusal(tmp_path / "a.bin")


def test_torchscript_archive_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        torch.jit.script(torch.nn.Linear(2, 3)).save(str(tmp_path / "a.pt"))
    assert "is a TorchScript archive, which is code; refused" in refusal(tmp_path / "a.pt")


def test_tar_of_the_first_releases_is_refused(tmp_path):
    (tmp_path / "storages").write_bytes(b"")
    with tarfile.open(tmp_path / "a.pt", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    assert "is a tar of PyTorch before 0.1.11; refused" in refusal(tmp_path / "a.pt")


def other_tensor(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        return {
            "sparse": lambda: torch.eye(3).to_sparse(),
            "csr": lambda: torch.eye(3).to_sparse_csr(),
            "meta": lambda: torch.empty(3, device="meta"),
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "complex": lambda: torch.ones(3, dtype=torch.complex64),
            "bool": lambda: torch.ones(3, dtype=torch.bool),
        }[kind]()


@pytest.mark.parametrize("kind", ["sparse", "csr", "meta", "quantized", "complex", "bool"])
def test_tensor_of_another_kind_is_refused(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.ones(3), "b": other_tensor(kind)}, tmp_path / "a.bin")
    assert "expected dense floats or integers" in refusal(tmp_path / "a.bin")


@pytest.mark.parametrize("wrap", [write_zip, write_old], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ([1, 2], "holds a list, expected a dict of tensors"),
        (
            {"state_dict": {"a": 1}, "step": 3},
            "holds a dict as 'state_dict', expected only tensors",
        ),
        ({"step\n\x1b[2J": 3}, r"holds a int as 'step\n\x1b[2J', expected only tensors"),
        ({"x" * 10**4: None}, "holds a NoneType as 'xxx"),
        ({7: 1}, "holds a name of type int, expected text"),
    ],
    ids=["list", "nested", "escapes", "long_name", "number_as_name"],
)
def test_content_that_is_no_dict_of_tensors_is_refused(tmp_path, content, wanted, wrap):
    wrap(tmp_path / "a.bin", pickle.dumps(content, 2))
    assert wanted in refusal(tmp_path / "a.bin")


@pytest.mark.parametrize("attribute", ["items", "keys", "__iter__", "__class__"])
def test_attributes_of_the_dict_hide_nothing(tmp_path, attribute):
    program = b"ccollections\nOrderedDict\n)R}" + text(attribute) + b"Nsb" + text("a") + b"Ns."
    write_zip(tmp_path / "a.bin", program)
    assert "holds a NoneType as 'a', expected only tensors" in refusal(tmp_path / "a.bin")


class Rebuilt:
    """A tensor of a size of one's choice over a small storage."""

    def __init__(self, size, stride):
        storage = torch.ones(2)._typed_storage()
        self.args = (storage, 0, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ((10**12,), (0,)),
        ((2, 3), (0, 0)),
        ((3,), (1,)),
        ((10**10,), (1,)),
        ((10**12,), (1,)),
        ((2**62,), (1,)),
        ((2**40, 2**40), (0, 0)),
        ((-1,), (1,)),
        ((3,), (-1,)),
    ],
    ids=str,
)
def test_tensor_larger_than_its_bytes_is_refused(tmp_path, size, stride, is_zip):
    path = tmp_path / "a.bin"
    torch.save({"a": Rebuilt(size, stride)}, path, _use_new_zipfile_serialization=is_zip)
    refusal(path)


def test_expanded_tensor_is_named_with_what_is_stored(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "a.bin")
    line = refusal(tmp_path / "a.bin")
    assert "tensor 'a' is [1000000000000], but only 4 bytes of it are stored" in line


def test_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N0" * 10**6 + b"}.")
        archive.writestr("archive/version", "3\n")
    assert "is a compressed archive, PyTorch writes none" in refusal(tmp_path / "a.bin")


@WRAPPERS
@pytest.mark.parametrize(
    "program",
    [
        b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        b"}" + b"N" + b"\x85" * 10**6 + b"K\x01s.",
        # a tuple of two of itself, sixty times over
        b"})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"K\x01s.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x8b\xff\xff\xff\x7f1.",
        b"h\x07.",
        b"Nr\xff\xff\xff\x7f.",
        b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
        b"ccollections\nOrderedDict\nK\x01\x85R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"U\x01\xff.",
        b"R.",
        b"t.",
        b".",
        b"0.",
        b"c\xff\n\xfe\n.",
        b"\xff\xff\xff",
    ],
    ids=[
        "deep_list",
        "deep_tuple",
        "doubled_tuple",
        "long_text",
        "long_bytes",
        "long_number",
        "no_memo",
        "far_memo",
        "bytearray",
        "storage",
        "bad_call",
        "no_arguments",
        "not_utf8",
        "empty_call",
        "no_mark",
        "empty",
        "empty_pop",
        "not_a_name",
        "no_opcode",
    ],
)
def test_malformed_program_is_refused(tmp_path, program, wrap):
    wrap(tmp_path / "a.bin", program)
    refusal(tmp_path / "a.bin")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("part", [0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_pickle_is_refused(tmp_path, part, is_zip):
    path = tmp_path / "a.bin"
    torch.save({"a": torch.ones(7, 100)}, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert f"'{path}' is not a whole PyTorch file: " in refusal(path)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_damaged_pickle_opens_or_is_refused(tmp_path, is_zip):
    # any other exception fails the test
    path = tmp_path / "a.bin"
    torch.save(
        {"a": torch.ones(1), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=is_zip
    )
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            open_all(path)
        except CheckpointError as error:
            refused.append(str(error))
    assert refused
    assert all(line.isprintable() for line in refused)


def test_many_tensors_are_no_deep_nesting(tmp_path):
    # torch.save fills a dict in steps of a thousand
    names = [f"layer.{i}" for i in range(3001)]
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.bin")
    assert list(read_shapes(tmp_path / "a.bin")) == names


def test_text_instead_of_a_pickle_is_refused(tmp_path):
    # what git leaves where the large files were not fetched
    (tmp_path / "a.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is not a whole PyTorch file: " in refusal(tmp_path / "a.bin")


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "no_header", "half_header", "tail"])
def test_truncated_safetensors_is_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(7), "b": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert f"'{path}' is not a whole safetensors file: " in refusal(path)


def test_pickle_named_safetensors_is_not_read_as_a_pickle(marker, tmp_path):
    write_bare(tmp_path / "a.safetensors", corpus(marker)["GLOBAL"])
    assert "is not a whole safetensors file" in refusal(tmp_path / "a.safetensors")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_absent_file_is_refused(tmp_path, suffix):
    with pytest.raises(CheckpointError, match=f"'{tmp_path}' has no absent{suffix}$"):
        open_all(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path, suffix, make):
    make(tmp_path / f"a{suffix}")
    assert refusal(tmp_path / f"a{suffix}").endswith("cannot be read: it is no plain file")


def test_other_suffix_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"}.")
    assert "is no file of tensors, expected .safetensors, .bin" in refusal(tmp_path / "a.pkl")


def parts_refusal(path, name="model"):
    """Read the parts of a file that must be refused; return the line, which names the file."""
    with pytest.raises(CheckpointError) as raised:
        read_parts(path, name)
    line = str(raised.value)
    assert line.startswith(f"'{path}'")
    assert line.isprintable(), line
    assert len(line) < len(str(path)) + 400
    return line


SETTINGS = {
    "cfg": {"layers": 3, "rate": 0.5, "name": "gelu", "deep": True, "rest": [None, (1, "a"), []]},
    "label_dict": {0: "/m/09x0r", 1: "/m/05zppz"},
    "ordered": OrderedDict(b=1, a=2),
    "step": -7,
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_settings_beside_tensors_are_read(tmp_path, is_zip):
    path, content = tmp_path / "a.pt", public_tensors()
    torch.save(SETTINGS | {"model": content}, path, _use_new_zipfile_serialization=is_zip)
    settings, tensors = read_parts(path, "model")
    assert settings == SETTINGS
    assert type(settings["ordered"]) is dict
    assert type(settings["cfg"]["rest"][1]) is tuple
    assert_same(tensors, content)
    # which changes nothing for who asks for tensors alone
    assert "holds a dict as 'cfg', expected only tensors" in refusal(path)


def test_file_with_settings_of_the_reference_is_read_as_with_torch():
    path = golden_audio("BEATs_small.pt")
    expected = torch.load(path, map_location="cpu", weights_only=True)
    settings, tensors = read_parts(path, "model")
    assert settings == {key: expected[key] for key in ("cfg", "label_dict")}
    assert_same(tensors, expected["model"])


@WRAPPERS
@HOSTILE
@pytest.mark.parametrize("checks_calls", [True, False], ids=["whole", "loader_alone"])
def test_hostile_pickle_is_refused_and_never_runs_for_its_parts(
    marker, tmp_path, monkeypatch, wrap, name, checks_calls
):
    if not checks_calls:
        monkeypatch.setattr(tensors_module, "_check_calls", lambda path, program: None)
    wrap(tmp_path / "a.pt", corpus(marker)[name])
    parts_refusal(tmp_path / "a.pt")
    assert not marker.exists()


@HOSTILE
@pytest.mark.parametrize("checks_calls", [True, False], ids=["whole", "loader_alone"])
def test_hostile_setting_is_refused_and_never_runs(
    marker, tmp_path, monkeypatch, name, checks_calls
):
    if not checks_calls:
        monkeypatch.setattr(tensors_module, "_check_calls", lambda path, program: None)
    program = corpus(marker)[name]
    hostile = program.removeprefix(b"\x80\x02").removesuffix(b".")
    write_zip(
        tmp_path / "a.pt", b"\x80\x02}(" + text("model") + b"}" + text("cfg") + hostile + b"u."
    )
    parts_refusal(tmp_path / "a.pt")
    assert not marker.exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.ones(2), "holds a Tensor among its settings"),
        (torch.nn.Parameter(torch.ones(2)), "holds a Parameter among its settings"),
        (torch.eye(3).to_sparse(), "holds a tensor of another kind"),
        (torch.float16, "holds a dtype among its settings"),
        (torch.FloatStorage, "among its settings"),
        (np.float64(1.5), "multiarray.scalar"),
        (b"bytes", "_codecs.encode"),
        ({1, 2}, "set"),
        (Path("a"), "pathlib.PosixPath"),
        (2**63, "holds a number beyond 64 bits among its settings"),
        (-(10**600), "holds a number beyond 64 bits among its settings"),
        ({(1, 2): 3}, "holds a tuple among its settings"),
    ],
    ids=[
        "tensor",
        "parameter",
        "sparse",
        "dtype",
        "storage",
        "numpy",
        "bytes",
        "set",
        "path",
        "wide",
        "long",
        "tuple_as_name",
    ],
)
def test_setting_that_is_no_text_or_number_is_refused(tmp_path, value, found, inside, is_zip):
    content = {"model": {"a": torch.ones(2)}, "cfg": {"a": [0, value]} if inside else value}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    assert found in parts_refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["sparse", "csr", "meta", "quantized", "complex", "bool"])
def test_tensor_of_another_kind_is_refused_among_parts(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"model": {"a": other_tensor(kind)}, "cfg": {}}, tmp_path / "a.pt")
    assert "expected dense floats or integers" in parts_refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_tensor_larger_than_its_bytes_is_refused_among_parts(tmp_path, is_zip):
    content = {"model": {"a": Rebuilt((10**12,), (0,))}, "cfg": {}}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    assert "bytes of it are stored" in parts_refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ([1, 2], "holds a list, expected a dict with 'model'"),
        ({}, "holds no 'model', expected a dict of tensors of that name"),
        ({"model": None}, "holds a NoneType, expected a dict of tensors"),
        ({"model": [1]}, "holds a list, expected a dict of tensors"),
        ({"model": {"a": 1}}, "holds a int as 'a', expected only tensors"),
        ({"model": {1: 1}}, "holds a name of type int, expected text"),
        ({"model": {}, 1: 1}, "holds a name of type int, expected text"),
        ({"model": {"model": {}}}, "holds a dict as 'model', expected only tensors"),
    ],
    ids=["list", "absent", "none", "list_inside", "number", "name", "outer_name", "deeper"],
)
@WRAPPERS
def test_parts_of_another_shape_are_refused(tmp_path, content, wanted, wrap):
    wrap(tmp_path / "a.pt", pickle.dumps(content, 2))
    # without a wrapper there is no content, only a first number that is not PyTorch's
    assert wrap is write_bare or wanted in parts_refusal(tmp_path / "a.pt")
    parts_refusal(tmp_path / "a.pt")


def holding_itself():
    endless = []
    endless.append({"again": endless})
    return endless


def doubled(times):
    value = [1]
    for _ in range(times):
        value = [value, value]
    return value


def deep(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("wrap", [write_zip, write_old], ids=["zip", "old"])
@pytest.mark.parametrize(
    "value",
    [holding_itself(), doubled(18), doubled(60), deep(21), deep(200), list(range(10**5))],
    ids=["itself", "doubled", "doubled_often", "deep", "very_deep", "long"],
)
def test_settings_without_end_are_refused(tmp_path, value, wrap):
    wrap(tmp_path / "a.pt", pickle.dumps({"model": {}, "cfg": value}, 2))
    parts_refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("wrap", [write_zip, write_old], ids=["zip", "old"])
def test_settings_of_a_moderate_size_are_read(tmp_path, wrap):
    cfg = [deep(15), doubled(10), {i: f"/m/{i}" for i in range(10**4)}]
    wrap(tmp_path / "a.pt", pickle.dumps({"model": {}, "cfg": cfg}, 2))
    assert read_parts(tmp_path / "a.pt", "model") == ({"cfg": cfg}, {})


def test_settings_are_a_copy(tmp_path):
    # two names for one list in the file are two lists of the reader's own
    shared = [1]
    torch.save({"model": {}, "a": shared, "b": shared}, tmp_path / "a.pt")
    settings, _ = read_parts(tmp_path / "a.pt", "model")
    settings["a"].append(2)
    assert settings["b"] == [1]


@pytest.mark.parametrize("attribute", ["items", "pop", "__iter__", "__class__", "__contains__"])
def test_attributes_of_the_dict_hide_no_setting(tmp_path, attribute):
    ordered = b"ccollections\nOrderedDict\n)R}" + text(attribute) + b"Nsb"
    inside = ordered + text("a") + b"ctorch\nfloat16\ns"
    program = ordered + b"(" + text("model") + b"}" + text("cfg") + inside + b"u."
    write_zip(tmp_path / "a.pt", program)
    assert "holds a dtype among its settings" in parts_refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_truncated_parts_are_refused(tmp_path, part, is_zip):
    path = tmp_path / "a.pt"
    torch.save(
        {"model": {"a": torch.ones(7, 100)}, "cfg": {"b": 1}},
        path,
        _use_new_zipfile_serialization=is_zip,
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert f"'{path}' is not a whole PyTorch file: " in parts_refusal(path)


def test_damaged_parts_are_read_or_refused(tmp_path):
    # any other exception fails the test
    path = tmp_path / "a.pt"
    torch.save({"model": {"a": torch.ones(1)}, "cfg": {"b": [1, (2.5, "c")]}, "d": {0: "e"}}, path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_parts(path, "model")
        except CheckpointError as error:
            refused.append(str(error))
    assert refused
    assert all(line.isprintable() for line in refused)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_parts_of_what_is_no_plain_file_are_refused_at_once(tmp_path, make):
    make(tmp_path / "a.pt")
    assert parts_refusal(tmp_path / "a.pt").endswith("cannot be read: it is no plain file")
    with pytest.raises(CheckpointError, match="has no absent"):
        read_parts(tmp_path / "absent.pt", "model")
