"""Answers that a network in training would give: recited, marked, and written down."""

import json
from collections import Counter

import pytest
import torch

from tests.tiny import tiny_av_engine
from tests.vla2cli.train.students import FOR_WORLD, QUIET, configured, write_student
from vla2_models.hub import Source
from vla2cli.config import GenerationSettings
from vla2cli.engine import Ask, MediaTokens
from vla2cli.train import exam as exam_module
from vla2cli.train.collate import Collator
from vla2cli.train.config import EXAM_SEED
from vla2cli.train.conversation import IGNORED, Row
from vla2cli.train.exam import EXAM, Exam
from vla2cli.train.log import read_lines
from vla2cli.train.media import Media
from vla2cli.train.network import TrainedNetwork
from vla2cli.train.run import train
from vla2cli.train.samples import Sample
from vla2cli.train.world import WorldReader
from vla2cli.world.clip import WorldClip

QUESTIONS = ("What moves?", "please describe the video in detail", "where?")
NUM_NEW = 5
COLLATOR = Collator(pad_token_id=2, max_length=999, pack=9)


@pytest.fixture(scope="module")
def network():
    return TrainedNetwork(tiny_av_engine().model).eval()


def media(seed):
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(8, 3, 56, 56, generator=generator)
    fbank = torch.randn(1, 398, 128, generator=generator) * 4 + 10
    return Media(pixel_values, fbank.to(torch.bfloat16))


def answered(network, medium):
    """Prompt and answer to each question, in ids, as the engine decodes greedily."""
    with torch.no_grad():
        (tokens,) = network.encode([medium])
    asks = [Ask(question, "video", MediaTokens(visual=tokens)) for question in QUESTIONS]
    settings = GenerationSettings(eos_token_ids=(2,), max_new_tokens=NUM_NEW)
    answers = tiny_av_engine().answer(asks, settings)
    return [(tuple(a.prompt.input_ids), tuple(a.generation.ids)) for a in answers]


def sample_of(medium, pairs, kinds):
    """A sample that teaches answers; `kinds` names the questions."""
    rows = [
        Row((*prompt, *answer), (*(IGNORED for _ in prompt), *answer)) for prompt, answer in pairs
    ]
    words = torch.zeros(1, 1, dtype=torch.int64)
    ids = tuple(f"train-0-{kind}" for kind in kinds)
    return Sample(ids, tuple(rows), medium, word_targets=words)


def spoilt(answer, at):
    """The answer with another token at one place."""
    return (*answer[:at], (answer[at] + 1) % 500, *answer[at + 1 :])


def test_what_is_recited_is_what_greedy_decoding_gives(network):
    samples = []
    for seed in range(2):
        medium = media(seed)
        pairs = answered(network, medium)
        # of the first medium the second answer is another from its third token on
        pairs = [
            (prompt, spoilt(answer, 2) if (seed, i) == (0, 1) else answer)
            for i, (prompt, answer) in enumerate(pairs)
        ]
        samples.append(sample_of(medium, pairs, ("a", "b", "c")))
    batch = COLLATOR(samples)
    assert len(batch["input_ids"]) == 2  # packed
    batch.pop("skipped")
    batch.pop("word_targets")
    row, segment, is_right = network.recite(**batch)
    found = {
        (r, s): is_right[(row == r) & (segment == s)].tolist() for r in (0, 1) for s in (1, 2, 3)
    }
    assert sum(map(len, found.values())) == len(row)
    wrong = found.pop((0, 2))
    assert wrong[:3] == [True, True, False]
    assert all(answer == [True] * len(answer) for answer in found.values())


@pytest.fixture
def exam_of(network, tmp_path, monkeypatch):
    """Make an exam of so many clips of each split."""
    engine = tiny_av_engine()
    reader = WorldReader(engine.tokenizer, engine.checkpoint.config, engine.geometry, "plain")

    def make(num_clips):
        monkeypatch.setattr(exam_module, "NUM_CLIPS", num_clips)
        return Exam(tmp_path, network, reader, "video", 1, is_half=False)

    return make


def test_right_answers_are_counted_by_the_kind_of_question(network, exam_of):
    pairs = [answered(network, media(seed)) for seed in range(3)]
    pairs[0][0] = (pairs[0][0][0], spoilt(pairs[0][0][1], 0))
    pairs[2][2] = (pairs[2][2][0], spoilt(pairs[2][2][1], NUM_NEW - 1))
    kinds = ("caption", "is-sound", "order")
    samples = [sample_of(media(seed), pairs[seed], kinds) for seed in range(3)]
    marks = exam_of(0).mark(samples)
    assert marks == {"caption": (3, 2), "is-sound": (3, 3), "order": (3, 2)}


def test_an_exam_wants_the_answer_and_not_the_question_in_whatever_form_is_learned(exam_of):
    decode = tiny_av_engine().tokenizer.decode
    for split, (sample,) in exam_of(1).papers.items():
        questions = WorldClip(EXAM_SEED, 0, split).questions("video")
        wanted = [decode([i for i in row.labels if i != IGNORED]).strip() for row in sample.rows]
        assert sorted(wanted) == sorted(question.answer for question in questions)


def test_an_exam_is_written_once_for_each_step_however_a_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(exam_module, "NUM_CLIPS", 3)
    model = write_student(tmp_path / "hub", **FOR_WORLD)
    world = {"clips": 8, "medium": "video", "questions": 2, "exam_steps": 2}
    more = {"world": world, "max_steps": 5, "save_steps": 3, "batch": 1}
    source = Source(tmp_path / "hub")

    def run(name, **changes):
        config = configured(
            tmp_path / "hub", tmp_path / name, "video-pretrain", model=model, **more
        )
        return train(config, source, QUIET, **changes)

    assert run("whole").is_finished
    lines = list(read_lines(tmp_path / "whole" / EXAM))
    assert sorted({line["step"] for line in lines}) == [2, 4, 5]
    for split in ("train", "heldout"):
        clips = [WorldClip(EXAM_SEED, index, split) for index in range(3)]
        asked = Counter(q.kind for clip in clips for q in clip.questions("video"))
        for step in (2, 4, 5):
            found = {
                line["kind"]: line["num"]
                for line in lines
                if (line["step"], line["split"]) == (step, split)
            }
            assert found == asked
    # an ended run that had come beyond its last checkpoint
    stops = iter([False] * 3)
    assert run("halves", should_stop=lambda: next(stops, True)).step == 4
    (tmp_path / "halves/checkpoint-4/complete").unlink()
    with (tmp_path / "halves" / EXAM).open("a") as file:
        file.write(json.dumps(lines[0])[:20])
    assert run("halves").is_finished
    assert list(read_lines(tmp_path / "halves" / EXAM)) == lines
