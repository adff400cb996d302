"""Teacher-forced scoring of given responses: one forward for all positions, logits only where a response token
stands."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm_envs.kernels.logprob_kl import logprob_kl
from lm_envs.model.decoding import forbid_early_eos, keep_top
from lm_envs.model.encoder_decoder import is_encoder_decoder, teacher_forced
from lm_envs.model.tokens import EosIds, accepted, head_inputs, model_inputs

# Scored at a time, by whether it is CUDA. More is no faster on a CPU, and takes memory that must be mapped first.
LOGITS = {False: 2**22, True: 2**28}
TOKENS = {False: 2**10, True: 2**17}


def rows_at_once(width: int, device: torch.device) -> int:
    """How many texts of ``width`` tokens one forward without gradients should read."""
    return max(1, TOKENS[device.type == "cuda"] // max(width, 1))


def response_logits(
    model: PreTrainedModel, prompt: Tensor, response: Tensor, *, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits that predict each response token, and the hidden states they come from.

    Args:
        prompt: ``(B, P)`` int64, left-padded with -1.
        response: ``(B, T)`` int64, right-padded with -1.
        hidden: also return the last hidden states.

    Returns:
        logits ``(B, T, V)`` and, if asked, hidden ``(B, T, d)``: position t stands *before* token t. What lies beyond a
        row's end is meaningless.
    """
    steps, given = response.shape[1], _inputs(model, prompt, response)
    if not hidden:
        return model(**given).logits[:, -steps:], None
    with head_inputs(model) as seen:  # where the model takes logits_to_keep, the response's positions alone
        logits = model(**given).logits
    return logits[:, -steps:], seen[0][:, -steps:]


def _inputs(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> dict[str, object]:
    inputs = (teacher_forced if is_encoder_decoder(model) else _causal_inputs)(model, prompt, response)
    return accepted(model, **inputs, logits_to_keep=response.shape[1], use_cache=False)


def _causal_inputs(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> dict[str, Tensor]:
    obs = torch.cat([prompt, response[:, :-1]], dim=1)
    inputs = model_inputs(obs)
    if bool((prompt >= 0).all()):
        # Nothing on the left to hide, and what is on the right is never looked at: plain causal attention is faster.
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(obs)}
    return inputs


def picked_logits(
    model: PreTrainedModel, prompt: Tensor, response: Tensor, row: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits that predict single response tokens; the head is computed for those alone.

    Args:
        prompt: ``(B, P)`` int64, left-padded with -1.
        response: ``(B, T)`` int64, right-padded with -1.
        row: ``(N,)`` int64, which text.
        position: ``(N,)`` int64, which of its tokens; the logits stand *before* it.

    Returns:
        logits ``(N, V)`` and the hidden states ``(N, d)`` they come from.
    """
    given, picked = _inputs(model, prompt, response), []

    def pick(_: object, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        picked.append(states[0][:, -response.shape[1] :][row, position])
        return (picked[0].unsqueeze(0), *states[1:])

    watch = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        return model(**given).logits[0], picked[0]
    finally:
        watch.remove()


@torch.no_grad()
def response_logprob(
    model: PreTrainedModel,
    prompt: Tensor,
    response: Tensor,
    eos_token_id: EosIds,
    *,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
    top_k: int | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Log-probability of every response token under a frozen model, ``(B, T)``, 0 beyond the end.

    ``top_k`` restricts the model to its own likeliest tokens, as
    :attr:`~lm_envs.env.mdp.TextMDP.reference_top_k` does: others have -inf.
    Rows of like length are scored together, ``batch_size`` at a time; None takes as many as keep the logits small.
    """
    lengths = (response >= 0).sum(dim=1)
    order = lengths.argsort(stable=True)
    result = torch.zeros(response.shape, dtype=torch.promote_types(model.dtype, torch.float32), device=response.device)
    if batch_size is None:
        row = response.shape[1] * model.get_output_embeddings().weight.shape[0]
        batch_size = max(1, LOGITS[response.device.type == "cuda"] // row)
        batch_size = min(batch_size, rows_at_once(prompt.shape[1] + response.shape[1], response.device))
    for rows in order.split(batch_size):
        width = max(int(lengths[rows].max()), 1)
        texts, given = _without_empty_columns(prompt[rows]), response[rows, :width]
        mask = given >= 0
        logits, _ = response_logits(model, texts, given)
        position = torch.arange(width, device=logits.device)
        logits = forbid_early_eos(logits, position, eos_token_id, min_new_tokens, in_place=True)
        logits = logits if top_k is None else keep_top(logits, top_k)
        found = logprob_kl(logits, None, given.clamp(min=0), temperature=temperature, mask=mask).logprob
        result[rows, :width] = found.to(result.dtype)
        del logits  # or they stay while the next ones are made
    return result


def _without_empty_columns(prompt: Tensor) -> Tensor:
    return prompt[:, int(((prompt >= 0).any(dim=0).cumsum(0) == 0).sum()) :]
