"""PPO: several epochs per batch within a clipped distance of the policy that sampled it."""

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from lm_envs.algos.engine.batching import Before, rewards
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.policy_gradient import PolicyGradient, PolicyGradientConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import masked_mean, ppo_clip_loss, ratio_metrics, value_loss
from lm_envs.algos.policies.critics import ValueFrom, check_value_from, value_from_reward_model
from lm_envs.settings import Count, Finite, NonNegative, Positive, Probability
from lm_envs.trajectories import Trajectories


@dataclass
class ProximalConfig(PolicyGradientConfig):
    """What PPO and PPO-KLPEN share; the defaults are for a small language model."""

    epochs: Count = 4
    minibatches: Count = 2
    lam: Probability = 0.95
    """GAE's lambda: 1 is the bootstrapped return minus V, 0 the one-step error."""
    value_clip: Positive | None = 0.2
    """Distance from the batch's old value beyond which a value is clipped. None does not clip."""
    value_from: ValueFrom = "policy"
    """What the value function starts from: the policy's trunk, which it shares, with a head at zero; or the reward
    model, as a separate model."""
    whiten_advantage: bool = True
    """Scale advantages to mean 0 and standard deviation 1 over the batch."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""
    kl_stop: NonNegative | None = None
    """KL of a minibatch to the sampling policy, in nats per token, that ends the epochs on a batch. None: no limit."""


C = TypeVar("C", bound=ProximalConfig)


class Proximal(PolicyGradient[C]):
    """Several epochs per batch on a surrogate objective, with a learned value: what PPO and PPO-KLPEN share.

    ``surrogate + value_coef * value loss - entropy_coef * H``, means over tokens. ``rho`` is the ratio to the policy
    before the update, re-evaluated on the batch, so that it is exactly 1 at first whatever the precision of sampling.
    """

    unit = "token"

    @classmethod
    def prepare_policy(cls, policy: Any, task: Any, config: Any) -> None:
        if config.value_from == "reward_model":
            value_from_reward_model(policy, task)

    def __init__(self, policy: Any, config: C | None = None) -> None:
        super().__init__(policy, config)
        check_value_from(self.name, policy, self.config.value_from)

    @property
    def ratio_clip(self) -> float | None:
        """The distance from 1 beyond which the metric counts a ratio as clipped; None without a clip."""
        return None

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        """The policy's loss per position, ``(B, T)``."""
        raise NotImplementedError

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        """Return ``advantage``, ``target``, ``old_logprob`` and ``old_value``, all ``(B, T)``."""
        value = before.value[:, :-1]
        advantage = adv.gae(rewards(traj), before.value, traj.mask, self.config.gamma, self.config.lam)
        target = advantage + value
        if self.config.whiten_advantage:
            advantage = adv.whiten(advantage, traj.mask)
        return {"advantage": advantage, "target": target, "old_logprob": before.logprob, "old_value": value}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        """Return the token means of the surrogate, the clipped value loss and the entropy bonus."""
        config, mask = self.config, traj.mask
        policy = masked_mean(self.surrogate(now.logprob, fixed, mask), mask)
        value = masked_mean(
            value_loss(now.value[:, :-1], fixed["target"], mask, fixed["old_value"], config.value_clip), mask
        )
        entropy = masked_mean(now.entropy, mask)
        loss = policy + config.value_coef * value - config.entropy_coef * entropy
        loss = loss + masked_mean(self.kl_penalty(traj, now), mask)
        moved = ratio_metrics(now.logprob, fixed["old_logprob"], mask, self.ratio_clip)
        parts = {"policy_loss": policy.detach(), "value_loss": value.detach(), "entropy": entropy.detach()}
        return loss, {**parts, **moved}

    def should_stop(self, metrics: dict[str, float]) -> bool:
        """Return whether the KL to the sampling policy exceeds ``kl_stop``."""
        return self.config.kl_stop is not None and metrics["approx_kl"] > self.config.kl_stop


@dataclass
class PPOConfig(ProximalConfig):
    """Settings of :class:`PPO`; the defaults are for a small language model."""

    clip: Positive = 0.2
    """Distance of the ratio to the sampling policy from 1 beyond which it is clipped."""


class PPO(Proximal[PPOConfig]):
    """Proximal policy optimization with the clipped objective, ``max(-A rho, -A clip(rho))`` (Schulman et al. 2017,
    eq. 7).

    On text the KL penalty is in the reward, with a fixed or an adaptive coefficient (Ziegler et al. 2019).
    """

    Config = PPOConfig
    name = "ppo"

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        """Return the clipped objective, ``(B, T)``."""
        return ppo_clip_loss(logprob, fixed["old_logprob"], fixed["advantage"], mask, self.config.clip)

    @property
    def ratio_clip(self) -> float | None:
        return self.config.clip
