"""A2C: one on-policy step per batch, with a learned value."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lm_envs.algos.engine.batching import Before, rewards
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.policy_gradient import PolicyGradient, PolicyGradientConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import masked_mean, policy_gradient_loss, value_loss
from lm_envs.algos.policies.critics import ValueFrom, check_value_from, value_from_reward_model
from lm_envs.settings import Finite, NonNegative, Probability, Rate
from lm_envs.trajectories import Trajectories


@dataclass
class A2CConfig(PolicyGradientConfig):
    """Settings of :class:`A2C`; the defaults are for a small language model."""

    learning_rate: Rate = 1e-3
    lam: Probability = 0.95
    """GAE's lambda: 1 is the bootstrapped return minus V, 0 the one-step error."""
    whiten_advantage: bool = True
    """Scale advantages to mean 0 and standard deviation 1 over the batch."""
    critic: Literal["v", "q"] = "v"
    """What the critic learns: V(s), or Q(s, a) for every action; the advantage is then Q(s, a) - E_pi Q(s, .)."""
    value_from: ValueFrom = "policy"
    """What the value function starts from: the policy's trunk, which it shares, with a head at zero; or the reward
    model, as a separate model."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs != 1 or self.minibatches != 1:
            raise ValueError(
                "A2C takes one on-policy step per batch, because its loss has no importance ratio: use ppo for several "
                "epochs or minibatches"
            )
        if self.critic == "q" and self.value_from != "policy":
            raise ValueError("critic='q' has a head on the policy's trunk: set value_from='policy'")


class A2C(PolicyGradient[A2CConfig]):
    """``-A log pi + value_coef * 0.5 (V - target)^2 - entropy_coef * H``, means over tokens (Mnih et al. 2016).

    ``A`` is the GAE advantage and ``target = A + V`` before whitening. With a Q critic
    ``A(s, a) = Q(s, a) - E_pi Q(s, .)``, V stands for ``E_pi Q``, and Q of the action taken learns the same target,
    GAE's lambda-return. An exact Q gives the policy gradient without noise from later rewards; an inexact Q biases it
    (Sutton et al. 2000: unless its features are those of the policy's score).
    """

    Config = A2CConfig
    name = "a2c"
    unit = "token"

    @classmethod
    def prepare_policy(cls, policy: Any, task: Any, config: Any) -> None:
        if config.value_from == "reward_model":
            value_from_reward_model(policy, task)

    def __init__(self, policy: Any, config: A2CConfig | None = None) -> None:
        config = A2CConfig() if config is None else config
        check_value_from(self.name, policy, config.value_from)
        if config.critic == "q":
            policy.use_q_critic()  # before Adam collects the parameters
        super().__init__(policy, config)

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        """Return ``advantage (B, T)`` and ``target (B, T)``."""
        advantage = adv.gae(rewards(traj), before.value, traj.mask, self.config.gamma, self.config.lam)
        target = advantage + before.value[:, :-1]
        if self.config.critic == "q":
            advantage = adv.masked(_chosen(before, traj) - before.value[:, :-1], traj.mask)
        if self.config.whiten_advantage:
            advantage = adv.whiten(advantage, traj.mask)
        return {"advantage": advantage, "target": target}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        """Return the token means of policy gradient, value loss and entropy bonus."""
        config, mask = self.config, traj.mask
        policy = masked_mean(policy_gradient_loss(now.logprob, fixed["advantage"], mask), mask)
        predicted = _chosen(now, traj) if config.critic == "q" else now.value[:, :-1]
        value = masked_mean(value_loss(predicted, fixed["target"], mask), mask)
        entropy = masked_mean(now.entropy, mask)
        loss = policy + config.value_coef * value - config.entropy_coef * entropy
        loss = loss + masked_mean(self.kl_penalty(traj, now), mask)
        return loss, {"policy_loss": policy.detach(), "value_loss": value.detach(), "entropy": entropy.detach()}


def _chosen(evaluation: Any, traj: Trajectories) -> Tensor:
    """``Q(s_t, a_t)``, ``(B, T)``."""
    return evaluation.q_values().gather(-1, traj.actions.unsqueeze(-1)).squeeze(-1)
