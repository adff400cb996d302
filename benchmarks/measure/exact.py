"""Measurements of a task that is solved exactly: expectations in the place of samples, and regret."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.exact_gradients import sampled_cosine
from lm_envs.exact.solver import Exact
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.enumerable import TableLM

_POINTS = 60  # of the optimal frontier


def is_table(task: TextTask) -> bool:
    """Whether a task's model is a table, so that everything about it can be computed and its policy is a table too."""
    return isinstance(task.start, TableLM)


@torch.no_grad()
def measure(exact: Exact, policy: Any) -> dict[str, Any]:
    """The measured columns of a result, exact, of a trained policy or of
    :class:`~lm_envs.algos.best_of_n.BestOfN`, whose distribution has a closed form; the reward is also the judge."""
    best = isinstance(policy, BestOfN)
    log_p = exact.best_of_n(policy.policy.model, policy.n) if best else exact.sequences(policy)
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
    """``(X, S, V)``, at each state half the reference and half the optimum. At the start the KL has no gradient, and on
    the optima of other coefficients that of the score is parallel to it: where an algorithm puts the KL, or whether it
    has any, could not be seen there."""
    return torch.logaddexp(exact.log_ref, exact.optimal_policy) - math.log(2)


def gradient(agent: Agent[Any], exact: Exact, *, bandit: bool, seed: int) -> dict[str, float]:
    """``gradient_cosine`` and its standard error, of a fresh agent that samples, its policy being :func:`half_way`."""
    cosine, error = sampled_cosine(agent, exact, bandit=bandit, seed=seed)
    return {"gradient_cosine": cosine, "gradient_cosine_se": error}


def result(exact: Exact, policy: Any) -> dict[str, Any]:
    """:func:`measure` for a run's result, with the optimal frontier for the figures, and no errors of estimates."""
    errors = dict.fromkeys(("win_rate_se", "gold_se", "proxy_se", "kl_se"), 0.0)
    return {**measure(exact, policy), **errors, "kl_is_bound": False, "wins": [], "frontier": frontier(exact)}


def frontier(exact: Exact) -> dict[str, list[float]]:
    """The most reward at each KL: ``kl`` and ``reward``, by rising KL, from the reference to (almost) its end."""
    spread = float(exact.score.amax() - exact.score.amin())
    if not math.isfinite(spread) or spread == 0:
        return {"kl": [0.0], "reward": [float(exact.reference_value)]}
    kl, reward = exact.frontier((spread * np.geomspace(20, 2e-3, _POINTS)).tolist())
    return {"kl": [0.0, *kl.tolist()], "reward": [float(exact.reference_value), *reward.tolist()]}
