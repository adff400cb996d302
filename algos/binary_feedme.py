"""Binary FeedME: imitate the preferred responses and ignore the others."""

from dataclasses import dataclass
from typing import Any

from lm_envs.algos.engine.comparisons import Comparisons, PreferenceConfig, winners
from lm_envs.algos.sft import SFT
from lm_envs.settings import Rate, Size
from lm_envs.trajectories import Trajectories


@dataclass
class BinaryFeedMEConfig(PreferenceConfig):
    """Settings of :class:`BinaryFeedME`; `episodes` is the number of winners per iteration."""

    learning_rate: Rate = 1e-3
    episodes: Size | None = 64
    """Preferred responses per iteration."""


class BinaryFeedME(SFT):
    """``-log pi(y_w|x)``, the mean over tokens: supervised fine-tuning on the winners (Dubois et al. 2023, AlpacaFarm,
    section 3.2; after OpenAI's FeedME, which imitates the samples that labelers rated highest).

    Raises:
        ValueError: no preferences, or a group without a winner.
    """

    Config = BinaryFeedMEConfig  # type: ignore[assignment]
    name = "binary-feedme"
    preference_data = True

    def __init__(self, policy: Any, config: Any = None, data: Trajectories | None = None) -> None:
        super().__init__(policy, config, winners(Comparisons(self.name, data).data))
