"""Conversations about clips, with a real engine and no files."""

import dataclasses
import functools
import time

import pytest
import torch

from tests.tiny import tiny_engine
from vla2cli.asking import Asking, Failed, Ready
from vla2cli.cache import Encoded
from vla2cli.config import GenerationChoice
from vla2cli.engine import Ask, Engine, MediaTokens
from vla2cli.errors import InputError, ModelError
from vla2cli.flow import Ahead, Cores, InTurn
from vla2cli.inputs import Item
from vla2cli.media.records import Clip, FileState
from vla2cli.plan import Sampling, Task, Work
from vla2cli.prompt import Turn
from vla2cli.stats import Stats

STATE = FileState(1, 1, "0" * 64)
CLIP = Clip(None, "video", (), (), 8, 1.0, 8.0, "pyav", (), STATE, {})
LONG = ("What moves?", "Which way does it go?", "Why?", "And then?")
CONVERSATIONS = (LONG, ("What is it?",), ("Which colour?", "Is it?"))
SAMPLING = Sampling(8)
SETTINGS = {"max_new_tokens": 6}


class Rude(Engine):
    """Fails at what a question says."""

    def ask(self, ask, settings, **more):
        if ask.question == "fail":
            raise RuntimeError("out of order")
        if ask.question == "end all":
            raise ModelError("the weights are gone")
        return super().ask(ask, settings, **more)


@pytest.fixture(scope="module")
def rude():
    return Rude(tiny_engine().checkpoint, device="cpu", dtype="float32")


