"""Chat messages as the text that a model reads, by its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    """A conversation as one text, special tokens written out: encode it with ``add_special_tokens=False``.

    Args:
        messages: ``{"role": ..., "content": ...}`` each.
        add_generation_prompt: end in what begins an answer of the assistant's.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so it cannot read messages: take that "
            "of an instruction-tuned model, set tokenizer.chat_template and save it again, or give text instead"
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from error


def split_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Mapping[str, Any]], answer: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """The text of a conversation up to where the assistant's answer begins, and that of the answer with its end.

    Raises:
        ValueError: as :func:`render_messages`, or the template writes the conversation differently once it is answered.
    """
    whole = render_messages(tokenizer, [*prompt, *answer], add_generation_prompt=False)
    for opened in (True, False):  # some templates open no answer
        head = render_messages(tokenizer, prompt, add_generation_prompt=opened)
        if whole.startswith(head) and len(whole) > len(head):
            return head, whole[len(head) :]
    raise ValueError(
        "the tokenizer's chat template writes the conversation before the answer differently once it is answered"
    )
