"""Teacher-forced scoring of given responses: one forward for all positions, logits only where a response token
stands."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm_envs.decoding import forbid_early_eos
from lm_envs.kernels.logprob_kl import logprob_kl
from lm_envs.observations import accepted, model_inputs


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
    steps = response.shape[1]
    inputs = model_inputs(torch.cat([prompt, response[:, :-1]], dim=1))
    arguments = accepted(model, **inputs, logits_to_keep=steps, use_cache=False)
    out = model(**arguments, output_hidden_states=hidden)
    states = out.hidden_states[-1][:, -steps:] if hidden else None
    return out.logits[:, -steps:], states


@torch.no_grad()
def response_logprob(
    model: PreTrainedModel,
    prompt: Tensor,
    response: Tensor,
    eos_token_id: int,
    *,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Log-probability of every response token under a frozen model, ``(B, T)``, 0 beyond the end."""
    parts = []
    for start in range(0, len(prompt), batch_size):
        rows = slice(start, start + batch_size)
        mask = response[rows] >= 0
        width = max(int(mask.sum(dim=1).max()), 1)
        logits, _ = response_logits(model, prompt[rows], response[rows, :width])
        position = torch.arange(width, device=logits.device)
        logits = forbid_early_eos(logits, position, eos_token_id, min_new_tokens)
        found = logprob_kl(
            logits, None, response[rows, :width].clamp(min=0), temperature=temperature, mask=mask[:, :width]
        ).logprob
        parts.append(torch.nn.functional.pad(found, (0, response.shape[1] - width)))
    return torch.cat(parts)
