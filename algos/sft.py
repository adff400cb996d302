"""Supervised fine-tuning: maximum likelihood on demonstrations."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.demonstrations import token_likelihood
from lm_envs.algos.engine.metrics import Metric
from lm_envs.settings import Rate, Size
from lm_envs.trajectories import Rows, Trajectories


@dataclass
class SFTConfig(AgentConfig):
    """Settings of :class:`SFT`; `episodes` is the number of demonstrations per iteration."""

    learning_rate: Rate = 1e-3
    episodes: Size | None = 64
    """Demonstrations per iteration."""


class SFT(Agent[SFTConfig]):
    """``-log pi(a_t|s_t)`` on demonstrations, the mean over tokens.

    Demonstrations, in memory or on disk, are Trajectories without reward, of text (see
    :func:`lm_envs.trajectories.demonstrations`) or of control.
    """

    Config = SFTConfig
    name = "sft"
    unit = "token"
    needs_data = True

    def __init__(self, policy: Any, config: SFTConfig | None = None, data: Rows | None = None) -> None:
        super().__init__(policy, config)
        if data is None or not len(data):
            raise ValueError(
                "sft learns from demonstrations: pass data=Trajectories, see lm_envs.trajectories.demonstrations"
            )
        self.data = data

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        return token_likelihood(traj, now)
