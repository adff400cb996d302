"""PPO-ptx: PPO that keeps learning from the texts of its earlier training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_envs.algos.engine.demonstrations import Demonstrations, demonstrations_of
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.settings import Count, NonNegative
from lm_envs.trajectories import Trajectories

if TYPE_CHECKING:
    from lm_envs.tasks.base import TextTask


@dataclass
class PPOPtxConfig(PPOConfig):
    """Settings of :class:`PPOPtx`: PPO's and the mixture's."""

    ptx_coef: NonNegative = 0.5
    """Weight of the likelihood of demonstrations; 0 is PPO."""
    demonstrations: Count = 32
    """Demonstrations per Adam step."""


class PPOPtx(PPO):
    """``PPO's loss - ptx_coef * E[log pi]`` over demonstrations (Ouyang et al. 2022, eq. 2, their gamma).

    Both are means over tokens, so the coefficient compares single tokens. (The paper's 27.8 belongs to its own scale of
    losses.) The paper uses pretraining text, this implementation the demonstrations, which are required unless
    ``ptx_coef`` is 0.
    """

    Config = PPOPtxConfig
    config: PPOPtxConfig
    name = "ppo-ptx"
    mixes_data = True

    def __init__(self, policy: Any, config: PPOPtxConfig | None = None, data: Trajectories | None = None) -> None:
        super().__init__(policy, config)
        self._demonstrations = Demonstrations(self, data, self.config.ptx_coef, self.config.demonstrations)

    @classmethod
    def data_of(cls, task: TextTask, config: PPOPtxConfig) -> Trajectories | None:
        """Return a task's demonstrations; None if ``ptx_coef`` is 0."""
        return demonstrations_of(task) if config.ptx_coef else None

    @classmethod
    def lacks(cls, task: TextTask, config: Any) -> str | None:
        """Demonstrations, where they are to be mixed in and there are none."""
        return "demonstrations" if config.ptx_coef and demonstrations_of(task) is None else None

    def mixture(self, step: int) -> tuple[float, Trajectories] | None:
        """Return demonstrations and their weight ``ptx_coef``."""
        return self._demonstrations.mixture(step)
