"""Measurements of a task that is solved exactly: expectations in the place of samples, and regret."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.exact_gradients import sampled_cosine
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.exact.solver import Exact
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.enumerable import TableLM

_POINTS = 60  # of the optimal frontier


def is_table(task: TextTask) -> bool:
    """Whether a task's model is a table, so that everything about it can be computed and its policy is a table too."""
    return isinstance(task.start, TableLM)


@torch.no_grad()
def measure(exact: Exact, policy: Any) -> dict[str, Any]:
    """The measured columns of a result, exact.

    Args:
        exact: of the environment; its reward is also the judge.
        policy: a trained one, or :class:`~lm_envs.algos.best_of_n.BestOfN`, whose distribution has a closed form.

    Returns:
        ``win_rate`` against the reference, ``gold``, ``proxy``, ``kl`` and ``length``, and ``regret`` and
        ``frontier_gap`` of :class:`~lm_envs.exact.solver.Exact`.
    """
    if isinstance(policy, BestOfN):
        log_p = exact.best_of_n(policy.policy.model, policy.n)
    else:
        log_p = exact.sequences(policy)
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


def prepared(agent: Agent[Any], exact: Exact) -> Agent[Any]:
    """Give an agent that asks for its reference the table, which is faster than the model that holds it."""
    agent.reference = TabularPolicy(exact)
    return agent


def half_way(exact: Exact) -> torch.Tensor:
    """``(X, S, V)``, at each state half the reference and half the optimum. At the start the KL has no gradient, and on
    the optima of other coefficients that of the score is parallel to it: where an algorithm puts the KL, or whether it
    has any, could not be seen there."""
    return torch.logaddexp(exact.log_ref, exact.optimal_policy) - math.log(2)


def gradient(agent: Agent[Any], exact: Exact, *, bandit: bool, seed: int) -> dict[str, float]:
    """``gradient_cosine`` and its standard error, of a fresh agent that samples, its policy being :func:`half_way`."""
    cosine, error = sampled_cosine(agent, exact, bandit=bandit, seed=seed)
    return {"gradient_cosine": cosine, "gradient_cosine_se": error}


# What samples said and is known better now: errors of estimates that are none.
_EXACT = {"win_rate_se": 0.0, "gold_se": 0.0, "proxy_se": 0.0, "kl_se": 0.0, "kl_is_bound": False, "wins": []}


def result(exact: Exact, policy: Any) -> dict[str, Any]:
    """:func:`measure` for a run's result, with the optimal frontier for the figures."""
    return {**measure(exact, policy), **_EXACT, "frontier": frontier(exact)}


def frontier(exact: Exact) -> dict[str, list[float]]:
    """The most reward at each KL: ``kl`` and ``reward``, by rising KL, from the reference to (almost) its end."""
    spread = float(exact.score.amax() - exact.score.amin())
    if not math.isfinite(spread) or spread == 0:
        return {"kl": [0.0], "reward": [float(exact.reference_value)]}
    kl, reward = exact.frontier((spread * np.geomspace(20, 2e-3, _POINTS)).tolist())
    return {"kl": [0.0, *kl.tolist()], "reward": [float(exact.reference_value), *reward.tolist()]}
