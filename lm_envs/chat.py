"""Prompts given as messages, in the words of a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    """The text of a conversation, special tokens spelled out (so it is tokenized with ``add_special_tokens=False``).

    Args:
        messages: ``role`` and ``content`` each.
        add_generation_prompt: end with what begins the assistant's next turn.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "prompts are given as messages, and the tokenizer has no chat template: set tokenizer.chat_template and "
            "save it again, or give the prompts as text"
        )
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the chat template cannot render these messages: {error}") from error
    return text
