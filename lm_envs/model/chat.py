"""Chat messages as text, by a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Text = str | list[Message]


class BadExample(ValueError):
    """One example of the user's data is wrong; others may be usable."""


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    """Write a conversation as one text with special tokens: encode it with ``add_special_tokens=False``.

    Raises:
        ValueError: the tokenizer has no chat template.
        BadExample: the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so it cannot read messages: take that "
            "of an instruction-tuned model, set tokenizer.chat_template and save it again, or give text instead"
        )
    try:
        turns = [dict(message) for message in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise BadExample(f"the tokenizer's chat template refuses the conversation: {error}") from error


def split_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Mapping[str, Any]], answer: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """Return the text of a conversation before the assistant's answer, and of the answer with the end of its turn.

    Some templates write more before a coming answer than before a given one (an empty block of thoughts); the answer
    then begins with its content. Errors are those of :func:`render_messages`, and BadExample if the template writes the
    conversation differently once it is answered.
    """
    head = render_messages(tokenizer, prompt, add_generation_prompt=True)
    whole = render_messages(tokenizer, [*prompt, *answer], add_generation_prompt=False)
    start = len(head)
    if not whole.startswith(head) or len(whole) == start:
        before = render_messages(tokenizer, prompt, add_generation_prompt=False)
        start = whole.find(answer[-1]["content"].strip(), len(before)) if whole.startswith(before) else -1
    if start < 0:
        raise BadExample("the chat template writes the conversation before an answer differently once it is answered")
    return head, whole[start:]
