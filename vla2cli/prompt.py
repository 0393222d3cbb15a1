"""A question about a clip -> the ids that the language model reads.

The chat template is the checkpoint's own and never guessed. The rendered text is cut at the
placeholder and each chunk is tokenised by itself, as the reference does; the whole text in one go
gives other ids.

Source: upstream VideoLLaMA2@c0bb03a, __init__.py `mm_infer` and mm_utils.py
`tokenizer_multimodal_token`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from vla2_models.videollama2 import PLACEHOLDER_IDS
from vla2cli.errors import ModelError, UsageError
from vla2cli.tokenizer import Tokenizer

# the language models that upstream gives a system message; whether it is used, the template says
SYSTEM_MODEL_TYPES = ("videollama2", "videollama2_mistral", "videollama2_mixtral")

# LLaMA 2's default message, as upstream joins it: one line break between the paragraphs, and two
# spaces after "while being safe."
SYSTEM_MESSAGE = (
    "<<SYS>>\n"
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information.\n"
    "<</SYS>>"
)


@dataclass(frozen=True)
class Turn:
    """A question that was asked and answered before."""

    question: str
    text: str  # the answer


@dataclass(frozen=True)
class Prompt:
    """One rendered conversation, up to where the model goes on."""

    text: str  # with the placeholder in it
    input_ids: tuple[int, ...]  # with a negative id where the media belong


def build_prompt(
    tokenizer: Tokenizer,
    model_type: str,
    question: str,
    *,
    medium: str = "video",
    history: Sequence[Turn] = (),
) -> Prompt:
    """Render and tokenise a question, after what was said before.

    Args:
        tokenizer: the checkpoint's.
        model_type: as in config.json; decides whether the template is offered a system message.
        question: the user's words.
        medium: `video`, with or without its sound, `image`, `audio` or `text` (no media at all).
        history: earlier turns about the same clip.

    Raises:
        UsageError: a question holds the placeholder itself.
        ModelError: the template refuses the conversation, fails, or drops the clip's place.
    """
    placeholder = "" if medium == "text" else f"<{medium}>"
    for text in [*(turn.question for turn in history), question]:
        check_question(text, medium)
    messages = _messages(model_type, placeholder, question, history)
    text = render(tokenizer, messages)
    return Prompt(text, tuple(tokenize(tokenizer, text, placeholder)))


def continue_prompt(tokenizer: Tokenizer, prompt: Prompt, medium: str, answer: str) -> list[int]:
    """Tokenise an answer as it stands behind its prompt, and the token that ends it.

    Where the end of the prompt and the answer would join into other ids than the prompt has, the
    answer is tokenised by itself.
    """
    before = list(prompt.input_ids)
    placeholder = "" if medium == "text" else f"<{medium}>"
    whole = tokenize(tokenizer, prompt.text + answer, placeholder)
    is_behind = whole[: len(before)] == before
    ids = whole[len(before) :] if is_behind else tokenizer.encode(answer)
    return [*ids, tokenizer.eos_token_id]


def check_question(question: str, medium: str) -> None:
    """Refuse a question that holds the placeholder of its own clip."""
    placeholder = f"<{medium}>"
    if medium != "text" and placeholder in question:
        raise UsageError(
            f"the question '{question}' holds '{placeholder}', which stands for the {medium} "
            "itself; leave it out"
        )


def tokenize(tokenizer: Tokenizer, text: str, placeholder: str) -> list[int]:
    """Tokenise the chunks around the placeholder, each by itself, and join them with its id."""
    if not placeholder:
        return tokenizer.encode(text)
    # the first one is the clip's; a later one is a word that the model itself said in `history`
    before, found, after = text.partition(placeholder)
    if not found:
        raise ModelError(f"the checkpoint's chat template drops '{placeholder}', the clip's place")
    return [*tokenizer.encode(before), PLACEHOLDER_IDS[placeholder], *tokenizer.encode(after)]


def render(
    tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
) -> str:
    """Write a conversation as the checkpoint's chat template has it.

    Args:
        tokenizer: the checkpoint's.
        messages: `role` and `content` of each turn.
        add_generation_prompt: whether the text ends where an answer begins.

    Raises:
        ModelError: the template refuses the conversation, or fails.
    """
    try:
        rendered = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
    # the last four: what a template's own arithmetic and look-ups run into
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"the checkpoint's chat template refuses the prompt: {error}") from error
    # the texts of all conversations, then spans that were not asked for
    text: str = rendered[0][0]
    return text


def _messages(
    model_type: str, placeholder: str, question: str, history: Sequence[Turn]
) -> list[dict[str, str]]:
    messages = []
    for turn in history:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.text})
    messages.append({"role": "user", "content": question})
    # the line break stays where there is no placeholder: upstream's habit
    messages[0]["content"] = f"{placeholder}\n{messages[0]['content']}"
    if model_type in SYSTEM_MODEL_TYPES:
        messages.insert(0, {"role": "system", "content": SYSTEM_MESSAGE})
    return messages
