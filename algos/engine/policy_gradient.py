"""What the policy-gradient algorithms share: where the KL penalty stands, and a learned value beside the policy."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from annotated_types import Gt
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import Before, episode_value, rewards
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import Correction, KLEstimator, kl_estimate, masked_mean, sampler_weights, value_loss
from lm_envs.algos.policies.critics import ValueFrom, check_value_from, value_from_reward_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import kl_penalty
from lm_envs.env.report import text_envs
from lm_envs.settings import Finite, NonNegative, Probability, Rate
from lm_envs.trajectories import Trajectories


@dataclass
class PolicyGradientConfig(AgentConfig):
    """Adds where the KL penalty stands."""

    one_step: ClassVar[bool] = False
    """Whether its loss has no importance ratio, so that a batch is on-policy for one step only."""

    kl_loss: KLEstimator | None = None
    """Put the KL penalty into the loss, by this estimator, and not into the reward; the env then charges none. None
    leaves it in the reward, whose gradient is exact."""
    informative: bool = False
    """Learn only from groups whose scores differ (DAPO's dynamic sampling, with `draws`); `group_size` is then at least
    2."""

    correction: Correction | None = None
    """Weight each action by how much likelier the policy makes it than the sampler did, for samplers that differ from
    the policy (another precision, older weights): ratios of tokens or of whole responses, truncated at
    `correction_limit`, or with `_mask` set to 0 beyond it; or drop responses by their ratio's geometric mean, all
    ("geometric_mask") or bad ones ("negative_mask"). None trusts that both are one."""
    correction_limit: Annotated[float, Gt(1)] = 2.0
    """Largest weight of `correction`; `token_mask` also drops tokens with weights below its inverse. The last two masks
    compare the geometric mean over a response, for which a limit is nearer to 1."""

    overlong: NonNegative = 0.0
    """Taken from the reward of a response of the greatest length (text only), and linearly less of shorter ones."""
    overlong_share: Rate = 0.2
    """Share of the greatest length over which `overlong` grows from 0; shorter responses lose nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.informative and self.group_size < 2 and self.steps is None:
            name = type(self).__name__
            raise ValueError(f"{name}.informative compares the episodes of a prompt: set group_size >= 2")
        if self.one_step and (self.epochs != 1 or self.minibatches != 1):
            raise ValueError(
                f"{type(self).__name__.removesuffix('Config')} takes one on-policy step per batch, because its loss "
                "has no importance ratio: use grpo or ppo for several epochs or minibatches"
            )


C = TypeVar("C", bound=PolicyGradientConfig)


class PolicyGradient(Agent[C]):
    """An agent whose KL penalty may be a term of the loss; only the estimator "full" asks for :attr:`reference`."""

    def select(self, traj: Trajectories) -> Tensor | None:
        return adv.differing(episode_value(traj), traj.group) if self.config.informative else None

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

    def corrected(self, x: Tensor, traj: Trajectories, policy: Any) -> Tensor:
        """Advantages or penalties ``(B, T)`` times the weights of ``correction`` of a policy's evaluation. Surrogates
        are linear in weights that are not negative."""
        kind = self.config.correction
        if kind is None:
            return x
        sampled, limit = self._sampler_logprob(traj), self.config.correction_limit
        weights = sampler_weights(kind, policy.logprob, sampled, traj.mask, limit)
        return x * (weights if kind != "negative_mask" else torch.where(x < 0, weights, 1.0))

    def _sampler_logprob(self, traj: Trajectories) -> Tensor:
        if traj.logprob is None:
            raise ValueError(f"{self.name}: correction needs Trajectories.logprob of the sampler, and these have none")
        return traj.logprob

    def rewards(self, traj: Trajectories, before: Before) -> Tensor:
        """Rewards ``(B, T)``, with the penalty for long responses; ValueError where there are none.

        With ``correction`` a KL penalty in them is that of the policy, where the env charged the sampler's.
        """
        reward = rewards(traj)
        if self.config.correction is not None and self.kl_in_reward and traj.ref_logprob is not None:
            sampled = self._sampler_logprob(traj)
            extra = kl_penalty(self.kl_coefficient(), before.logprob, sampled)
            reward = reward - adv.masked(extra, traj.mask)
        if not self.config.overlong:
            return reward
        if traj.response is None:
            raise ValueError(f"{self.name}: overlong penalizes long responses, and these trajectories have none: set 0")
        limit = self.policy.uniforms_per_response
        penalty = adv.overlong_penalty(traj.response_lengths, limit, self.config.overlong_share)
        last = torch.arange(reward.shape[1], device=reward.device) == traj.lengths.unsqueeze(1) - 1
        return reward + last * self.config.overlong * penalty.to(reward.dtype).unsqueeze(1)

    def kl_penalty(self, traj: Trajectories, now: Any) -> Tensor:
        """``coefficient * KL`` per position, ``(B, T)``, with the weights of ``correction``; zeros where the penalty is
        in the reward.

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
            estimate = kl_estimate(kind, now.log_probs(), reference, traj.mask)
        elif traj.ref_logprob is None:
            raise ValueError(f"{self.name}: kl_loss={kind!r} needs Trajectories.ref_logprob, and these have none")
        else:
            estimate = kl_estimate(kind, now.logprob, traj.ref_logprob, traj.mask)
        return self.corrected(coef * estimate, traj, now)


def reference_policy(env: Any) -> Any:
    """The frozen reference of a text env, as a policy that evaluates trajectories."""
    mdp = text_envs(env)[0].mdp
    return LMPolicy.for_mdp(mdp, mdp.reference)


@dataclass
class ActorCriticConfig(PolicyGradientConfig):
    """Adds a learned value; the defaults are for a small language model."""

    lam: Probability = 0.95
    """GAE's lambda: 1 is the bootstrapped return minus V, 0 the one-step error."""
    value_from: ValueFrom = "policy"
    """What the value function starts from: the policy's trunk, which it shares, with a head at zero; or the reward
    model, as a separate model."""
    whiten_advantage: bool = True
    """Scale advantages to mean 0 and standard deviation 1 over the batch."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""


A = TypeVar("A", bound=ActorCriticConfig)


class ActorCritic(PolicyGradient[A]):
    """``surrogate + value_coef * value loss - entropy_coef * H``, means over tokens, with GAE advantages."""

    unit = "token"

    @classmethod
    def prepare_policy(cls, policy: Any, task: Any, config: Any) -> None:
        if config.value_from == "reward_model":
            value_from_reward_model(policy, task)

    def __init__(self, policy: Any, config: A | None = None) -> None:
        super().__init__(policy, config)
        check_value_from(self.name, policy, self.config.value_from)

    def advantage(self, gae: Tensor, traj: Trajectories, before: Before) -> Tensor:
        """The advantage ``(B, T)`` before whitening, given GAE's."""
        return gae

    def mean(self, x: Tensor, mask: Tensor, fixed: dict[str, Tensor]) -> Tensor:
        """The loss's mean of ``x (B, T)``, a scalar: over tokens, each with its row's ``weight`` if there is one."""
        return masked_mean(x * fixed["weight"].unsqueeze(1) if "weight" in fixed else x, mask)

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        """The policy's loss per position, ``(B, T)``."""
        raise NotImplementedError

    def critic_loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> Tensor:
        """The critic's loss per position, ``(B, T)``."""
        return value_loss(now.value[:, :-1], fixed["target"], traj.mask)

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        """Return ``advantage`` and ``target``, both ``(B, T)``."""
        gae = adv.gae(self.rewards(traj, before), before.value, traj.mask, self.config.gamma, self.config.lam)
        target = gae + before.value[:, :-1]
        advantage = self.advantage(gae, traj, before)
        if self.config.whiten_advantage:
            advantage = adv.whiten(advantage, traj.mask)
        return {"advantage": self.corrected(advantage, traj, before), "target": target}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        config, mask = self.config, traj.mask
        policy = self.mean(self.surrogate(now.logprob, fixed, mask), mask, fixed)
        value = self.mean(self.critic_loss(traj, now, fixed), mask, fixed)
        entropy = masked_mean(now.entropy, mask)
        loss = policy + config.value_coef * value - config.entropy_coef * self.mean(now.entropy, mask, fixed)
        loss = loss + self.mean(self.kl_penalty(traj, now), mask, fixed)
        return loss, {"policy_loss": policy.detach(), "value_loss": value.detach(), "entropy": entropy.detach()}
