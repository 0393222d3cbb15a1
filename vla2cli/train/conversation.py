"""A conversation of the training data -> token ids, and which of them are learned.

    chat    the checkpoint's template, as when it is asked; the answers are learned
    plain   the turns with a space between them, no template; all the text is learned

A video's plain form keeps the instruction, an audio's drops it: `Form`.

Source: upstream VideoLLaMA2@c0bb03a, train.py, `preprocess_multimodal`, `preprocess` and
`preprocess_plain`; for audio its branch audio_visual at 8cedfbd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vla2cli.errors import InputError
from vla2cli.prompt import render, tokenize
from vla2cli.tokenizer import Tokenizer

IGNORED = -100  # the label of a token that is not learned

ROLES = {"human": "user", "gpt": "assistant"}  # the data's name of a speaker -> the template's

Form = Literal["chat", "plain", "plain-caption"]


@dataclass(frozen=True, slots=True)  # there may be millions
class Utterance:
    """One turn of a conversation, as the data has it."""

    speaker: str  # "human" or "gpt"
    text: str  # may hold the placeholder of the conversation's medium


@dataclass(frozen=True)
class Row:
    """One conversation as the network learns it."""

    input_ids: tuple[int, ...]  # a negative id where the media belong
    labels: tuple[int, ...]  # as long; `IGNORED`, or the id itself where it is learned

    def __post_init__(self) -> None:
        """Refuse a row whose parts differ in length."""
        if len(self.input_ids) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for {len(self.input_ids)} input_ids")

    @property
    def place(self) -> int | None:
        """Where the media belong; None in a row without any."""
        return next((i for i, token in enumerate(self.input_ids) if token < 0), None)


def build_row(
    tokenizer: Tokenizer, conversation: Sequence[Utterance], medium: str, form: Form = "chat"
) -> Row:
    """Tokenise a conversation about one medium.

    Args:
        tokenizer: of the checkpoint that is trained.
        conversation: turn after turn, people and the model taking turns.
        medium: `video`, `image`, `audio` or `text`.
        form: `chat`; `plain`, which teaches the instruction as well as the answer; or
            `plain-caption`, which leaves the instruction out.

    Raises:
        InputError: nothing can be learned from it as it is.
        ModelError: the chat template refuses it.
    """
    placeholder = "" if medium == "text" else f"<{medium}>"
    turns = move_tags(conversation, placeholder) if placeholder else list(conversation)
    if turns and turns[0].speaker != "human":
        turns = turns[1:]
    _check(turns, placeholder)
    if form == "chat":
        return _chat_row(tokenizer, turns, placeholder)
    return _plain_row(tokenizer, turns, placeholder, keeps_instruction=form == "plain")


def move_tags(conversation: Sequence[Utterance], placeholder: str) -> list[Utterance]:
    """Put the placeholder in front of each turn that holds it, on a line of its own."""
    return [
        Utterance(turn.speaker, _move_tag(turn.text, placeholder))
        if placeholder in turn.text
        else turn
        for turn in conversation
    ]


def _move_tag(text: str, placeholder: str) -> str:
    words = text.replace(placeholder, "").strip()
    return f"{placeholder}\n{words}".strip()


def _check(turns: Sequence[Utterance], placeholder: str) -> None:
    if not turns or len(turns) % 2:
        raise _bad(f"has {len(turns)} turns from the first question on, expected pairs")
    for number, (turn, speaker) in enumerate(zip(turns, list(ROLES) * (len(turns) // 2)), 1):
        if turn.speaker != speaker:
            raise _bad(f"turn {number} is from '{turn.speaker}', expected '{speaker}'")
    if placeholder:
        places = sum(turn.text.count(placeholder) for turn in turns)
        if places != 1:
            raise _bad(f"has {places} turns with '{placeholder}', expected 1")


def _chat_row(tokenizer: Tokenizer, turns: Sequence[Utterance], placeholder: str) -> Row:
    messages = [{"role": ROLES[turn.speaker], "content": turn.text} for turn in turns]

    def ids(num_turns: int, *, asks: bool = False) -> list[int]:
        text = render(tokenizer, messages[:num_turns], add_generation_prompt=asks)
        # a later turn may bring the medium
        return tokenize(tokenizer, text, placeholder if placeholder in text else "")

    input_ids = ids(len(turns))
    # a template must not lose the medium, nor a word that looks like one add another
    if sum(token < 0 for token in input_ids) != bool(placeholder):
        raise _bad(f"lost '{placeholder}' in the checkpoint's chat template")
    labels = list(input_ids)
    learned_up_to = 0
    # upstream's count: each beginning of the conversation is rendered and tokenised anew
    for answer in range(1, len(turns), 2):
        start = min(len(ids(answer, asks=True)), len(labels))
        labels[learned_up_to:start] = [IGNORED] * (start - learned_up_to)
        learned_up_to = len(ids(answer + 1))
    return Row(tuple(input_ids), tuple(labels))


def _plain_row(
    tokenizer: Tokenizer, turns: Sequence[Utterance], placeholder: str, *, keeps_instruction: bool
) -> Row:
    if not placeholder or placeholder not in turns[0].text:
        raise _bad("has no medium in its first turn, which the plain form needs")
    if len(turns) != 2:
        raise _bad(f"has {len(turns)} turns, expected a question and an answer for the plain form")
    question = turns[0].text if keeps_instruction else placeholder
    input_ids = tokenize(tokenizer, f"{question} {turns[1].text}", placeholder)
    return Row(tuple(input_ids), tuple(IGNORED if i < 0 else i for i in input_ids))


def _bad(what: str) -> InputError:
    return InputError(f"the conversation {what}", kind="conversation", stage="preprocess")
