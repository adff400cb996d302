"""What the policy-gradient algorithms share: where the KL penalty stands, in the reward or in the loss."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.ops.losses import KLEstimator, kl_estimate
from lm_envs.env.report import text_envs
from lm_envs.trajectories import Trajectories


@dataclass
class PolicyGradientConfig(AgentConfig):
    """Adds where the KL penalty stands."""

    kl_loss: KLEstimator | None = None
    """Put the KL penalty into the loss, by this estimator, and not into the reward; the env then charges none. None
    leaves it in the reward, whose gradient is exact."""


C = TypeVar("C", bound=PolicyGradientConfig)


class PolicyGradient(Agent[C]):
    """An agent whose KL penalty may be a term of the loss; only the estimator "full" asks for :attr:`reference`."""

    @property
    def kl_in_reward(self) -> bool:
        return self.config.kl_loss is None

    def settle_kl_coef(self, env: Any) -> float | None:
        if not self.kl_in_reward:
            if not text_envs(env):
                raise ValueError(
                    f"{self.name}: kl_loss={self.config.kl_loss!r} needs a reference, and this env has none; "
                    "set kl_loss=None and kl_coef=None"
                )
            if self.config.kl_loss == "full" and self.reference is None:
                self.reference = reference_policy(env)
        return super().settle_kl_coef(env)

    def kl_penalty(self, traj: Trajectories, now: Any) -> Tensor:
        """``coefficient * KL`` per position, ``(B, T)``; zeros where the penalty is in the reward.

        Raises:
            ValueError: the coefficient or the reference is not known.
        """
        kind = self.config.kl_loss
        if kind is None:
            return torch.zeros_like(now.logprob)
        coef = self.kl_coefficient()
        if kind == "full":
            if self.reference is None:
                raise ValueError(f"{self.name}: kl_loss='full' needs a reference; no env was seen yet: set .reference")
            with torch.no_grad():
                reference = self.reference.evaluate(traj).log_probs()
            return coef * kl_estimate(kind, now.log_probs(), reference, traj.mask)
        if traj.ref_logprob is None:
            raise ValueError(f"{self.name}: kl_loss={kind!r} needs Trajectories.ref_logprob, and these have none")
        return coef * kl_estimate(kind, now.logprob, traj.ref_logprob, traj.mask)


def reference_policy(env: Any) -> Any:
    """The frozen reference of a text env, as a policy that evaluates trajectories."""
    from lm_envs.algos.policies.language_model import LMPolicy  # here, because control needs no transformers

    mdp = text_envs(env)[0].mdp
    return LMPolicy.for_mdp(mdp, mdp.reference)
