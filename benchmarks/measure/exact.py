"""Measurements of a task that is solved exactly: expectations in place of samples, and regret."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lm_envs.algos.best_of_n import BestOfN
from lm_envs.exact.solver import Exact

_POINTS = 60  # of the optimal frontier
_NO_PROMPTS: dict[str, list[float]] = {"wins": [], "golds": [], "length_gaps": []}  # expectations know none


@torch.no_grad()
def measure(exact: Exact, policy: Any) -> dict[str, Any]:
    """Compute the measured columns of a result exactly, for a trained policy or
    :class:`~lm_envs.algos.best_of_n.BestOfN`, whose distribution has a closed form; the reward is also the judge."""
    best = isinstance(policy, BestOfN)
    log_p = exact.sequences(policy.policy.model if best else policy)
    if best:
        log_p = exact.best_of_n(log_p, policy.n, policy.temperature)
    reward = float(exact.reward(log_p))
    return {
        "win_rate": exact.win_rate(log_p, exact.log_ref),
        "gold": reward,
        "proxy": reward,
        "kl": float(exact.kl(log_p)),
        "length": float((log_p.exp() * exact.mask.sum(dim=1)).sum(dim=1).mean()),
        "regret": exact.regret(log_p),
        "frontier_gap": exact.frontier_gap(log_p),
    }


def half_way(exact: Exact) -> torch.Tensor:
    """Return the log-probabilities ``(X, S, V)`` of half the reference and half the optimum at each state.

    Gradients there show where an algorithm puts the KL, or whether it has any: at the start the KL has no gradient, and
    on the optima of other coefficients the gradient of the score is parallel to it."""
    return torch.logaddexp(exact.log_ref, exact.optimal_policy) - math.log(2)


def result(exact: Exact, policy: Any) -> dict[str, Any]:
    """Return :func:`measure` for a run's result, with the optimal frontier and standard errors of 0."""
    errors = dict.fromkeys(("win_rate_se", "gold_se", "proxy_se", "kl_se"), 0.0)
    return {**measure(exact, policy), **errors, "kl_is_bound": False, **_NO_PROMPTS, "frontier": frontier(exact)}


def frontier(exact: Exact) -> dict[str, list[float]]:
    """Compute the highest reward at each KL: ``kl``, rising from 0 almost to its largest, and ``reward``."""
    spread = float(exact.score.amax() - exact.score.amin())
    if not math.isfinite(spread) or spread == 0:
        return {"kl": [0.0], "reward": [float(exact.reference_value)]}
    kl, reward = exact.frontier((spread * np.geomspace(20, 2e-3, _POINTS)).tolist())
    return {"kl": [0.0, *kl.tolist()], "reward": [float(exact.reference_value), *reward.tolist()]}
