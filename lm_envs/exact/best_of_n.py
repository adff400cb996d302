"""The distribution of best-of-n and of its soft form, from scores and probabilities of single responses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEP = 0.1  # of the integral over log t; its error is below rounding


def cumulative(score: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``F^-`` and ``F`` of the score's distribution at each score, ``(L,)``; ``p (L,)`` are probabilities."""
    found, inverse = score.unique(return_inverse=True)
    mass = p.new_zeros(len(found)).index_add(0, inverse, p)
    total = mass.cumsum(dim=0)
    return (total - mass)[inverse], total[inverse]


def log_gain(below: Tensor, upto: Tensor, n: int) -> Tensor:
    """Return ``log p_n(y) / pi(y) = log [F(r)^n - F^-(r)^n] / (F - F^-)`` of best-of-n, given ``F^-`` and ``F`` at the
    scores (Stiennon et al. 2020, appendix G, extended to ties); for continuous scores ``log n + (n - 1) log F``.

    The quotient is computed as ``F^(n-1) sum_k (F^- / F)^k``, whose logarithm keeps precision and does not underflow.
    """
    ratio = below / upto.clamp(min=torch.finfo(upto.dtype).tiny)
    factor = torch.zeros_like(upto)
    for _ in range(n):
        factor = factor * ratio + 1
    return torch.xlogy(torch.full_like(upto, n - 1), upto) + factor.log()


def soft_log_gain(score: Tensor, p: Tensor, n: int, temperature: float) -> Tensor:
    r"""Return ``log p(y) / pi(y)``, ``(L,)``, where one of n samples is chosen with a probability proportional to
    ``w = e^{r / temperature}`` (Verdun et al. 2025, "Soft best-of-n sampling for model alignment").

    ``n w E[1 / (w + W)]`` with W the sum of the other samples' weights, as
    ``n w \int_0^\infty e^{-wt} E[e^{-w' t}]^{n-1} dt`` by the trapezoidal rule in ``log t``.
    """
    log_w = (score - score.max()) / temperature
    s = torch.arange(-45.0, 5.0 - float(log_w.min()), _STEP, dtype=score.dtype)
    decay = -(log_w[:, None] + s).exp()  # -w t
    others = (p.log()[:, None] + decay).logsumexp(dim=0)
    return math.log(n * _STEP) + log_w + (decay + (n - 1) * others + s).logsumexp(dim=1)
