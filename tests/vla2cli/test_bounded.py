"""A bounded folder: the least recently used go first, whatever other processes do or leave."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest

from vla2cli.bounded import ENDING, LOCK, OLD_PART_S, PART, TOTAL, BoundedFolder
from vla2cli.errors import UsageError

# arguments: the folder, its bound, the number of keys, bytes of an entry, seconds
WORKER = """
import random, sys, time
from pathlib import Path
from tests.vla2cli.test_bounded import content, key
from vla2cli.bounded import BoundedFolder
root, max_bytes, num_keys, size, seconds = Path(sys.argv[1]), *map(int, sys.argv[2:])
folder = BoundedFolder(root, max_bytes, sys.exit)
print("ready", flush=True)
end, found = time.monotonic() + seconds, 0
while time.monotonic() < end:
    name = key(random.randrange(num_keys))
    data = folder.read(name)
    if data is None:
        folder.write(name, content(name, size))
    else:
        assert data == content(name, size), "not what was written"
        found += 1
    if random.random() < 0.02:
        folder.remove(name)
print(found)
"""


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def content(name, size):
    """Bytes that only an entry of this key has."""
    return random.Random(name).randbytes(size)


def silence(message):
    pytest.fail(message)


def start(*arguments):
    command = [sys.executable, "-c", WORKER, *map(str, arguments)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    return started


def sizes(root):
    """Bytes of each entry, by its key, the least recently used first; parts are not whole."""
    states = [(path.stat(), path.name) for path in root.glob(f"??/*{ENDING}")]
    states.sort(key=lambda found: found[0].st_mtime_ns)
    return {name.removesuffix(ENDING): state.st_size for state, name in states}


def num_bytes(root):
    """Bytes of all there is, parts as well, while others write."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name not in (LOCK, TOTAL):
                try:
                    total += Path(folder, name).stat().st_size
                except FileNotFoundError:
                    continue
    return total


def test_least_recently_used_goes_first(tmp_path):
    folder = BoundedFolder(tmp_path, 300, silence)
    for number in (1, 2, 3):
        folder.write(key(number), bytes(100))
    assert folder.read(key(1)) == bytes(100)
    folder.write(key(4), bytes(100))
    assert list(sizes(tmp_path)) == [key(3), key(1), key(4)]
    folder.write(key(5), bytes(200))
    assert list(sizes(tmp_path)) == [key(4), key(5)]


def test_any_order_of_uses_keeps_what_a_plain_list_would(tmp_path):
    # two processes' views of one folder take turns; one of them is now and then opened anew
    draw, max_bytes, expected = random.Random(1), 1000, OrderedDict()
    views = [BoundedFolder(tmp_path, max_bytes, silence) for _ in range(2)]
    for step in range(600):
        view, name = draw.randrange(2), key(draw.randrange(30))
        if step % 50 == 49:
            views[view] = BoundedFolder(tmp_path, max_bytes, silence)
        data = views[view].read(name)
        assert (data is not None) is (name in expected)
        if data is not None:
            expected.move_to_end(name)
            continue
        size = draw.choice([0, 1, 7, 100, 333])
        while sum(expected.values()) + size > max_bytes:
            expected.popitem(last=False)
        expected[name] = size
        views[view].write(name, bytes(size))
        assert sizes(tmp_path) == expected
        assert list(sizes(tmp_path)) == list(expected)


def test_entry_above_the_bound_is_not_kept_and_costs_no_other(tmp_path):
    folder = BoundedFolder(tmp_path, 100, silence)
    folder.write(key(1), bytes(100))
    folder.write(key(2), bytes(101))
    assert sizes(tmp_path) == {key(1): 100}


def test_smaller_bound_takes_effect_when_opened(tmp_path):
    folder = BoundedFolder(tmp_path, 1000, silence)
    for number in range(10):
        folder.write(key(number), bytes(100))
    BoundedFolder(tmp_path, 350, silence)
    assert list(sizes(tmp_path)) == [key(7), key(8), key(9)]


@pytest.mark.parametrize("total", [None, b"", b"0", b"1000000", b"-", b"\xff" * 5000])
def test_wrong_total_is_mended_when_opened(tmp_path, total):
    folder = BoundedFolder(tmp_path, 300, silence)
    for number in (1, 2, 3):
        folder.write(key(number), bytes(100))
    if total is None:
        (tmp_path / TOTAL).unlink()
    else:
        (tmp_path / TOTAL).write_bytes(total)
    folder = BoundedFolder(tmp_path, 300, silence)
    folder.write(key(4), bytes(100))
    assert list(sizes(tmp_path)) == [key(2), key(3), key(4)]


