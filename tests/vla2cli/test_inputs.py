"""Work items: which files count, what they are called, what is said when there are none."""

import io
import os
import string
import subprocess
from pathlib import Path

import pytest

from vla2cli.errors import NoInputError, UsageError
from vla2cli.inputs import Found, Note, encode_name, find_items, kind_of

VIDEO = "mp4 MKV webm avi mov ts m2ts mts mpg mpeg wmv flv 3gp ogv gif m4v vob Mp4"
IMAGE = "jpg JPEG png bmp webp tiff tif"
AUDIO = "wav mp3 flac ogg opus m4a aac"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str | bytes) -> None:
    for name in names:
        path = Path(os.fsdecode(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def remove_deep(folder: str) -> None:
    # shutil.rmtree, with which pytest would clean up, is recursive
    subprocess.run(["rm", "-r", folder], check=True)


def ids(found: Found) -> list[str]:
    return [item.id for item in found.items]


def listed(data: bytes, *more: str) -> Found:
    return find_items(["-", *more], stdin=io.BytesIO(data))


# which files


def test_folder_is_searched_to_any_depth_and_sorted_by_bytes() -> None:
    touch("v/b.mp4", "v/a/z.mp4", "v/a/é.mp4", "v/B.mp4", "v/a/deep/er/1.jpg", "v/a.mp4")
    # in ASCII: capitals, then '.' before '/', then letters; é is two bytes above them all
    want = ["B.mp4", "a.mp4", "a/deep/er/1.jpg", "a/z.mp4", "a/é.mp4", "b.mp4"]
    assert ids(find_items(["v"])) == want


def test_hidden_files_and_folders_are_passed_over() -> None:
    touch("v/1.mp4", "v/.2.mp4", "v/.cache/3.mp4", "v/.mp4")
    found = find_items(["v"])
    assert ids(found) == ["1.mp4"]
    assert found.notes[0].looked_at == 1


def test_hidden_folder_named_by_the_user_is_searched() -> None:
    touch(".v/1.mp4")
    assert ids(find_items([".v"])) == ["1.mp4"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((f"a.{ext}", "video") for ext in VIDEO.split()),
        *((f"a.{ext}", "image") for ext in IMAGE.split()),
        *((f"a.{ext}", "audio") for ext in AUDIO.split()),
        *((name, "unknown") for name in ("a.txt", "mp4", "v.mp4/a", "a.", "a.mp4.part")),
    ],
)
def test_extension_tells_the_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_note_counts_what_was_met_under_a_root() -> None:
    touch(*(f"v/{i}.mp4" for i in range(7)), "v/a.jpg", "v/b.png", "v/c.wav", "v/x.txt", "v/y")
    note = Note("v/", 7, 2, 1, unknown=0, others=2, skipped=0, unreadable=())
    assert find_items(["v/"]).notes == (note,)


@pytest.mark.parametrize(
    ("modality", "kept", "skipped"),
    [
        ("auto", ["a.mp4", "b.jpg", "c.wav", "d.data"], 0),
        ("video", ["a.mp4", "d.data"], 2),
        ("av", ["a.mp4", "d.data"], 2),
        ("image", ["b.jpg", "d.data"], 2),
        ("audio", ["c.wav", "d.data"], 2),
    ],
)
def test_modality_keeps_its_kind_and_named_unknowns(
    modality: str, kept: list[str], skipped: int
) -> None:
    touch("v/a.mp4", "v/b.jpg", "v/c.wav", "v/d.data", "v/e.data")
    found = find_items(["v", "v/d.data"], modality=modality)
    assert ids(found) == kept
    assert found.notes[0].skipped == skipped


def test_unknown_modality_is_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="smell"):
        find_items(["."], modality="smell")


def test_pipe_with_a_media_name_stays_an_item() -> None:
    touch("v/1.mp4")
    os.mkfifo("v/2.mp4")
    Path("v/3.mp4").symlink_to("nowhere")
    assert ids(find_items(["v"])) == ["1.mp4", "2.mp4", "3.mp4"]


