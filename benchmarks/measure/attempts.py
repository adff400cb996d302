"""pass@k: the probability that one of k responses to a prompt is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.algos.engine.settings_by_size import rows_at_once
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.measure.samples import evaluation_env, judged, standard_error
from lm_envs.env.rollout import rollout
from lm_envs.tasks.base import TextTask

_SEED = 1 << 42  # far from those of training and of the other samples


def pass_at_k(samples: int, solved: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """Estimate pass@k without bias: ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, arXiv:2107.03374, equation 1).

    Args:
        samples: n, responses to each prompt.
        solved: ``(P,)``, c, how many of them are right.
        k: 1 to n.

    Returns:
        ``(P,)``; their mean estimates pass@k.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k of {samples} samples needs k from 1 to {samples}, not {k}")
    wrong = samples - np.asarray(solved)
    # C(n - c, k) / C(n, k) is the product over i < k of (n - c - i) / (n - i), and 0 where fewer than k are wrong.
    left = (np.maximum(wrong - i, 0) / (samples - i) for i in range(k))
    return 1 - np.prod(list(left), axis=0)


def measure_attempts(
    task: TextTask, policy: Any, split: str, count: int | None, seed: int, options: Mapping[str, Any]
) -> dict[str, float]:
    """Sample the task's ``attempts`` responses to each of the first ``count`` prompts (None: all) of a split; return
    ``pass@k`` and its standard error over prompts for k = 1, 2, 4, ... and all.

    Empty if the task has no attempts or no judge, or for a policy that is no language model (best-of-n).

    Args:
        options: of the MDP.
    """
    n = task.attempts
    if not n or task.judge is None or not isinstance(policy, LMPolicy):
        return {}
    env = evaluation_env(task, split, **{**options, "group_size": n})
    prompts = len(env.mdp.prompts) if count is None else min(count, len(env.mdp.prompts))
    at_once = max(1, rows_at_once(sum(p.numel() for p in task.reference.parameters())) // n)
    gold = [
        judged(env.mdp, rollout(env, policy, episodes=rows * n, first_episode=first * n, seed=_SEED + seed))[1]
        for first in range(0, prompts, at_once)
        if (rows := min(at_once, prompts - first))
    ]
    solved = (np.concatenate(gold).reshape(prompts, n) >= 1).sum(axis=1)
    powers = [k for k in (2**i for i in range(n.bit_length())) if k < n]
    estimates = {k: pass_at_k(n, solved, k) for k in (*powers, n)}
    means = {f"pass@{k}": float(values.mean()) for k, values in estimates.items()}
    return means | {f"pass@{k}_se": standard_error(values) for k, values in estimates.items()}