def ready(name, *conversations):
    """A clip that is encoded, of tokens of its own."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    width = tiny_engine().model.language_model.config.hidden_size
    media = MediaTokens(visual=torch.randn(5, width, generator=generator))
    return Ready(Work(Item(name, name, "video"), conversations), Encoded(CLIP, media), 0.0)


def asking(engine=None, num_rows=3, stats=None, **choice):
    engine = engine or tiny_engine()
    return Asking(
        engine,
        engine.settings(GenerationChoice(**(SETTINGS | choice))),
        Task("ask", CONVERSATIONS),
        SAMPLING,
        num_rows=num_rows,
        cores=Cores(lambda: 0, is_shared=False),
        stats=stats or Stats(1),
    )


def never():
    return False


def talk(clips, **kwargs):
    """Have all conversations; those that are over, by clip and questions."""
    talks = list(asking(**kwargs).run(InTurn(iter(clips)), never))
    assert all(not talk.is_open for talk in talks)
    found = {(talk.about.work.item.id, talk.questions): talk for talk in talks}
    assert len(found) == len(talks)
    return found


@functools.cache
def answer_by_hand(name, questions):
    """One conversation, turn by turn and all alone."""
    engine, about, texts = tiny_engine(), ready(name), []
    settings = engine.settings(GenerationChoice(**SETTINGS))
    for turn, question in enumerate(questions):
        history = tuple(Turn(*pair) for pair in zip(questions[:turn], texts))
        media = about.encoded.media
        (answer,) = engine.answer([Ask(question, "video", media, history)], settings)
        texts.append(answer.text)
    return texts


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_follow_up_questions_see_the_answers_before_them(num_rows):
    talks = talk([ready(name, *CONVERSATIONS) for name in "abcd"], num_rows=num_rows)
    assert set(talks) == {(name, questions) for name in "abcd" for questions in CONVERSATIONS}
    for (name, questions), found in talks.items():
        assert found.failure is None
        assert [answer.text for answer in found.answers] == answer_by_hand(name, questions)


def test_all_is_counted():
    stats = Stats(1)
    talks = talk([ready(name, *CONVERSATIONS) for name in "ab"], stats=stats)
    answers = [answer for found in talks.values() for answer in found.answers]
    assert stats.counts["prompts"] == len(answers) == 2 * 7
    assert stats.counts["tokens"] == sum(len(answer.generation.ids) for answer in answers)
    assert 0 < stats.busy_s["language"] < stats.elapsed_s


@pytest.mark.parametrize("num_rows", [1, 3])
def test_question_that_fails_ends_its_conversation_alone(rude, num_rows):
    questions = ("What moves?", "fail", "Why?")
    talks = talk(
        [ready("a", questions, LONG, ("fail",)), ready("b", ("fail",)), ready("c", LONG)],
        engine=rude,
        num_rows=num_rows,
    )
    failures = {key: found.failure for key, found in talks.items() if found.failure}
    assert set(failures) == {("a", questions), ("a", ("fail",)), ("b", ("fail",))}
    for failure in failures.values():
        assert (failure.kind, failure.stage) == ("failed", "generate")
        assert str(failure) == "unexpected RuntimeError: out of order"
    assert len(talks["a", questions].answers) == 1
    for name in "ac":
        texts = [answer.text for answer in talks[name, LONG].answers]
        assert texts == answer_by_hand(name, LONG)


def test_what_every_question_would_fail_with_ends_all(rude):
    stage = InTurn(iter([ready("a", ("end all",))]))
    with pytest.raises(ModelError, match="the weights are gone"):
        list(asking(rude).run(stage, never))


def test_lost_device_ends_all_in_one_line():
    model = tiny_engine().model.language_model

    def fail(module, args):
        raise torch.AcceleratorError("an illegal memory access")

    hook = model.model.layers[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(ModelError, match=r"^the device failed: an illegal memory access"):
            talk([ready("a", LONG)])
    finally:
        hook.remove()


def test_tokens_that_no_prompt_can_take_cost_one_clip():
    bad = ready("bad", LONG)
    bad.encoded = dataclasses.replace(bad.encoded, media=MediaTokens(visual=torch.zeros(5, 3)))
    talks = talk([bad, ready("a", LONG)])
    assert talks["bad", LONG].failure.kind == "failed"
    assert talks["bad", LONG].answers == []
    assert len(talks["a", LONG].answers) == 4


def test_failed_files_are_handed_on():
    failed = Failed(ready("bad", LONG).work, InputError("no", kind="decode", stage="decode"), None)
    found = list(asking().run(InTurn(iter([failed, ready("a", ("Why?",)), failed])), never))
    assert [item is failed for item in found].count(True) == 2
    assert len(found) == 3


def test_beginning_of_a_clip_is_forgotten_with_its_last_conversation():
    clips = [ready(name, *CONVERSATIONS) for name in "abcd"]
    made = []

    class Seen(Engine):
        def language_engine(self, num_rows):
            made.append(super().language_engine(num_rows))
            return made[0]

    engine = Seen(tiny_engine().checkpoint, device="cpu", dtype="float32")
    most = 0
    for _ in asking(engine, num_rows=8).run(InTurn(iter(clips)), never):
        assert set(made[0]._prefixes) <= {clip for clip in clips if clip.num_open}
        most = max(most, len(made[0]._prefixes))
    assert most > 1
    assert not made[0]._prefixes


# how much is taken in, and when it ends


def test_no_more_clips_are_taken_than_the_engine_wants():
    taken = []
    clips = (taken.append(i) or ready(str(i), ("Why?",)) for i in range(40))
    num_over = 0
    for _ in asking(num_rows=2).run(InTurn(clips), never):
        num_over += 1
        assert len(taken) <= num_over + 2 * 2
    assert num_over == 40


def test_stop_finishes_what_is_being_answered_and_begins_nothing():
    over, taken = [], []
    clips = (taken.append(i) or ready(str(i), LONG, ("Why?",)) for i in range(40))
    talks = asking(num_rows=2).run(InTurn(clips), lambda: len(over) >= 3)
    for found in talks:
        over.append(found)
    assert 3 <= len(over) <= 5
    assert all(len(found.answers) == len(found.questions) for found in over)
    assert len(taken) <= 6


def test_stop_before_the_first_clip_does_nothing():
    taken = []
    clips = (taken.append(i) or ready(str(i), LONG) for i in range(4))
    assert list(asking().run(InTurn(clips), lambda: True)) == []
    assert taken == []


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_when_nobody_is_interested_it_ends_at_once(num_taken):
    over, stats = [], Stats(1)
    clips = (ready(str(i), LONG) for i in range(1000))
    talks = asking(stats=stats).run(InTurn(clips), never, lambda: len(over) >= num_taken)
    for found in talks:
        over.append(found)
    assert num_taken <= len(over) <= num_taken + 3
    assert stats.counts["prompts"] < 100  # of 4000


def test_error_of_the_stage_before_comes_through():
    def clips():
        yield ready("a", LONG)
        raise ModelError("the tower is gone")

    stage = Ahead(clips(), 2, "test-clips")
    with pytest.raises(ModelError, match="the tower is gone"):
        list(asking().run(stage, never))
    stage.close()


def test_clips_that_come_slowly_are_waited_for():
    def clips():
        for name in "abc":
            time.sleep(0.1)
            yield ready(name, ("Why?",))

    stage = Ahead(clips(), 2, "test-clips")
    assert len(list(asking().run(stage, never))) == 3
    stage.close()
