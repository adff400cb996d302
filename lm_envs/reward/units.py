"""A model's responses as rewards take them, and rewards in units of such samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lm_envs.reward.base import Standardise, call_reward
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
    """The same reward with mean 0 and (population) standard deviation 1 on these samples: a learned one with other
    moments, any other one in a :class:`~lm_envs.reward.base.Standardise`.

    Raises:
        ValueError: it gives all of them the same score, or it is dense.
    """
    if not isinstance(reward, LearnedReward):
        return Standardise.against(reward, **samples.given)
    scores = samples.score(reward)
    mean, std = reward.normalise
    moments = (mean + std * float(scores.mean()), std * float(scores.std()))
    if not moments[1] > 1e-6:
        raise ValueError(
            f"reward {reward.__name__!r} gives all {len(scores)} samples of the reference the score {moments[0]:.6g}: "
            "it cannot tell them apart, so there is nothing to learn from it"
        )
    return reward.in_units(*moments)