def test_links_to_folders_are_followed_and_loops_cut() -> None:
    touch("v/1.mp4", "other/2.mp4")
    Path("v/more").symlink_to("../other")
    Path("v/self").symlink_to(".")
    Path("v/a").mkdir()
    Path("v/a/up").symlink_to("../..")
    Path("other/back").symlink_to("../v")
    Path("v/circle").symlink_to("circle")
    # v/a/up is the folder above: `other` is met again there, `v` is not
    want = ["1.mp4", "a/up/other/2.mp4", "more/2.mp4"]
    assert ids(find_items(["v"])) == want


def test_closed_folder_is_noted_and_the_rest_goes_on() -> None:
    touch("v/1.mp4", "v/closed/2.mp4")
    Path("v/closed").chmod(0)
    if os.access("v/closed", os.R_OK):
        pytest.skip("this user reads every folder")
    found = find_items(["v"])
    Path("v/closed").chmod(0o700)
    assert ids(found) == ["1.mp4"]
    assert found.notes[0].unreadable == ("'v/closed': permission denied",)


def test_folder_deeper_than_the_systems_limit_is_noted() -> None:
    # 20 names of 250 bytes pass PATH_MAX, 4096
    touch("v/1.mp4")
    start = Path.cwd()
    os.chdir("v")
    for _ in range(20):
        Path("d" * 250).mkdir()
        os.chdir("d" * 250)
    os.chdir(start)
    found = find_items(["v"])
    assert ids(found) == ["1.mp4"]
    assert "file name too long" in found.notes[0].unreadable[0]
    assert len(found.notes[0].unreadable) == 1
    remove_deep("v")


def test_thousand_nested_folders_are_walked() -> None:
    folder = "v"
    Path(folder).mkdir()
    for _ in range(1100):  # above Python's recursion limit
        folder += "/d"
        Path(folder).mkdir()
    touch(f"{folder}/1.mp4")
    assert ids(find_items(["v"])) == ["d/" * 1100 + "1.mp4"]
    remove_deep("v")


# globs


def test_glob_ids_start_at_the_folder_before_the_first_wildcard() -> None:
    touch("v/a/1.mp4", "v/b/2.mp4", "v/b/3.txt", "v/b/deep/4.mp4")
    found = find_items(["v/*/*.mp4"])
    assert ids(found) == ["a/1.mp4", "b/2.mp4"]
    assert [item.path for item in found.items] == ["v/a/1.mp4", "v/b/2.mp4"]


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("v/**/*.mp4", ["1.mp4", "a/2.mp4", "a/b/3.mp4"]),
        ("v/**/b/*.mp4", ["a/b/3.mp4"]),
        ("v/**", ["1.mp4", "a/2.mp4", "a/b/3.mp4"]),
        ("v/*", ["1.mp4", "a/2.mp4", "a/b/3.mp4"]),
        ("v/*/", ["a/2.mp4", "a/b/3.mp4"]),
        ("v/[0-9].mp?", ["1.mp4"]),
        ("*/a/*.mp4", ["v/a/2.mp4"]),
        ("v/*/b/../2.mp4", ["a/b/../2.mp4"]),
        ("v/.[!.]*", [".h/4.mp4"]),
    ],
)
def test_glob_matches_as_a_shell_does(pattern: str, want: list[str]) -> None:
    touch("v/1.mp4", "v/a/2.mp4", "v/a/b/3.mp4", "v/.h/4.mp4")
    assert ids(find_items([pattern])) == want


def test_glob_over_links_in_a_circle_ends() -> None:
    touch("v/1.mp4")
    for name in "abc":
        Path(f"v/{name}").symlink_to(".")
    assert ids(find_items(["v/**/*.mp4"])) == ["1.mp4"]
    assert ids(find_items(["v/*"])) == ["1.mp4"]


def test_existing_name_with_brackets_is_no_glob() -> None:
    touch("clip[1].mp4", "clip1.mp4")
    assert ids(find_items(["clip[1].mp4"])) == ["clip[1].mp4"]


