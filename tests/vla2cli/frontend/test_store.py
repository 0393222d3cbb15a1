"""Exports that are kept: which one a checkpoint finds, what is noticed, and what is removed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.exports import CPU, tiny_export
from tests.tiny import change_json, open_tiny, tiny_av_engine, write_tiny
from vla2_models.config import NOT_OURS
from vla2_models.miniature import MODEL_ID
from vla2cli.errors import FrontendError
from vla2cli.frontend import manifest, origin
from vla2cli.frontend.cache import cached_export, find_export, open_frontend
from vla2cli.frontend.manifest import MANIFEST, Manifest
from vla2cli.frontend.onnx import OnnxFrontend
from vla2cli.frontend.origin import origin_of
from vla2cli.frontend.store import cache_root, clean_exports, find_problem, list_exports
from vla2cli.lock import locked

UNFINISHED = ".unfinished-fp32-" + "0" * 32 + "-abc"


def silence(line):
    pass


def find():
    return find_export(tiny_av_engine().checkpoint, "fp32", silence)


def change_byte(path):
    """Change one byte of a file and not its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/vla2/frontends"


@pytest.fixture
def kept(root):
    """A cache with the tiny checkpoint's export; its folder there."""
    key = Manifest.read(tiny_export()).origin.key
    return shutil.copytree(tiny_export(), root / f"fp32-{key[:32]}")


def test_export_is_found_by_what_it_is_of(kept, root):
    assert cache_root() == root
    assert find() == kept
    assert find_export(tiny_av_engine().checkpoint, "int8", silence) is None


def test_designs_with_the_same_tensors_share_no_export(tmp_path):
    # nor do towers that differ in the layer selected, or in what happens inside
    weights, keys = set(), set()
    folder = write_tiny(tmp_path / "hub")
    tower = folder.parents[1] / "openai/clip-vit-miniature-patch14-56/config.json"
    for path, changes in (
        (folder / "config.json", {}),
        (folder / "config.json", {"mm_projector_type": "stc_connector_v35"}),
        (folder / "config.json", {"mm_vision_select_layer": -1}),
        (tower, {"hidden_act": "gelu"}),
        (tower, {"layer_norm_eps": 1e-6}),
        (tower, {"num_attention_heads": 2}),
    ):
        change_json(path, **changes)
        found = origin_of(open_tiny(folder), "fp32", silence)
        weights.add(found.sha256)
        keys.add(found.key)
    assert (len(weights), len(keys)) == (1, 6)


def test_key_covers_weights_precision_format_and_versions(tmp_path, monkeypatch):
    checkpoint = tiny_av_engine().checkpoint
    keys = {origin_of(checkpoint, p, silence).key for p in manifest.PRECISIONS}
    keys.add(origin_of(open_tiny(write_tiny(tmp_path, seed=1)), "fp32", silence).key)
    monkeypatch.setattr(origin, "FORMAT", manifest.FORMAT + 1)
    keys.add(origin_of(checkpoint, "fp32", silence).key)
    for name in manifest.versions():
        others = manifest.versions() | {name: "0.0"}
        monkeypatch.setattr(origin, "versions", lambda others=others: others)
        keys.add(origin_of(checkpoint, "fp32", silence).key)
    assert len(keys) == 3 + 1 + 1 + 7


def test_key_does_not_depend_on_the_folder_or_on_how_the_model_is_run(tmp_path):
    checkpoint = tiny_av_engine().checkpoint
    moved = shutil.copytree(checkpoint.folder.parents[1], tmp_path / "moved")
    folder = moved / checkpoint.folder.relative_to(checkpoint.folder.parents[1])
    key = origin_of(checkpoint, "fp32", silence).key
    assert origin_of(open_tiny(folder), "fp32", silence).key == key
    vision = type(checkpoint.config.vision)(**checkpoint.config.vision.to_dict())
    vision._attn_implementation = "eager"
    assert "_attn_implementation" in NOT_OURS
    other = replace(checkpoint, config=replace(checkpoint.config, vision=vision))
    assert origin_of(other, "fp32", silence).key == key


def truncate(folder):
    path = folder / "connector.onnx.data"
    os.truncate(path, path.stat().st_size // 2)


def exchange(folder):
    shutil.copyfile(folder / "connector.onnx", folder / "tower.onnx")


def edit_manifest(folder, **changes):
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) | changes
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")


