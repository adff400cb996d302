"""Responses of a model as rewards take them, and the one place that puts a reward in units of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lm_envs.reward.base import Standardise, call_reward, reward_name, scores_or_nan
from lm_envs.reward.learned import LearnedReward


@dataclass(frozen=True)
class Samples:
    """Responses of a model to N prompts, as rewards take them."""

    prompts: list[str]
    completions: list[str]
    completion_ids: list[list[int]]
    finish_reasons: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """All of it, as rewards take it."""
        return {name: value for name, value in vars(self).items() if name != "columns"} | self.columns

    def score(self, reward: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        """``(N,)`` float64; a dense reward is summed over the response."""
        found = call_reward(reward, **self.given)
        return found.sum(axis=1) if found.ndim == 2 else found


def in_units_of(reward: Any, samples: Samples) -> Any:
    """The same reward with mean 0 and (population) standard deviation 1 on these samples.

    Samples that the reward does not apply to are left out.

    Raises:
        ValueError: the reward is dense, applies to no sample, or gives all the same score.
    """
    name, scores = reward_name(reward), scores_or_nan(reward, samples.given)
    if scores.ndim == 2:
        raise ValueError(f"reward {name!r} is dense: standardizing it would pay for length")
    return standardised(reward, *moments(scores[~np.isnan(scores)], name))


def moments(scores: np.ndarray[Any, np.dtype[np.float64]], name: str) -> tuple[float, float]:
    """The mean and the population standard deviation of a reward's scores of N samples, ``(N,)`` float64.

    Raises:
        ValueError: there are no scores, or all are the same up to the rounding of float32; ``name`` is the reward's.
    """
    if not len(scores):
        raise ValueError(f"reward {name!r} applies to none of the reference's samples")
    mean, std = float(scores.mean()), float(scores.std())
    if not std > 1e-6 * max(1e-3, abs(mean)):
        raise ValueError(
            f"reward {name!r} gives all {len(scores)} samples of the reference the score {mean:.6g}: it cannot tell "
            "them apart, so there is nothing to learn from it (a reward model may need more steps of training)"
        )
    return mean, std


def standardised(reward: Any, mean: float, std: float) -> Any:
    """``(reward - mean) / std``: a learned reward with other moments of its own, any other one in a
    :class:`~lm_envs.reward.base.Standardise`.

    Raises:
        ValueError: the mean is not finite, or std is not finite and positive.
    """
    made = Standardise(reward, mean, std)  # checks them
    if not isinstance(reward, LearnedReward):
        return made
    inner_mean, inner_std = reward.normalise
    learned = copy.copy(reward)
    learned.normalise = (inner_mean + inner_std * mean, inner_std * std)
    return learned
