"""Samples as rewards take them, and rewards in units of samples: mean 0, standard deviation 1."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lm_envs.reward.base import Standardise, call_reward, reward_name, scores_or_nan
from lm_envs.reward.learned import LearnedReward


@dataclass(frozen=True)
class Samples:
    """Responses to N prompts, as rewards take them."""

    prompts: list[str]
    completions: list[str]
    completion_ids: list[list[int]]
    finish_reasons: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments for a reward."""
        return {name: value for name, value in vars(self).items() if name != "columns"} | self.columns

    def score(self, reward: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Call a reward, ``(N,)`` float64; a dense one is summed over the response."""
        found = call_reward(reward, **self.given)
        return found.sum(axis=1) if found.ndim == 2 else found


def in_units_of(reward: Any, samples: Samples) -> Any:
    """Shift and scale a reward to mean 0 and (population) standard deviation 1 on the samples to which it applies;
    ValueError if it is dense, applies to no sample, or gives all the same score."""
    name, scores = reward_name(reward), scores_or_nan(reward, samples.given)
    if scores.ndim == 2:
        raise ValueError(f"reward {name!r} is dense: standardizing it would pay for length")
    return standardised(reward, *moments(scores[~np.isnan(scores)], name))


def moments(scores: np.ndarray[Any, np.dtype[np.float64]], name: str) -> tuple[float, float]:
    """Return the mean and the population standard deviation of scores ``(N,)`` of the reward ``name``; ValueError if
    there are none, or all are the same up to the rounding of float32."""
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
    """Return ``(reward - mean) / std``: a learned reward with new moments, or else a :class:`Standardise`."""
    made: Any = Standardise(reward, mean, std)  # raises ValueError for wrong moments
    if not isinstance(reward, LearnedReward):
        return made
    inner_mean, inner_std = reward.normalise
    made = copy.copy(reward)
    made.normalise = (inner_mean + inner_std * mean, inner_std * std)
    return made
