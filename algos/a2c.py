"""A2C: one on-policy step per batch, with a learned value."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.policy_gradient import ActorCritic, ActorCriticConfig
from lm_envs.algos.ops.advantages import masked
from lm_envs.algos.ops.losses import policy_gradient_loss, value_loss
from lm_envs.settings import Rate
from lm_envs.trajectories import Trajectories


@dataclass
class A2CConfig(ActorCriticConfig):
    """Settings of :class:`A2C`; the defaults are for a small language model."""

    one_step = True

    learning_rate: Rate = 1e-3
    critic: Literal["v", "q"] = "v"
    """What the critic learns: V(s), or Q(s, a) for every action; the advantage is then Q(s, a) - E_pi Q(s, .)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic == "q" and self.value_from != "policy":
            raise ValueError("critic='q' has a head on the policy's trunk: set value_from='policy'")


class A2C(ActorCritic[A2CConfig]):
    """``-A log pi + value_coef * 0.5 (V - target)^2 - entropy_coef * H``, means over tokens (Mnih et al. 2016).

    ``A`` is the GAE advantage and ``target = A + V`` before whitening. With a Q critic
    ``A(s, a) = Q(s, a) - E_pi Q(s, .)``, V stands for ``E_pi Q``, and Q of the action taken learns the same target,
    GAE's lambda-return. An exact Q gives the policy gradient without noise from later rewards; an inexact Q biases it
    (Sutton et al. 2000: unless its features are those of the policy's score).
    """

    Config = A2CConfig
    name = "a2c"

    def __init__(self, policy: Any, config: A2CConfig | None = None) -> None:
        config = A2CConfig() if config is None else config
        if config.critic == "q":
            policy.use_q_critic()  # before Adam collects the parameters
        super().__init__(policy, config)

    def advantage(self, gae: Tensor, traj: Trajectories, before: Before) -> Tensor:
        if self.config.critic == "v":
            return gae
        return masked(_chosen(before, traj) - before.value[:, :-1], traj.mask)

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        return policy_gradient_loss(logprob, fixed["advantage"], mask)

    def critic_loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> Tensor:
        if self.config.critic == "v":
            return super().critic_loss(traj, now, fixed)
        return value_loss(_chosen(now, traj), fixed["target"], traj.mask)


def _chosen(evaluation: Any, traj: Trajectories) -> Tensor:
    """``Q(s_t, a_t)``, ``(B, T)``."""
    return evaluation.q_values().gather(-1, traj.actions.unsqueeze(-1)).squeeze(-1)
