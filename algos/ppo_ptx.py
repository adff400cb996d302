"""PPO-ptx: PPO that keeps learning from the texts of its earlier training."""

from dataclasses import dataclass

from lm_envs.algos.engine.demonstrations import MixesDemonstrations
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.settings import Count, NonNegative


@dataclass
class PPOPtxConfig(PPOConfig):
    """Settings of :class:`PPOPtx`: PPO's and the mixture's."""

    ptx_coef: NonNegative = 0.5
    """Weight of the likelihood of demonstrations; 0 is PPO."""
    demonstrations: Count = 32
    """Demonstrations per Adam step."""


class PPOPtx(MixesDemonstrations, PPO):
    """``PPO's loss - ptx_coef * E[log pi]`` over demonstrations (Ouyang et al. 2022, eq. 2, their gamma).

    Both are means over tokens, so the coefficient compares single tokens. (The paper's 27.8 belongs to its own scale of
    losses.) The paper uses pretraining text, this implementation the demonstrations, which are required unless
    ``ptx_coef`` is 0.
    """

    Config = PPOPtxConfig
    config: PPOPtxConfig
    name = "ppo-ptx"
    mixing_weight = "ptx_coef"
