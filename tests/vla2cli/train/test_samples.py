import json
import pickle
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.goldens import ATOL, golden, golden_engine, media
from tests.sounds import RATE, s16, tone, write_movie, write_wav
from tests.tiny import tiny_av_engine
from tests.vla2cli.train.reference import batch_of
from vla2cli.errors import InputError, UsageError
from vla2cli.preprocess import fbank
from vla2cli.train.collate import Collator
from vla2cli.train.config import DataFile
from vla2cli.train.media import MediaFile, MediaReader
from vla2cli.train.samples import Sample, SampleDataset, Skipped, draw_indices

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the decoders' processes")

WINDOW = tiny_av_engine().sound_window


def turns(tag, *said):
    words = said or ("What?", "a red car")
    return [
        {"from": ("human", "gpt")[i % 2], "value": f"{tag}\n{text}" if i == 0 and tag else text}
        for i, text in enumerate(words)
    ]


def about(kind, path, *said, **more):
    return {kind: path, "conversations": turns(f"<{kind}>", *said), **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clip with sound, one without, a picture, a sound, and a file that is none of these."""
    folder = tmp_path_factory.mktemp("media")
    write_movie(folder / "loud.mp4", ("aac", [tone(440, 2)], RATE))
    write_movie(folder / "mute.mp4")
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(picture).save(folder / "one.png")
    write_wav(folder / "tone.wav", [s16(tone(440, 2))])
    (folder / "bad.mp4").write_text("no clip", encoding="utf-8")
    return folder


@pytest.fixture
def reader():
    reader = MediaReader(tiny_av_engine().geometry, 8, WINDOW)
    yield reader
    reader.close()


def dataset_of(tmp_path, folder, reader, *entries, **more):
    path = tmp_path / "data.json"
    named = [{"id": f"e{i}", **entry} for i, entry in enumerate(entries)]
    path.write_text(json.dumps(named), encoding="utf-8")
    tokenizer = tiny_av_engine().tokenizer
    return SampleDataset([DataFile(str(path), str(folder))], tokenizer, reader, **more)


def all_of(dataset):
    """The items of an epoch, by their ids."""
    items = dataset.__getitems__(range(len(dataset)))
    return {item.id if isinstance(item, Skipped) else item.ids: item for item in items}


def test_each_medium_is_read_as_it_is_when_a_question_is_asked(tmp_path, folder, reader):
    dataset = dataset_of(
        tmp_path,
        folder,
        reader,
        about("video", "loud.mp4"),
        about("image", "one.png"),
        about("audio", "tone.wav"),
        {"conversations": turns("")},
    )
    items = all_of(dataset)
    video, image, audio, text = (items[(f"e{i}",)].media for i in range(4))
    assert video.pixel_values.shape == (8, 3, 56, 56)
    assert video.fbank is None
    assert (image.pixel_values.shape, image.is_image) == ((1, 3, 56, 56), True)
    assert (audio.pixel_values, audio.fbank.shape) == (None, (1, WINDOW.num_frames, 128))
    assert (text.pixel_values, text.fbank) == (None, None)


def test_the_sound_of_videos_is_read_where_it_is_wanted(folder, reader):
    reader.hears_videos = True
    files = [MediaFile(str(folder / name), "video") for name in ("loud.mp4", "mute.mp4")]
    loud, mute = reader.read([*files])
    silence = fbank(np.zeros(WINDOW.num_samples, np.int16))[None]
    assert mute.fbank.equal(silence)
    assert loud.fbank.shape == silence.shape
    assert not loud.fbank.equal(silence)


def test_bad_samples_are_named_and_good_ones_kept(tmp_path, folder, reader):
    dataset = dataset_of(
        tmp_path,
        folder,
        reader,
        about("video", "gone.mp4"),
        about("video", "bad.mp4"),
        about("video", "mute.mp4", "What?"),
        about("video", "mute.mp4"),
        about("video", ["mute.mp4"]),
    )
    items = all_of(dataset)
    assert "entry 5: 'video' is ['mute.mp4'], expected a path" in items["e4"].reason
    assert f"'{folder / 'gone.mp4'}': " in items["e0"].reason
    assert f"'{folder / 'bad.mp4'}': " in items["e1"].reason
    assert "1 turns" in items["e2"].reason
    assert isinstance(items[("e3",)], Sample)
    batch = Collator(0, max_length=99)(list(items.values()))
    assert sorted(name for name, _ in batch["skipped"]) == ["e0", "e1", "e2", "e4"]
    assert len(batch["input_ids"]) == 1


def test_a_sound_for_a_model_without_ears_is_named(folder):
    reader = MediaReader(tiny_av_engine().geometry, 8)
    (found,) = reader.read([MediaFile(str(folder / "tone.wav"), "audio")])
    assert isinstance(found, InputError)
    assert "no audio branch" in str(found)
    with pytest.raises(ValueError, match="without an audio branch"):
        replace(reader, hears_videos=True)


def test_conversations_about_one_file_are_read_once_and_packed(tmp_path, folder, reader):
    entries = [about("video", "mute.mp4", "What?", f"one {i}") for i in range(3)]
    entries.insert(1, about("video", "mute.mp4", "odd"))
    entries.insert(2, about("video", "loud.mp4"))
    dataset = dataset_of(tmp_path, folder, reader, *entries, pack=4)
    items = all_of(dataset)
    assert set(items) == {("e0", "e3", "e4"), ("e2",)}
    packed = items["e0", "e3", "e4"]
    assert [left_out.id for left_out in packed.skipped] == ["e1"]
    batch = Collator(0, max_length=99, pack=4)([packed])
    assert batch["segments"].max() == 3


def test_a_group_about_a_bad_file_names_all_its_conversations(tmp_path, folder, reader):
    entries = [about("video", "bad.mp4") for _ in range(2)]
    (item,) = all_of(dataset_of(tmp_path, folder, reader, *entries, pack=2)).values()
    assert item.rows == ()
    assert [left_out.id for left_out in item.skipped] == ["e0", "e1"]


def test_an_epoch_follows_from_seed_and_number_alone(tmp_path, folder, reader):
    entries = [{"conversations": turns("", "What?", f"n{i}")} for i in range(20)]

    def order(seed, epoch):
        dataset = dataset_of(tmp_path, folder, reader, *entries, seed=seed)
        dataset.set_epoch(epoch)
        return [dataset[i].ids[0] for i in range(len(dataset))]

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == sorted(f"e{i}" for i in range(20))
    assert len({tuple(order(s, e)) for s, e in [(0, 0), (0, 1), (1, 0)]}) == 3


@pytest.mark.parametrize("weight", [0.3, 1.0, 1.7, 2.0])
def test_a_weight_is_the_share_of_a_file_in_each_epoch(weight):
    epochs = [draw_indices(10, weight, epoch, seed="s") for epoch in range(10)]
    assert {len(epoch) for epoch in epochs} == {round(10 * weight)}
    # over ten epochs each comes as often as any other
    assert set(Counter(i for epoch in epochs for i in epoch).values()) == {round(10 * weight)}
    for epoch in epochs:
        assert max(Counter(epoch).values()) <= weight + 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_leaves_nothing_is_refused(tmp_path, folder, reader, weight):
    path = dataset_of(tmp_path, folder, reader, {"conversations": turns("")}) and tmp_path
    with pytest.raises(UsageError, match=r"data\.json': a weight of .* leaves none of its 1"):
        SampleDataset(
            [DataFile(str(path / "data.json"), str(folder), weight)],
            tiny_av_engine().tokenizer,
            reader,
        )


# from Python 3.12 on, of any process with threads
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_loader_s_processes_read_with_decoders_of_their_own(tmp_path, folder, reader):
    dataset = dataset_of(tmp_path, folder, reader, *[about("video", "mute.mp4")] * 4)
    assert isinstance(dataset[0], Sample)  # the parent's decoders run already
    loader = DataLoader(
        dataset, 2, collate_fn=Collator(0, max_length=99), num_workers=2, timeout=60
    )
    batches = list(loader)
    assert [len(batch["media"]) for batch in batches] == [2, 2]
    assert all(batch["media"][0].pixel_values.isfinite().all() for batch in batches)


def test_a_reader_leaves_its_processes_behind_when_it_is_sent(folder, reader):
    file = MediaFile(str(folder / "one.png"), "image")
    (here,) = reader.read([file])
    sent = pickle.loads(pickle.dumps(reader))
    (there,) = sent.read([file])
    sent.close()
    assert there.pixel_values.equal(here.pixel_values)


def test_a_padded_picture_is_the_reference_s():
    geometry = replace(golden_engine("mistral_clip_stc_8f").geometry, is_padded=True)
    reader = MediaReader(geometry, 8)
    (found,) = reader.read([MediaFile(str(golden("media/one.png")), "image")])
    reader.close()
    expected = torch.from_numpy(np.load(golden("data/preprocess_misc.npz"))["clip.img_pad"])
    torch.testing.assert_close(found.pixel_values, expected, atol=ATOL["pixel_values"], rtol=0)


def test_a_padded_video_is_the_reference_s():
    clip = media("sample_demo_3.mp4")
    geometry = replace(golden_engine("mistral_clip_stc_8f").geometry, is_padded=True)
    reader = MediaReader(geometry, 8)
    (found,) = reader.read([MediaFile(str(clip), "video")])
    reader.close()
    expected = batch_of("mistral_clip_stc_8f")["video.pixel_values"]
    torch.testing.assert_close(found.pixel_values, expected, atol=ATOL["pixel_values"], rtol=0)
