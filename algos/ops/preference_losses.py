"""Ranking losses: pure functions on the scores and ranks of groups. Bradley-Terry's is in :mod:`lm_envs.training`."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_envs.algos.ops.advantages import masked
from lm_envs.training import bradley_terry_loss


def plackett_luce_loss(scores: Tensor, rank: Tensor) -> Tensor:
    """``-sum_k [s_(k) - log sum_{j >= k} exp s_(j)]``, the mean over groups, ``s_(k)`` the score of the k-th best.

    The best is chosen among all, the next among the rest, and so on (Plackett 1975; Luce 1959). With two texts this is
    the Bradley-Terry loss. Unlike the mean over pairs it grows with K, as a log-likelihood.

    Args:
        scores: ``(G, K)``.
        rank: ``(G, K)`` int64, 0 is best, without ties in a group; negative ranks mark absent texts.
    """
    order = torch.where(rank < 0, rank.max() + 1, rank).argsort(dim=1)
    here = (rank >= 0).gather(1, order)
    ordered = scores.gather(1, order)
    low = torch.finfo(scores.dtype).min
    rest = masked(ordered, here, low).flip(1).logcumsumexp(dim=1).flip(1)
    return masked(rest - ordered, here).sum() / len(scores)


def dpo_loss(log_ratio: Tensor, rank: Tensor, beta: float) -> Tensor:
    """``-log sigmoid(beta * (D_w - D_l))``, the mean over groups of the mean over their pairs (Rafailov et al. 2023,
    "Direct preference optimization", eq. 7). ``log 2`` where the policy is the reference.

    Args:
        log_ratio: ``(G, K)``, ``D = sum_t log pi - log ref`` of each response.
        rank: ``(G, K)`` int64, 0 is best; equal ranks make no pair, negative ranks mark absent responses.
        beta: coefficient of the implicit KL penalty.
    """
    return bradley_terry_loss(beta * log_ratio, rank)
