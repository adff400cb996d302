"""PPO-KLPEN: PPO held near the sampling policy by a penalty instead of a clip."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.ops.losses import k3, masked_mean, ppo_penalty_loss
from lm_envs.algos.ppo import Proximal, ProximalConfig
from lm_envs.settings import NonNegative, Positive
from lm_envs.trajectories import Trajectories


@dataclass
class PPOKLPenConfig(ProximalConfig):
    """Settings of :class:`PPOKLPen`; the defaults are for a small language model."""

    old_kl_coef: NonNegative = 1.0
    """Initial weight of the KL to the sampling policy."""
    old_kl_target: Positive | None = 0.01
    """Nats per token that a batch should move the policy: the weight is doubled after a batch that moved it more than
    1.5 times as far, and halved after one that moved it less than 2/3 as far. None keeps the weight."""


class PPOKLPen(Proximal[PPOKLPenConfig]):
    """``-A rho + old_kl_coef * KL(old || new)`` and PPO's value loss and entropy bonus (Schulman et al. 2017, eq. 8
    and the rule behind it, section 4).

    The KL is estimated on the batch, which the old policy sampled: ``rho - 1 - log rho`` and its gradient are unbiased.
    It is independent of the KL penalty against the *reference*.
    """

    Config = PPOKLPenConfig
    name = "ppo-klpen"

    def __init__(self, policy: Any, config: PPOKLPenConfig | None = None) -> None:
        super().__init__(policy, config)
        self.old_kl_coef = self.config.old_kl_coef

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        return ppo_penalty_loss(logprob, fixed["old_logprob"], fixed["advantage"], mask, self.old_kl_coef)

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        self._old = before.logprob  # to measure the update
        return super().prepare(traj, before)

    def update(self, traj: Trajectories) -> dict[str, float]:
        used = self.old_kl_coef
        metrics = super().update(traj) | {"old_kl_coef": used}
        if self.config.old_kl_target is None:
            return metrics
        traj = traj.to(self._old.device)
        with torch.no_grad():
            now = Before(self.policy, traj, self.config.micro_batch).logprob
            moved = float(masked_mean(k3(self._old, now, traj.mask), traj.mask))
        self.old_kl_coef = adapted(used, moved, self.config.old_kl_target)
        return metrics | {"old_kl": moved}

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"old_kl_coef": self.old_kl_coef}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.old_kl_coef = values["old_kl_coef"]


def adapted(coef: float, kl: float, target: float) -> float:
    """Halve the weight if the policy moved by less than ``target / 1.5``, double it above ``1.5 * target``."""
    if kl < target / 1.5:
        return coef / 2
    return coef * 2 if kl > target * 1.5 else coef
