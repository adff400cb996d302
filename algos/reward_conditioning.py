"""Binary reward conditioning: learn responses conditioned on a good or bad token, and sample conditioned on good."""

from dataclasses import dataclass
from typing import Any

from lm_envs.algos.engine.comparisons import Comparisons, PreferenceConfig
from lm_envs.algos.policies.reward_tokens import prepend
from lm_envs.algos.sft import SFT
from lm_envs.settings import Rate, Size
from lm_envs.trajectories import Trajectories

WORSE, BETTER = 0, 1


@dataclass
class RewardConditioningConfig(PreferenceConfig):
    """Settings of :class:`RewardConditioning`; `episodes` is the number of responses per iteration."""

    learning_rate: Rate = 1e-3
    episodes: Size | None = 128
    """Responses, good and bad, per iteration."""


class RewardConditioning(SFT):
    """``-log pi(y_w|+, x)`` and ``-log pi(y_l|-, x)``, the mean over tokens of both; samples on ``+`` (Dubois et al.
    2023, AlpacaFarm, section 3.2; the binary form of Keskar et al. 2019 and Lu et al. 2022).

    The two signs are reward tokens before the prompt (:mod:`lm_envs.algos.policies.reward_tokens`). Before its first
    update the policy samples without a token.

    ``data`` are preferences; the best of a group are good, the rest bad. Without data, simulated annotators rank pairs
    of the task's reference's samples.

    Raises:
        ValueError: no preferences, or a group without a pair.
    """

    Config = RewardConditioningConfig  # type: ignore[assignment]
    name = "reward-conditioning"
    preference_data = True

    def __init__(self, policy: Any, config: Any = None, data: Trajectories | None = None) -> None:
        held = Comparisons(self.name, data).data
        policy.add_reward_tokens(2)  # before Adam collects the parameters
        super().__init__(policy, config, signed(held, policy.vocabulary))

    def update(self, traj: Trajectories) -> dict[str, float]:
        metrics = super().update(traj)
        self.policy.condition_on(BETTER)  # what it samples on from now on
        return metrics


def signed(data: Trajectories, vocabulary: int) -> Trajectories:
    """Return preferences as demonstrations whose prompts begin with ``+`` if the rank is 0, else with ``-``."""
    assert data.rank is not None and data.prompt is not None and data.response is not None
    rows = data.select(slice(None))
    rows.prompt = prepend(data.prompt, vocabulary + (data.rank == 0).long())
    rows.obs = rows.group = rows.rank = None
    return rows