def take_manifest_of_another(folder):
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit_manifest(folder, origin=content["origin"] | {"key": "0" * 64})


DAMAGES = {
    "truncated": (truncate, r"'.*connector.onnx.data' has [\d,]+ bytes of [\d,]+"),
    "changed": (
        lambda folder: change_byte(folder / "tower.onnx.data"),
        r"'.*tower.onnx.data' holds something else than was exported",
    ),
    "foreign": (exchange, r"'.*tower.onnx' (has [\d,]+ bytes|holds something else)"),
    "missing": (lambda folder: (folder / "sound.onnx").unlink(), r"'.*sound.onnx' is missing"),
    "of-another": (take_manifest_of_another, r"'.*manifest.json' is of another export"),
    "no-manifest": (lambda folder: (folder / MANIFEST).unlink(), r"is not the manifest of an"),
    "no-json": (
        lambda folder: (folder / MANIFEST).write_text("[1]"),
        r"manifest.json' is not the manifest of an export",
    ),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"graphs": {}},
        {"files": {}},
        {"files": {"../../x": [1, "a"]}},
        {"files": {"tower.onnx": ["a", "b"]}},
        {"frame_bytes": "x"},
        {"versions": 5},
    ],
    ids=str,
)
def test_manifest_that_no_export_of_ours_has_is_damage_to_list_and_clean(kept, changes):
    edit_manifest(kept, **changes)
    [entry] = list_exports(silence)
    assert "is not the manifest of an export" in entry.problem
    assert [found.folder for found in clean_exports(silence)] == [kept]


