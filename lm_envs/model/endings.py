"""The tokens that end a response: each EOS that the model was taught, and the end of a chat's turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_envs.model.chat import render_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANSWER = "an answer that no template holds"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that a chat template puts behind the assistant's answer, or None.

    It often differs from the tokenizer's EOS: Gemma has ``<end_of_turn>`` beside ``<eos>``.
    """
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    _, _, behind = render_messages(tokenizer, turns, add_generation_prompt=False).rpartition(_ANSWER)
    special = _special(tokenizer)
    places = {behind.find(token): token for token in sorted(special, key=len) if token in behind}
    return special[places[min(places)]] if places else None


def eos_tokens(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
) -> tuple[int, ...]:
    """Return every token that ends a response, the usual one first.

    Those are, in a chat, the end of the assistant's turn, the tokenizer's EOS, and those of the model's generation
    config (Llama 3, Gemma) that are special tokens: a config's default may be a word.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    others = [configured] if isinstance(configured, int) else list(configured or ())
    special = set(_special(tokenizer).values())
    turn = end_of_turn(tokenizer) if chat else None
    found = [token for token in (turn, tokenizer.eos_token_id) if token is not None]
    return tuple(dict.fromkeys([*found, *(token for token in others if token in special)]))


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return special tokens by their text: those with a role, and added ones, as ends of turns often are."""
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return found | {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
