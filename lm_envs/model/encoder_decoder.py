"""Encoder-decoder models (T5, BART and others) as policies: the encoder reads the prompt, the decoder writes the
response.

What the rest of the project asks of a language model is the same for both kinds: logits before every response token,
and a cache by rows. This file turns prompts and responses into an encoder-decoder's inputs; its rows are in
:mod:`lm_envs.model.kv_cache_cross`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_envs.model.tokens import context_of, names_argument


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder of its own for the prompt (a BART loaded as a causal LM has none)."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and names_argument(model, "decoder_input_ids")


def decoder_prefix(model: PreTrainedModel) -> list[int]:
    """The tokens that stand before every response: the start token, and the first token that generation forces, if any.

    The second is the target language of multilingual models (mBART, NLLB); neither is an action.

    Raises:
        ValueError: the model does not say which token starts the decoder.
    """
    found = {}
    for name in ("decoder_start_token_id", "forced_bos_token_id"):
        given = [getattr(place, name, None) for place in (model.config, getattr(model, "generation_config", None))]
        found[name] = next((token for token in given if token is not None), None)
    start, forced = found.values()
    if start is None:
        raise ValueError(
            f"the {type(model).__name__} does not say which token starts its decoder: set "
            "model.config.decoder_start_token_id (T5 starts with its pad token, BART with its EOS)"
        )
    return [int(start)] if forced is None else [int(start), int(forced)]


def decoder_tokens(model: PreTrainedModel, response: Tensor) -> Tensor:
    """``(B, K + T)`` what the decoder has before it: the prefix of K tokens, then the response ``(B, T)``, -1 where
    there is none."""
    prefix = response.new_tensor(decoder_prefix(model)).expand(len(response), -1)
    return torch.cat([prefix, response], dim=1)


def encoder_inputs(prompt: Tensor) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``(B, S)`` of prompts ``(B, P)`` padded with -1.

    Moved to the left end: the encoders have no ``position_ids``, and where positions are absolute (BART) they are
    counted from the first column. S is the longest prompt's length.
    """
    present = prompt >= 0
    order = present.int().argsort(dim=1, descending=True, stable=True)
    width = int(present.sum(dim=1).max())
    order = order[:, :width]
    return {
        "input_ids": prompt.gather(1, order).clamp(min=0),
        "attention_mask": present.gather(1, order).long(),
    }


def teacher_forced(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> dict[str, Tensor]:
    """Inputs whose last T logits predict the response.

    Args:
        prompt: ``(B, P)`` int64, left-padded with -1.
        response: ``(B, T)`` int64, right-padded with -1.
    """
    # A decoder looks to the left only, so what stands behind a response's end needs no mask.
    tokens = decoder_tokens(model, response[:, :-1]).clamp(min=0)
    return {**encoder_inputs(prompt), "decoder_input_ids": tokens}


def room_for(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> tuple[int, int | None]:
    """How many tokens the model must place in one row of positions, and how many it has, None where it has no limit.

    A causal model reads prompt and response as one text, an encoder-decoder each by itself.
    """
    if is_encoder_decoder(model):
        return max(prompt_tokens, new_tokens + len(decoder_prefix(model)) - 1), context_of(model)
    return prompt_tokens + new_tokens, context_of(model)