def test_files_of_others_are_neither_counted_nor_removed(tmp_path):
    name = key(1)
    others = [
        *("1.mp4", f"{name}{ENDING}", "ab/notes.txt", f"abc/{name}{ENDING}", "ff/holiday.part"),
        *(f"{name[:2]}/{name.upper()}{ENDING}", f"{name[:2]}/{name}.mp4", f"00/{name}{ENDING}"),
    ]
    assert not name.startswith("00")
    for other in others:
        path = tmp_path / other
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (0, 0))
    folder = BoundedFolder(tmp_path, 100, silence)
    for number in (1, 2):
        folder.write(key(number), bytes(100))
    assert all((tmp_path / other).exists() for other in others)
    assert folder.read(key(1)) is None
    assert folder.read(key(2)) == bytes(100)


def test_part_of_a_killed_process_is_removed_when_old(tmp_path):
    BoundedFolder(tmp_path, 1000, silence).write(key(1), bytes(100))
    (entry,) = tmp_path.glob(f"??/*{ENDING}")
    old, young = (entry.with_name(f"{digit * 64}{ENDING}{PART}") for digit in "ab")
    for part, age_s in ((old, OLD_PART_S + 60), (young, 60)):
        part = part.with_name(entry.name[:2] + part.name[2:])
        part.write_bytes(bytes(50))
        os.utime(part, (time.time() - age_s,) * 2)
    BoundedFolder(tmp_path, 1000, silence)
    (left,) = tmp_path.glob(f"??/*{PART}")
    assert left.name[2] == "b"
    assert (tmp_path / TOTAL).read_text() == "150"


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_file_in_place_of_the_folder_is_refused(tmp_path, inside):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UsageError, match=r"^(folder )?'.*cache.*'"):
        BoundedFolder(tmp_path / "cache" / inside, 100, silence)


def test_folder_that_cannot_be_written_is_read_and_says_so_once(tmp_path):
    BoundedFolder(tmp_path, 1000, silence).write(key(1), bytes(100))
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    said = []
    folder = BoundedFolder(tmp_path, 1000, said.append)
    for number in (1, 2, 3):
        folder.write(key(number), bytes(100))
    assert folder.read(key(1)) == bytes(100)
    assert sizes(tmp_path) == {key(1): 100}
    (line,) = said
    assert line == f"vla2: '{tmp_path}' cannot be written: is a directory; nothing more is kept"


def test_full_disk_ends_the_writing_and_leaves_no_part(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from tests.vla2cli.test_bounded import key
from vla2cli.bounded import BoundedFolder
folder = BoundedFolder(Path(sys.argv[1]), 10**6, print)
folder.write(key(1), bytes(500))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for number in (2, 3):
    folder.write(key(number), bytes(5000))
assert folder.read(key(1)) == bytes(500)
"""
    command = [sys.executable, "-c", code, tmp_path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"vla2: '{tmp_path}' cannot be written: file too large; nothing more is kept\n"
    assert sizes(tmp_path) == {key(1): 500}
    assert not list(tmp_path.glob(f"??/*{PART}"))


def test_folder_that_is_removed_meanwhile_is_made_again(tmp_path):
    root = tmp_path / "cache"
    folder = BoundedFolder(root, 300, silence)
    folder.write(key(1), bytes(100))
    root.rename(tmp_path / "gone")
    assert folder.read(key(1)) is None
    folder.write(key(2), bytes(100))
    assert sizes(root) == {key(2): 100}


@pytest.mark.parametrize("make", ["folder", "dangling link"])
def test_what_is_no_file_in_an_entrys_place_is_nothing(tmp_path, make):
    folder = BoundedFolder(tmp_path, 300, silence)
    place = tmp_path / key(1)[:2] / f"{key(1)}{ENDING}"
    place.parent.mkdir()
    place.mkdir() if make == "folder" else place.symlink_to("nothing")
    assert folder.read(key(1)) is None
    folder.write(key(1), bytes(100))
    assert folder.read(key(1)) == (None if make == "folder" else bytes(100))


def test_processes_share_a_folder_that_never_holds_more_than_its_bound(tmp_path):
    size, max_bytes = 20_000, 100_000
    workers = [start(tmp_path, max_bytes, 12, size, 3) for _ in range(4)]
    most = 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, num_bytes(tmp_path))
        BoundedFolder(tmp_path, max_bytes, silence)
    # a walk that takes a while may see an entry and that which took its place
    assert max_bytes // 2 < most <= max_bytes + 2 * size
    found = [worker.communicate()[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    assert all(int(hits) > 10 for hits in found)
    assert sum(sizes(tmp_path).values()) <= max_bytes
    assert not list(tmp_path.glob(f"??/*{PART}"))


def test_kill_leaves_nothing_that_is_taken_for_whole(tmp_path):
    size, max_bytes, draw = 2_000_000, 9_000_000, random.Random(2)
    for _ in range(8):
        worker = start(tmp_path, max_bytes, 12, size, 60)
        time.sleep(draw.uniform(0.0, 0.1))
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        assert num_bytes(tmp_path) <= max_bytes
        assert sum(sizes(tmp_path).values()) <= int((tmp_path / TOTAL).read_bytes() or max_bytes)
        folder = BoundedFolder(tmp_path, max_bytes, silence)
        for name in sizes(tmp_path):
            assert folder.read(name) == content(name, size)