def test_glob_without_a_match_is_no_input() -> None:
    touch("v/1.mp4")
    with pytest.raises(NoInputError, match=r"^'v/\*\.mkv' matches no file or folder$"):
        find_items(["v/1.mp4", "v/*.mkv"])


# lists


@pytest.mark.parametrize(
    "data",
    [
        b"v/a.mp4\nv/b.mp4\n",
        b"v/a.mp4\0v/b.mp4\0",
        b"\n \nv/a.mp4\n\nv/b.mp4",
        b"v/a.mp4\r\nv/b.mp4\r\n",
    ],
    ids=["lines", "nul", "blank lines", "windows"],
)
def test_list_is_one_path_a_line_or_nul_separated(data: bytes) -> None:
    touch("v/a.mp4", "v/b.mp4")
    found = listed(data)
    assert ids(found) == ["v/a.mp4", "v/b.mp4"]


def test_missing_listed_file_is_an_item_like_others() -> None:
    touch("a.mp4")
    assert ids(listed(b"gone.mp4\na.mp4\n")) == ["gone.mp4", "a.mp4"]


def test_listed_folder_is_searched() -> None:
    touch("v/a/1.mp4", "v/2.mp4", "v/3.txt")
    assert ids(listed(b"./v\n")) == ["v/2.mp4", "v/a/1.mp4"]


def test_listed_ids_do_not_depend_on_what_else_is_listed(tmp_path: Path) -> None:
    touch("x/clips/1.mp4", "y/clips/1.mp4")
    assert ids(listed(b"y/clips/1.mp4\n")) == ["y/clips/1.mp4"]
    assert ids(listed(b"x/clips/1.mp4\ny/clips/1.mp4\n")) == ["x/clips/1.mp4", "y/clips/1.mp4"]
    assert ids(listed(bytes(tmp_path / "x/clips/1.mp4"))) == [f"{tmp_path}/x/clips/1.mp4"[1:]]


def test_listed_names_hold_any_byte_but_the_separator() -> None:
    for start in (1, 128):  # a name has at most 255 bytes
        name = (
            bytes(byte for byte in range(start, min(start + 128, 256)) if byte != ord("/"))
            + b".mp4"
        )
        touch(name)
        (item,) = listed(name + b"\0").items
        assert os.fsencode(item.path) == name
        item.id.encode()  # valid UTF-8


def test_empty_list_is_no_input() -> None:
    with pytest.raises(NoInputError, match="list on standard input is empty"):
        listed(b"\n\n")


# ids


def test_path_stays_as_the_user_gave_it() -> None:
    touch("v/a/1.mp4")
    for given in ("v", "v/", "./v", "v/../v/", str(Path.cwd() / "v")):
        (item,) = find_items([given]).items
        assert (item.id, item.path) == ("a/1.mp4", given.rstrip("/") + "/a/1.mp4")


def test_file_is_called_by_its_name() -> None:
    touch("v/a/1.mp4")
    (item,) = find_items(["v/a/1.mp4"]).items
    assert (item.id, item.path, item.kind) == ("1.mp4", "v/a/1.mp4", "video")


def test_arguments_under_one_root_have_plain_ids() -> None:
    touch("v/1.mp4", "v/2.mp4")
    Path("link").symlink_to("v")
    found = find_items(["v/2.mp4", "link/1.mp4", "v", "./v/*.mp4"])
    assert ids(found) == ["2.mp4", "1.mp4"]
    assert found.notes[0].root == "v/"


def test_several_roots_stand_before_the_id_numbered_on_collision() -> None:
    touch("x/clips/1.mp4", "y/clips/1.mp4", "z/clips-2/1.mp4", "w/clips/1.mp4")
    found = find_items(["x/clips", "y/clips/", "z/clips-2", "w/clips/1.mp4"])
    assert ids(found) == ["clips/1.mp4", "clips-2/1.mp4", "clips-2-2/1.mp4", "clips-3/1.mp4"]


def test_root_of_dot_is_named_after_the_folder() -> None:
    touch("one/1.mp4", "two/2.mp4")
    os.chdir("one")
    assert ids(find_items([".", "../two"])) == ["one/1.mp4", "two/2.mp4"]


