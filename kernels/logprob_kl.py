"""Vocabulary arithmetic of RLHF: sampled log-probability, entropy and exact KL from logits.

The one place where a softmax over the vocabulary is taken; everything else calls it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogprobKL(NamedTuple):
    """Per-position results, nats; ``ref_logprob`` and ``kl`` are None in the single-model form."""

    logprob: Tensor
    ref_logprob: Tensor | None
    entropy: Tensor
    kl: Tensor | None


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log_softmax(logits / temperature)`` over the last axis, float32 at least.

    Args:
        logits: ``(..., V)`` floating; -inf excludes a token.
        temperature: positive.

    Returns:
        ``(..., V)`` float32, or float64 for float64 logits.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def logprob_kl(
    logits: Tensor, ref_logits: Tensor | None, ids: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> LogprobKL:
    r"""Sampled log-probabilities, entropy and exact reverse KL.

    .. math::
        \log\pi(a) = z_a/T - \log\sum_v e^{z_v/T}, \quad
        H = -\sum_v \pi_v \log\pi_v, \quad
        KL(\pi\|q) = \sum_v \pi_v (\log\pi_v - \log q_v)

    A token of zero probability contributes zero to ``H`` and ``KL``; where the reference excludes a token that the
    policy does not, ``KL`` is +inf. Differentiable in ``logits`` (and in ``ref_logits`` if it asks for a gradient).

    Args:
        logits: ``(..., V)`` of the policy; -inf excludes a token.
        ref_logits: ``(..., V)`` of the reference, or None.
        ids: ``(...)`` int64, the sampled tokens.
        temperature: divides both logits.
        mask: ``(...)`` bool; results are 0 where it is False, whatever the logits hold there.

    Returns:
        four tensors of the shape of ``ids``, float32 (float64 in, float64 out).

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and ids {tuple(ids.shape)} do not fit: expected (..., V) and (...)"
        )
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} differ: "
            "policy and reference need the same vocabulary"
        )
    if mask is not None:  # before any arithmetic: NaN times zero is NaN
        logits = torch.where(mask.unsqueeze(-1), logits, torch.zeros_like(logits))
        ids = torch.where(mask, ids, torch.zeros_like(ids))
        if ref_logits is not None:
            ref_logits = torch.where(mask.unsqueeze(-1), ref_logits, torch.zeros_like(ref_logits))
    log_p = log_softmax(logits, temperature)
    p = log_p.exp()
    possible = p > 0
    finite = log_p.masked_fill(~possible, 0.0)  # 0 * -inf would be NaN, in the gradient too
    entropy = -(p * finite).sum(-1)
    logprob = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    ref_logprob = kl = None
    if ref_logits is not None:
        log_q = log_softmax(ref_logits, temperature)
        ref_logprob = log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        kl = (p * (finite - log_q.masked_fill(~possible, 0.0))).sum(-1)
    if mask is not None:
        zero = torch.zeros((), dtype=logprob.dtype, device=logprob.device)
        logprob, entropy = torch.where(mask, logprob, zero), torch.where(mask, entropy, zero)
        if ref_logprob is not None and kl is not None:
            ref_logprob, kl = torch.where(mask, ref_logprob, zero), torch.where(mask, kl, zero)
    return LogprobKL(logprob, ref_logprob, entropy, kl)
