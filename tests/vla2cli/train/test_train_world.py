"""The drawn world as training data: what a sample holds, and what its tokens are to name."""

from collections import Counter

import numpy as np
import pytest
import torch

from tests.tiny import write_tiny
from tests.vla2cli.train.students import FOR_WORLD, configured
from vla2_models.builtin_design import write_untrained
from vla2_models.checkpoint import open_checkpoint
from vla2_models.hub import Source
from vla2cli.engine import read_geometry
from vla2cli.errors import UsageError
from vla2cli.preprocess import fbank, fit_frame, normalise
from vla2cli.tokenizer import load_tokenizer
from vla2cli.train.collate import pack_rows
from vla2cli.train.config import make_config
from vla2cli.train.conversation import IGNORED
from vla2cli.train.lesson import open_lesson
from vla2cli.train.world import NUM_WORDS, WorldReader, WorldSamples
from vla2cli.world.clip import WorldClip
from vla2cli.world.vocabulary import SCENES, SOUNDS
from vla2cli.world.words import caption

SEED = 4
NUM_CLIPS = 120
GRID, SLOTS = 4, 4  # of the built-in connector's tokens: 8 frames of 8 x 8 patches
ROWS, BANDS, ROW_S = 15, 4, 0.32  # of the built-in ears' tokens: patches of 32 rows and bands
CELL = 1 / GRID
MIRROR = {"left": "right", "right": "left"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The built-in model before it is trained: its tokenizer knows the world's words."""
    folder = tmp_path_factory.mktemp("untrained")
    clips = [WorldClip(SEED, index, "train") for index in range(300)]
    texts = [text for c in clips for q in c.questions() for text in (q.text, q.answer)]
    write_untrained(folder, texts)
    return open_checkpoint(str(folder), Source(None, True))


@pytest.fixture(scope="module")
def reader(checkpoint):
    tokenizer = load_tokenizer(checkpoint.text_folder)
    return WorldReader(tokenizer, checkpoint.config, read_geometry(checkpoint))


def clips_of(*plots):
    clips = [WorldClip(SEED, index, "train") for index in range(NUM_CLIPS)]
    return [clip for clip in clips if not plots or clip.facts.plot in plots]


def words_of(reader, targets):
    """What each token is to name, as text; nothing may stand behind the padding."""
    words = []
    for row in targets.tolist():
        ids = [i for i in row if i != IGNORED]
        assert ids
        assert row == [*ids, *[IGNORED] * (NUM_WORDS - len(ids))]
        words.append(reader.tokenizer.decode(ids))
    return words


def cells_of(reader, clip):
    """The words of a silent clip's tokens: [slot, row, column]."""
    words = words_of(reader, reader.word_targets(clip, "video"))
    return np.array(words, object).reshape(SLOTS, GRID, GRID)


def row_texts(reader, row):
    """What of a conversation is given and what is learned, as texts."""
    learned = [label for label in row.labels if label != IGNORED]
    given = [i for i, label in zip(row.input_ids, row.labels) if label == IGNORED and i >= 0]
    return reader.tokenizer.decode(given), reader.tokenizer.decode(learned)


def test_a_thing_is_named_by_the_tokens_of_the_cells_it_fills(reader):
    named = 0
    for clip in clips_of("moves", "stands"):
        noun, scene = clip.facts.things[0].noun, SCENES[clip.facts.scene].split()[-1]
        cells = cells_of(reader, clip)
        for slot in range(SLOTS):
            # two frames of one slot
            boxes = [clip.placed(m)[0] for m in reader.moments[2 * slot : 2 * slot + 2]]
            for row, column in np.ndindex(GRID, GRID):
                x, y = (column + 0.5) * CELL, (row + 0.5) * CELL
                # how far the box reaches beyond the cell's middle; below, it does not touch it
                apart = [max(abs(x - b.x), abs(y - b.y)) - b.size / 2 for b in boxes]
                said = cells[slot, row, column]
                if min(apart) > CELL / 2 + 0.01:
                    assert said == scene, clip
                elif all(max(abs(x - b.x), abs(y - b.y)) < 0.06 for b in boxes):
                    assert said.startswith(noun), clip
                    named += 1
    assert named > 20


def test_where_a_token_is_is_said_as_it_is_on_the_picture(reader):
    said = {}
    for clip in clips_of("moves", "stands", "count"):
        noun = clip.facts.things[0].noun
        for (_, row, column), words in np.ndenumerate(cells_of(reader, clip)):
            if words.startswith(noun):
                said.setdefault((row, column), set()).add(words.removeprefix(noun).strip())
    assert len(said) == GRID**2
    where = {place: phrase.split() for place, (phrase,) in said.items()}
    for (row, column), words in where.items():
        assert ("left" in words, "right" in words) == (column < 2, column >= 2)
        assert ("top" in words, "bottom" in words) == (row < 2, row >= 2)
        num_inner = (column in (1, 2)) + (row in (1, 2))
        assert words.count("middle") == num_inner
        assert where[row, GRID - 1 - column] == [MIRROR.get(word, word) for word in words]


def test_what_comes_later_is_named_by_later_tokens(reader):
    num_both = 0
    for clip in clips_of("order"):
        first, second = (thing.noun for thing in clip.facts.things)
        cells = cells_of(reader, clip)
        early, late = (" / ".join(cells[slot].ravel()) for slot in (0, -1))
        assert second not in early.replace(first, "")
        assert first not in late.replace(second, "")
        num_both += first in early and second in late
    assert num_both > 0.9 * len(clips_of("order"))


def test_a_sound_is_named_within_its_span_alone(reader):
    heard = 0
    for clip in clips_of()[:60]:
        words = words_of(reader, reader.word_targets(clip, "audio"))
        assert len(words) == ROWS * BANDS
        for row in range(ROWS):
            (said,) = set(words[row * BANDS : (row + 1) * BANDS])
            start, end = row * ROW_S, (row + 1) * ROW_S
            if clip.span is None or end <= clip.span[0] or start >= clip.span[1]:
                assert said == "silent"
            elif clip.span[0] <= start and end <= clip.span[1]:
                when = ("beginning", "halfway", "end")[row // (ROWS // 3)]
                assert said == f"{clip.facts.sound} {when}"
                assert clip.facts.sound in SOUNDS
                heard += 1
    assert heard > 100


@pytest.mark.parametrize(
    ("medium", "num"), [("av", 64 + 60), ("video", 64), ("audio", 60), ("image", 64)]
)
def test_every_token_of_a_medium_has_words(reader, medium, num):
    clip = clips_of("stands")[0]
    targets = reader.word_targets(clip, medium)
    assert targets.shape == (num, NUM_WORDS)
    assert targets.dtype == torch.int64
    words_of(reader, targets)


def test_what_is_seen_and_heard_is_the_clip_s_own(reader):
    clip = WorldClip(SEED, 1, "train")
    media = reader.media(clip, "av")
    # eight frames of fifty, each from the middle of its eighth
    moments = [(int(50 / 8 * (i + 0.5)) + 0.5) / 50 for i in range(8)]
    torch.testing.assert_close(reader.moments, moments, atol=0.011, rtol=0)
    frames = np.stack([fit_frame(f, reader.geometry) for f in clip.frames(reader.moments, 320)])
    assert media.pixel_values.equal(torch.from_numpy(normalise(frames, reader.geometry)))
    assert media.fbank.equal(fbank(clip.track())[None])
    spoiled = reader.media(clip, "video", np.random.default_rng(0))
    assert spoiled.fbank is None
    difference = (spoiled.pixel_values - media.pixel_values).abs().mean()
    assert 0 < difference < 0.3  # of a deviation of the tower's, about 70 grey levels


def test_the_same_number_gives_the_same_sample_and_each_epoch_its_own(reader):
    one, other = (WorldSamples(reader, SEED, 5) for _ in range(2))
    for index in (0, 3):
        a, b = one[index], other[index]
        assert (a.ids, a.rows) == (b.ids, b.rows)
        assert a.word_targets.equal(b.word_targets)
        for name in ("pixel_values", "fbank"):
            x, y = getattr(a.media, name), getattr(b.media, name)
            assert (x is None) == (y is None)
            assert x is None or x.equal(y)
    seen = []
    for epoch in range(3):
        other.set_epoch(epoch)
        seen += [other[index].ids[0] for index in range(len(other))]
    assert seen == [f"train-{index}-caption" for index in range(15)]


@pytest.mark.parametrize("medium", ["av", "video", "audio"])
def test_questions_are_about_what_is_given(reader, medium):
    samples = WorldSamples(reader, SEED, 8, num_questions=3, split="heldout", medium=medium)
    for index in range(8):
        sample, clip = samples[index], WorldClip(SEED, index, "heldout")
        assert (sample.media.pixel_values is None) == (medium == "audio")
        assert (sample.media.fbank is None) == (medium == "video")
        asked = {q.kind for q in clip.questions(medium)}
        kinds = [name.removeprefix(f"heldout-{index}-") for name in sample.ids]
        assert kinds[0] == "caption"
        assert set(kinds) <= asked
        assert len(kinds) == min(3, len(clip.questions(medium)))
        prompt, learned = row_texts(reader, sample.rows[0])
        assert learned.strip() == caption(clip.facts, medium)
        assert ("audio" in prompt) == (medium == "audio")


def medium_of(sample):
    if sample.media.is_image:
        return "image"
    if sample.media.fbank is None:
        return "video"
    return "audio" if sample.media.pixel_values is None else "av"


def test_media_are_mixed_and_stills_are_of_what_stands(reader):
    dataset = WorldSamples(reader, SEED, NUM_CLIPS, num_questions=1)
    samples = [dataset[index] for index in range(NUM_CLIPS)]
    media = Counter(map(medium_of, samples))
    assert media.keys() == {"av", "video", "audio", "image"}
    assert 0.6 < media["av"] / NUM_CLIPS < 0.9
    for sample, clip in zip(samples, clips_of(), strict=True):
        prompt, learned = row_texts(reader, sample.rows[0])
        if sample.media.is_image:
            assert clip.facts.plot in ("stands", "count")
            assert (len(sample.media.pixel_values), sample.media.fbank) == (1, None)
            assert "video" not in prompt
            assert learned.strip() == caption(clip.facts, "video")
        else:
            assert "image" not in prompt


def test_spelled_conversations_stay_behind_the_same_tokens(reader):
    plain, spelled = (WorldSamples(reader, SEED, 30, spelled=share) for share in (0.0, 0.5))
    num_spelled = num_rows = 0
    for index in range(30):
        rows = spelled[index].rows
        assert len(pack_rows(rows, len(rows))) == 1
        for row, whole in zip(rows, plain[index].rows, strict=True):
            assert row_texts(reader, row) == row_texts(reader, whole)
            num_spelled += row != whole
            num_rows += 1
    assert 0.35 < num_spelled / num_rows < 0.65


def test_shapes_are_taken_apart_for_words_and_answers_alike(reader):
    whole, apart = (WorldSamples(reader, SEED, 60, apart=share, medium="video") for share in (0, 1))
    num_changed = 0
    for index in range(60):
        clip = WorldClip(SEED, index, "train", apart=1)
        _, learned = row_texts(reader, apart[index].rows[0])
        assert learned.strip() == caption(clip.facts, "video")
        words = words_of(reader, apart[index].word_targets)
        assert any(line.startswith(clip.facts.things[0].noun) for line in words)
        num_changed += learned != row_texts(reader, whole[index].rows[0])[1]
    assert num_changed > 10


LACKED = {"circle": "green", "square": "blue", "triangle": "yellow", "star": "purple"}


def open_words(clip):
    """What training leaves open about a clip: the rule of name_open, from the split's own table."""
    words = set()
    for thing in clip.facts.things:
        if thing.is_shape:
            lacking = [shape for shape, colour in LACKED.items() if colour == thing.colour]
            words |= {LACKED[thing.name], *lacking, *(f"{shape}s" for shape in lacking)}
    return words


def test_a_pair_that_training_lacks_is_neither_told_nor_denied(reader):
    whole, careful = (
        WorldSamples(reader, SEED, NUM_CLIPS, leaves_open=is_careful, medium="av")
        for is_careful in (False, True)
    )
    decode = reader.tokenizer.decode
    num_open = num_left = 0
    for index, clip in enumerate(clips_of()):
        sample, all_told = careful[index], whole[index]
        expected = open_words(clip)
        assert {decode([i]).strip() for i in sample.left_open.tolist()} == expected
        left_open = set(sample.left_open.tolist())
        for row, told in zip(sample.rows, all_told.rows, strict=True):
            assert row.input_ids == told.input_ids
            for label, before in zip(row.labels, told.labels, strict=True):
                assert label == (IGNORED if before in left_open else before)
                num_left += label != before
        assert not left_open & set(sample.word_targets.ravel().tolist())
        num_open += bool(expected)
    assert 20 < num_open < NUM_CLIPS
    assert 0 < num_left < 20  # the words of two things, and of green meadows and the blue sea


def test_of_a_sound_alone_nothing_is_left_open(reader):
    dataset = WorldSamples(reader, SEED, 20, leaves_open=True, medium="audio")
    assert all(dataset[index].left_open is None for index in range(20))


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_what_is_left_open_stays_so_when_it_is_spelled(apart, reader):
    whole, spelled = (
        WorldSamples(reader, SEED, 60, leaves_open=True, spelled=share, apart=apart, medium="video")
        for share in (0, 1)
    )
    for index in range(60):
        sample = spelled[index]
        left_open = set(sample.left_open.tolist())
        for row, told in zip(sample.rows, whole[index].rows, strict=True):
            assert row_texts(reader, row)[1] == row_texts(reader, told)[1]
            assert not left_open & set(row.labels)


def test_a_lesson_takes_shapes_apart_spells_and_leaves_open(checkpoint, reader, tmp_path):
    world = {"clips": 40, "seed": SEED, "medium": "video"}
    given = {"medium": "video", "num_questions": 6, "leaves_open": True}
    found = {}
    for key in ("apart", "spelled"):
        config = configured(
            tmp_path, tmp_path, "joint", model="m", train=["mm_projector"], world={**world, key: 1}
        )
        lesson, expected = (
            open_lesson(config, checkpoint).dataset,
            WorldSamples(reader, SEED, 40, **{**given, key: 1}),
        )
        for index in range(20):
            assert lesson[index].rows == expected[index].rows
            assert lesson[index].left_open.equal(expected[index].left_open)
        found[key] = [lesson[index].rows for index in range(20)]
    assert found["apart"] != found["spelled"]


def test_the_plain_form_has_instruction_and_caption_and_no_template(checkpoint, reader):
    plain = WorldReader(reader.tokenizer, checkpoint.config, reader.geometry, "plain")
    sample = WorldSamples(plain, SEED, 1, num_questions=1, medium="video")[0]
    given, learned = row_texts(plain, sample.rows[0])
    clip = WorldClip(SEED, 0, "train")
    assert given == ""
    assert learned.split() == [
        *clip.questions("video")[0].text.split(),
        *caption(clip.facts, "video").split(),
    ]


@pytest.mark.parametrize(
    ("changes", "medium", "line"),
    [
        ({"mm_projector_type": "stc_connector"}, "video", "those of 'stc_connector' are no blocks"),
        ({"mm_projector_type": "linear"}, "video", "those of 'linear' are no blocks"),
        ({"has_ears": False}, "av", "the model has no audio tower; set world.medium to video"),
        ({"mm_audio_window_s": 30}, None, "hears 30 s at once in 1 pieces"),
    ],
    ids=["padded", "mean", "deaf", "longer"],
)
def test_a_model_that_the_world_does_not_fit_is_refused(changes, medium, line, tmp_path):
    folder = write_tiny(tmp_path / "hub", **{"has_ears": True, **FOR_WORLD, **changes})
    config = make_config(
        {
            "model": str(folder),
            "stage": "video-finetune",
            "output": "out",
            "world": {"clips": 2, "medium": medium},
        }
    )
    with pytest.raises(UsageError) as refused:
        open_lesson(config, open_checkpoint(str(folder), Source(tmp_path / "hub")))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_words_weigh_less_from_step_to_step(checkpoint, tmp_path):
    world = {"clips": 7, "medium": "video", "word_weight": 0.8, "word_share": 0.5}
    config = configured(tmp_path, tmp_path, "video-finetune", model="m", world=world)
    lesson = open_lesson(config, checkpoint)
    assert (lesson.num_samples, len(lesson.dataset)) == (7, 7)
    weights = [lesson.on_step(step, 8)["word_weight"] for step in range(0, 8, 2)]
    torch.testing.assert_close(weights, [0.8, 0.4, 0.0, 0.0])
