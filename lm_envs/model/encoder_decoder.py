"""The inputs of encoder-decoders (T5, BART and others): the encoder reads prompts, the decoder responses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_envs.model.tokens import context_of, names_argument


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder for the prompt (a BART loaded as a causal LM has none)."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and names_argument(model, "decoder_input_ids")


def decoder_prefix(model: PreTrainedModel) -> list[int]:
    """Return the tokens before every response, which are not actions: the start token, and a forced one such as the
    target language of mBART and NLLB. ValueError if the model does not name the first."""
    configs = model.config, getattr(model, "generation_config", None)
    start, forced = (
        next((token for config in configs if (token := getattr(config, name, None)) is not None), None)
        for name in ("decoder_start_token_id", "forced_bos_token_id")
    )
    if start is None:
        raise ValueError(
            f"the {type(model).__name__} does not say which token starts its decoder: set "
            "model.config.decoder_start_token_id (T5 starts with its pad token, BART with its EOS)"
        )
    return [int(start)] if forced is None else [int(start), int(forced)]


def decoder_tokens(model: PreTrainedModel, response: Tensor) -> Tensor:
    """Return the decoder's ids ``(B, K + T)``: the prefix of K tokens, then the response ``(B, T)``, padded with -1."""
    prefix = response.new_tensor(decoder_prefix(model)).expand(len(response), -1)
    return torch.cat([prefix, response], dim=1)


def encoder_inputs(prompt: Tensor) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` ``(B, S)`` of prompts ``(B, P)`` padded with -1, moved to the left.

    Encoders have no ``position_ids``, and absolute positions (BART) count from the first column. S is the longest
    prompt's length.
    """
    present = prompt >= 0
    width = int(present.sum(dim=1).max())
    order = present.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    ids, mask = prompt.gather(1, order).clamp(min=0), present.gather(1, order).long()
    return {"input_ids": ids, "attention_mask": mask}


def teacher_forced(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> dict[str, Tensor]:
    """Return inputs whose last T logits predict the response ``(B, T)``, right-padded, to ``(B, P)``, left-padded."""
    # A decoder looks to the left only, so padding behind a response needs no mask.
    tokens = decoder_tokens(model, response[:, :-1]).clamp(min=0)
    return {**encoder_inputs(prompt), "decoder_input_ids": tokens}


def room_for(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> tuple[int, int | None]:
    """Return the positions that these tokens need, and those that the model has, None for no limit.

    A causal model reads prompt and response as one text, an encoder-decoder as two.
    """
    if is_encoder_decoder(model):
        return max(prompt_tokens, new_tokens + len(decoder_prefix(model)) - 1), context_of(model)
    return prompt_tokens + new_tokens, context_of(model)
