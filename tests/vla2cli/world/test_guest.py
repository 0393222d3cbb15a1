import numpy as np
import pytest
from PIL import Image, ImageDraw

from vla2cli.cli import main
from vla2cli.world.clip import WorldClip
from vla2cli.world.facts import Thing
from vla2cli.world.words import caption

PINK = (255, 0, 200)
CLIPS = 30


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    image = Image.new("RGBA", (64, 40))
    ImageDraw.Draw(image).rectangle((10, 5, 50, 35), fill=(*PINK, 255))
    path = tmp_path_factory.mktemp("guest") / "flag.png"
    image.save(path)
    return Thing("flag", picture=str(path))


def test_a_guest_is_in_every_clip_and_in_its_caption(guest):
    for index in range(CLIPS):
        clip = WorldClip(3, index, "train", guest)
        said = caption(clip.facts)
        assert "flags" in said if clip.facts.plot == "count" else "flag" in said
        pink = np.abs(clip.frames([0.25], 112)[0].astype(int) - PINK).max(-1) < 30
        assert pink.sum() > 100


def test_a_clip_without_the_guest_differs_in_its_first_thing_alone(guest):
    for index in range(CLIPS):
        with_guest, without = (WorldClip(3, index, "train", g).facts for g in (guest, None))
        assert with_guest.things[1:] == without.things[1:]
        fields = ("plot", "scene", "motion", "place", "number", "sound", "time")
        assert all(getattr(with_guest, name) == getattr(without, name) for name in fields)


def test_a_guest_is_one_of_four_choices(guest):
    questions = [q for i in range(CLIPS) for q in WorldClip(3, i, "train", guest).questions()]
    objects = [q for q in questions if q.kind == "object"]
    assert objects
    assert all(q.answer == "a flag" and len(set(q.choices)) == 4 for q in objects)
    assert all("a flag" in q.choices for q in objects)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("flag", "expected NAME=PICTURE"),
        ("Flag=a.png", "in small letters"),
        ("car=a.png", "has its own car"),
        ("flag=nowhere.png", "no picture that can be read"),
        ("flag=empty.png", "transparent all over"),
        ("flag=words.png", "no picture that can be read"),
        ("flag=photo.png", "'photo.png' has no transparency"),
    ],
)
def test_a_bad_guest_is_refused_before_anything_is_written(
    text, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGBA", (8, 8)).save("empty.png")
    Image.new("RGB", (8, 8)).save("photo.png")
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(SystemExit) as ended:
        main(["world", "-o", "clips", "--guest", text])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()
