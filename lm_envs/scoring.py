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
    obs = torch.cat([prompt, response[:, :-1]], dim=1)
    inputs: dict[str, Tensor | None] = dict(model_inputs(obs))
    if bool((prompt >= 0).all()):
        # Nothing on the left to hide, and what is on the right is never looked at: plain causal attention is faster.
        inputs["attention_mask"] = inputs["position_ids"] = None
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    watch = head.register_forward_pre_hook(lambda _, given: seen.append(given[0])) if hidden else None
    try:
        # The head is called on the response's positions alone, and what it is called on are the hidden states.
        out = model(**accepted(model, **inputs, logits_to_keep=steps, use_cache=False))
    finally:
        if watch is not None:
            watch.remove()
    return out.logits[:, -steps:], seen[0][:, -steps:] if seen else None


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
        logits = forbid_early_eos(logits, position, eos_token_id, min_new_tokens, in_place=True)
        found = logprob_kl(
            logits, None, response[rows, :width].clamp(min=0), temperature=temperature, mask=mask[:, :width]
        ).logprob
        parts.append(torch.nn.functional.pad(found, (0, response.shape[1] - width)))
    return torch.cat(parts)