def test_bytes_that_are_not_utf8_are_percent_encoded() -> None:
    touch(b"v/caf\xe9.mp4", "v/café \n\t☕.mp4", "v/100%.mp4")
    assert ids(find_items(["v"])) == ["100%.mp4", "caf%E9.mp4", "café \n\t☕.mp4"]


def test_names_that_encode_alike_are_numbered() -> None:
    touch(b"v/\xff.mp4", "v/%FF.mp4")
    found = find_items(["v"])
    assert ids(found) == ["%FF.mp4", "%FF.mp4-2"]
    assert [os.fsencode(item.path) for item in found.items] == [b"v/%FF.mp4", b"v/\xff.mp4"]
    # also when only the later is wanted, or the same folder is given again
    assert ids(find_items(["v", "v"])) == ids(found)


def test_encode_name_keeps_every_valid_name_and_decodes_to_the_bytes() -> None:
    for text in (string.printable, "é☕🎬", "a\nb"):
        assert encode_name(text) == text
    for byte in range(0x80, 0x100):
        assert encode_name(os.fsdecode(bytes([byte]))) == f"%{byte:02X}"
    encode_name("\ud800\udcff").encode()  # no byte stands behind the first


# what is said


def test_misspelt_argument_names_its_neighbour() -> None:
    Path("videos").mkdir()
    touch("clip.mp4")
    with pytest.raises(UsageError) as caught:
        find_items(["vidoes/"])
    assert str(caught.value) == "'vidoes/' does not exist; did you mean 'videos/'?"
    with pytest.raises(UsageError, match=r"did you mean '\./clip.mp4'"):
        find_items(["./clop.mp4"])
    with pytest.raises(UsageError, match=r"did you mean 'clip\.mp4'"):
        find_items(["clip.mp4/"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gone/x/y.mp4", "'gone/x/y.mp4' does not exist"),
        ("", "'' is not a path; is a variable unset?"),
        ("broken.mp4", "'broken.mp4' is a link to 'nowhere', which does not exist"),
        ("circle.mp4", "'circle.mp4' cannot be read: too many levels of symbolic links"),
        ("n" * 300, f"'{'n' * 300}' cannot be read: file name too long"),
    ],
)
def test_argument_that_cannot_be_used_is_wrong_usage(argument: str, message: str) -> None:
    Path("broken.mp4").symlink_to("nowhere")
    Path("circle.mp4").symlink_to("circle.mp4")
    with pytest.raises(UsageError) as caught:
        find_items([argument])
    assert str(caught.value) == message


def test_no_argument_and_two_lists_are_wrong_usage() -> None:
    for arguments in ([], ["-", "-"]):
        with pytest.raises(UsageError):
            find_items(arguments)


def test_folder_without_media_says_how_many_files_it_looked_at() -> None:
    touch(*(f"notes/{i}.txt" for i in range(14)))
    with pytest.raises(NoInputError) as caught:
        find_items(["notes/"])
    message = "'notes/' holds no video, image or audio file (looked at 14 files)"
    assert str(caught.value) == message


def test_nothing_of_the_wanted_kind_is_no_input() -> None:
    touch("a/1.mp4", "b/2.mp4")
    with pytest.raises(NoInputError) as caught:
        find_items(["a", "b/2.mp4"], modality="image")
    assert str(caught.value) == "'a', 'b/2.mp4' hold no image (looked at 2 files)"


def test_audio_keeps_videos_that_are_named_themselves(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.wav"):
        (tmp_path / name).touch()
    folder, video = str(tmp_path), str(tmp_path / "a.mp4")
    for arguments in ([folder, video], [video, folder]):
        found = find_items(arguments, modality="audio")
        assert sorted(item.id.rpartition("/")[2] for item in found.items) == ["a.mp4", "c.wav"]
    (tmp_path / "c.wav").unlink()
    with pytest.raises(NoInputError, match="; name a video itself"):
        find_items([folder], modality="audio")
