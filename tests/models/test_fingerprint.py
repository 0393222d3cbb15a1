import hashlib
import json
import os

import pytest

from vla2_models.fingerprint import default_cache, hash_files, hash_weights, is_remembered


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"first")
    (folder / "b.safetensors").write_bytes(b"second")
    return [folder / "a.safetensors", folder / "b.safetensors"]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "weights.json"


def change_unnoticed(path, content):
    """Change a file's bytes but neither its size nor its time."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_hash_covers_names_and_contents(files, cache):
    # written down from the description: name, NUL, SHA-256 of the content, NUL; by name
    total = hashlib.sha256()
    for name, content in (("a.safetensors", b"first"), ("b.safetensors", b"second")):
        total.update(name.encode() + b"\0" + hashlib.sha256(content).hexdigest().encode() + b"\0")
    assert hash_weights(files, cache) == total.hexdigest()


def test_each_file_is_hashed_by_itself(files, cache):
    expected = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert hash_files(files, cache) == expected
    assert is_remembered(files, cache)
    change_unnoticed(files[0], b"FIRST")
    assert hash_files(files, cache) == expected


def test_order_and_folder_do_not_matter(files, cache, tmp_path):
    first = hash_weights(files, cache)
    assert hash_weights(reversed(files), cache) == first
    files[0].parent.rename(tmp_path / "moved")
    assert hash_weights([tmp_path / "moved" / path.name for path in files], cache) == first


def test_other_content_gives_another_hash(files, cache):
    first = hash_weights(files, cache)
    files[0].write_bytes(b"fir5t, longer")
    assert hash_weights(files, cache) != first


def test_other_name_gives_another_hash(files, cache):
    first = hash_weights(files, cache)
    renamed = files[0].rename(files[0].with_name("c.safetensors"))
    assert hash_weights([renamed, files[1]], cache) != first


def test_contents_that_change_places_give_another_hash(files, cache):
    first = hash_weights(files, cache)
    files[0].write_bytes(b"second")
    files[1].write_bytes(b"first")
    assert hash_weights(files, cache) != first


def test_one_file_less_gives_another_hash(files, cache):
    assert hash_weights(files, cache) != hash_weights(files[:1], cache)


def test_unchanged_file_is_not_read_again(files, cache):
    first = hash_weights(files, cache)
    change_unnoticed(files[0], b"other")
    assert hash_weights(files, cache) == first
    assert is_remembered(files, cache)
    cache.unlink()
    assert not is_remembered(files, cache)
    assert hash_weights(files, cache) != first


@pytest.mark.parametrize("shift_ns", [1, -1_000_000_000])
def test_touched_file_is_read_again(files, cache, shift_ns):
    first = hash_weights(files, cache)
    stat = files[0].stat()
    files[0].write_bytes(b"other")
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + shift_ns))
    assert hash_weights(files, cache) != first


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"x": 1}', b"ITSELF"],
    ids=["empty", "cut", "list", "null", "binary", "foreign", "wrong_entries"],
)
def test_corrupt_cache_is_harmless(files, cache, content):
    first = hash_weights(files, cache)
    if content == b"ITSELF":
        content = json.dumps(dict.fromkeys(json.loads(cache.read_text()), "odd")).encode()
    cache.write_bytes(content)
    assert hash_weights(files, cache) == first
    assert len(json.loads(cache.read_text())) >= 2


@pytest.mark.parametrize("entry", [7, True, None, [], [5], [5, 6], {}], ids=repr)
def test_odd_entry_in_the_cache_is_harmless(files, cache, entry):
    first = hash_weights(files, cache)
    cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), entry)))
    assert hash_weights(files, cache) == first


def test_cache_that_cannot_be_written_is_harmless(files, tmp_path):
    (tmp_path / "file").write_text("no folder")
    cache = tmp_path / "file" / "weights.json"
    assert hash_weights(files, cache) == hash_weights(files, cache)


def test_cache_leaves_no_other_file_behind(files, cache):
    hash_weights(files, cache)
    assert [path.name for path in cache.parent.iterdir()] == ["weights.json"]


def test_cache_lies_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg/vla2/weights.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home/.cache/vla2/weights.json"