@pytest.mark.parametrize(("damage", "line"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_and_said_why(kept, damage, line):
    key = Manifest.read(kept).origin.key
    assert find() == kept  # from here on its hashes are remembered
    damage(kept)
    assert re.search(line, find_problem(kept, key, silence))
    assert find() is None


def test_damaged_export_is_made_anew_with_one_line_that_says_so(tmp_path, root):
    checkpoint, said = open_tiny(write_tiny(tmp_path / "hub", mm_projector_type="linear")), []
    frontend = open_frontend(checkpoint, "fp32", CPU, torch.float32, said.append)
    assert not [line for line in said if "anew" in line]
    (folder,) = root.glob("fp32-*[0-9a-f]")
    before = (folder / "tower.onnx").stat().st_ino
    said.clear()
    truncate(folder)
    with cached_export(checkpoint, "fp32", said.append) as again:
        assert again == folder
    assert [line for line in said if "anew" in line] == [said[0]]
    assert re.fullmatch(r"'.*connector.onnx.data' has .* bytes of .*; exporting anew", said[0])
    assert (folder / "tower.onnx").stat().st_ino != before
    # whoever has it open is not harmed
    frames = torch.zeros(2, 3, 56, 56)
    again = OnnxFrontend(folder, CPU, torch.float32)
    assert again.vision_features([frames])[0].equal(frontend.vision_features([frames])[0])
    assert sorted(path.name for path in root.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_files_are_hashed_again_only_when_they_look_changed(kept):
    assert find() == kept
    path = kept / "tower.onnx.data"
    stat = path.stat()
    change_byte(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert find() == kept  # nobody has read it
    path.touch()
    assert find() is None


def test_export_in_a_cache_that_cannot_be_written_is_used(kept, root):
    root.chmod(0o500)
    try:
        with cached_export(tiny_av_engine().checkpoint, "fp32", silence) as folder:
            assert folder == kept
    finally:
        root.chmod(0o700)


@pytest.mark.parametrize("place", ["/dev/null", "relative/cache"])
def test_cache_that_cannot_be_written_is_one_clear_line(monkeypatch, place):
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    with (
        pytest.raises(FrontendError, match=r"cannot be kept in '.*': .*; set XDG_CACHE_HOME to"),
        cached_export(tiny_av_engine().checkpoint, "fp32", silence),
    ):
        pass
    assert not Path("relative").exists()


def test_clean_removes_what_cannot_be_used_and_leaves_the_rest(kept, root):
    old = shutil.copytree(kept, kept.with_name(f"int8-{'1' * 32}"))
    change_json(old / MANIFEST, versions=manifest.versions() | {"torch": "1.13.1"})
    damaged = shutil.copytree(kept, kept.with_name(f"fp16-{'2' * 32}"))
    truncate(damaged)
    unfinished = root / UNFINISHED
    (unfinished / "inner").mkdir(parents=True)
    (unfinished / "inner/tower.onnx").write_bytes(b"x" * 1000)
    (root / "of-somebody-else").mkdir()
    why = {entry.folder: entry.problem for entry in list_exports(silence)}
    here = manifest.versions()["torch"]
    assert why.keys() == {kept, old, damaged, unfinished}
    assert why[kept] is None
    assert why[old] == f"made with torch 1.13.1, here is {here}"
    assert why[unfinished] == "unfinished"
    assert "connector.onnx.data' has" in why[damaged]
    removed = {entry.folder: entry.size_bytes for entry in clean_exports(silence)}
    assert removed.keys() == {old, damaged, unfinished}
    assert removed[unfinished] == 1000
    assert {path.name for path in root.iterdir() if path.is_dir()} == {
        kept.name,
        "of-somebody-else",
    }
    assert find() == kept
    assert [entry.folder for entry in clean_exports(silence, everything=True)] == [kept]
    assert [path.name for path in root.iterdir()] == ["of-somebody-else"]


def test_clean_leaves_what_is_in_use_and_says_so(kept, root):
    said = []
    with cached_export(tiny_av_engine().checkpoint, "fp32", silence):
        assert clean_exports(said.append, everything=True) == []
    assert said == [f"'{kept}' is in use; it stays"]
    assert kept.exists()


def test_clean_of_no_cache_removes_nothing(root):
    assert clean_exports(silence) == list_exports(silence) == []
    assert not root.exists()


def test_lock_is_shared_by_readers_and_refused_to_a_writer(tmp_path):
    path = tmp_path / "x.lock"
    with (
        locked(path, is_shared=True),
        locked(path, is_shared=True),
        pytest.raises(BlockingIOError),
        locked(path),
    ):
        pass
    with locked(path), pytest.raises(BlockingIOError), locked(path, is_shared=True):
        pass
    with locked(path):
        pass


def test_who_waits_says_so_once_and_notices_a_lock_that_was_removed(tmp_path):
    path, said = tmp_path / "x.lock", []
    first = ExitStack()
    first.enter_context(locked(path))

    def wait():
        said.append("waiting")
        path.unlink()
        first.close()

    with locked(path, on_wait=wait), pytest.raises(BlockingIOError), locked(path):
        pass
    assert said == ["waiting"]


def test_waiting_exporter_uses_what_the_other_has_made(root, tmp_path):
    # two real processes, started together
    hub = tmp_path / "hub"
    write_tiny(hub, mm_projector_type="linear")
    command = [sys.executable, "-m", "vla2cli", "export", MODEL_ID, "--hub-dir", str(hub)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    one, other = (json.loads(out) for out, _ in results)
    assert one == other
    assert one["usable"]
    said = "".join(err for _, err in results)
    assert said.count("exporting tower.onnx …") == 1
    assert said.count("waiting for another process") <= 1  # or it came when all was done
    assert sorted(p.suffix for p in root.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_export_that_is_ended_leaves_nothing(signum, root, tmp_path):
    hub = tmp_path / "hub"
    write_tiny(hub, mm_projector_type="linear")
    command = [sys.executable, "-m", "vla2cli", "export", MODEL_ID, "--hub-dir", str(hub)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while "exporting tower.onnx" not in said:  # the rest takes seconds
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signum)
        said = process.stderr.read()
    assert process.returncode == 128 + signum
    assert said == f"vla2: ended by {signum.name}; nothing was written\n"
    assert [path.suffix for path in root.iterdir()] == [".lock"]


def test_what_a_killed_exporter_left_goes_with_the_next_export(root, tmp_path):
    checkpoint = open_tiny(write_tiny(tmp_path / "hub", mm_projector_type="linear"))
    key = origin_of(checkpoint, "fp32", silence).key
    left = root / f"{UNFINISHED[: -len('-abc') - 32]}{key[:32]}-abc"
    left.mkdir(parents=True)
    with cached_export(checkpoint, "fp32", silence):
        assert not left.exists()
