"""The tokens that end what a model writes: each EOS it was taught, and the end of a chat's turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_envs.model.chat import render_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANSWER = "an answer that no template holds"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a chat template puts behind the assistant's answer, read off a conversation; None if it
    puts none. It is often not the tokenizer's EOS: Gemma's is ``<end_of_turn>`` beside ``<eos>``."""
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    _, _, behind = render_messages(tokenizer, turns, add_generation_prompt=False).rpartition(_ANSWER)
    special = _special(tokenizer)
    places = {behind.find(token): token for token in sorted(special, key=len) if token in behind}
    return special[places[min(places)]] if places else None


def eos_tokens(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
) -> tuple[int, ...]:
    """Return every token that ends a response, the one that usually does first.

    Those are the tokenizer's EOS, in a chat the end of the assistant's turn before it, and what the model's generation
    config adds (Llama 3, Gemma), if it is a special token: a config's untouched default may be a word.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    others = [configured] if isinstance(configured, int) else list(configured or ())
    special = set(_special(tokenizer).values())
    turn = end_of_turn(tokenizer) if chat else None
    found = [token for token in (turn, tokenizer.eos_token_id) if token is not None]
    return tuple(dict.fromkeys([*found, *(token for token in others if token in special)]))


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens by their text: those with a role, and those added as such (ends of turns often are)."""
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return found | {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
