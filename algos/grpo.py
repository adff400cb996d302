"""GRPO: PPO's clip without a critic; episodes of a prompt are scaled to mean 0 and standard deviation 1."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.policy_gradient import PolicyGradient, PolicyGradientConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import (
    KLEstimator,
    LossMean,
    ppo_clip_loss,
    ratio_metrics,
    row_weights,
    sequence_mean,
    tally,
)
from lm_envs.settings import Count, Positive, Rate, Size
from lm_envs.trajectories import Trajectories

EPS = 1e-8  # so that a group of equal returns has advantage 0


@dataclass
class GroupConfig(PolicyGradientConfig):
    """What GRPO shares with its relatives that have no clip; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    group_size: Size = 8
    """Consecutive episodes that share a prompt, at least 2; the text env must have the same group_size."""
    minibatches: Count = 2
    loss_mean: LossMean = "response"
    """What has the same weight in the loss: each response, each token of the whole batch, or (sum) each token, with
    responses as long as they are."""


@dataclass
class GRPOConfig(GroupConfig):
    """Settings of :class:`GRPO`; the defaults are for a small language model."""

    clip: Positive = 0.2
    """Distance of the ratio to the sampling policy from 1 beyond which it is clipped."""
    clip_high: Positive | None = None
    """The same distance above 1; None is `clip`."""
    kl_loss: KLEstimator | None = "k3"
    """Estimator that puts the KL penalty into the loss. None leaves it in the reward."""


class GRPO(PolicyGradient[GRPOConfig]):
    """``(1/B) sum_i (1/|o_i|) sum_t [max(-A_i rho, -A_i clip(rho)) + kl_coef * k3]`` with ``A_i = (R_i - mean R)
    / std R`` over the prompt's episodes (Shao et al. 2024, "DeepSeekMath", eqs. 3 and 4, signs turned).

    As published it is biased in four ways (Liu et al. 2025, "Understanding R1-Zero-like training", name the first two):
    the standard deviation (population, here) gives prompts with nearly equal returns more weight; ``1/|o|`` gives
    tokens of long responses less weight, so long bad responses are punished less and long good ones rewarded less; the
    mean includes the episode itself, which scales the gradient by (K-1)/K; and k3 in the loss pulls toward the
    reference along ``KL(ref || pi)`` (see :func:`~lm_envs.algos.ops.losses.kl_estimate`). ``dr-grpo`` drops the first
    two. Control has no prompts, so the group is the batch.
    """

    Config = GRPOConfig
    name = "grpo"
    unit = "sequence"
    published_kl_coef: ClassVar[float | None] = 0.04

    def __init__(self, policy: Any, config: GRPOConfig | None = None) -> None:
        super().__init__(policy, config)
        self.whole_batch = True

    def advantage(self, returns: Tensor, group: Tensor | None) -> Tensor:
        """Return ``(B,)`` advantages from ``(B,)`` returns."""
        return (returns - adv.group_mean(returns, group)) / (adv.group_std(returns, group) + EPS)

    def advantages(self, signal: Tensor, traj: Trajectories) -> Tensor:
        """Return ``(B, T)`` advantages from ``(B, T)`` rewards-to-go.

        Raises:
            ValueError: a prompt has a single episode, whose advantage would always be 0.
        """
        if traj.group is not None and int(torch.unique(traj.group, return_counts=True)[1].min()) < 2:
            raise ValueError(
                f"{self.name} compares the episodes of a prompt, and a prompt has only one: set group_size to 2 or more"
            )
        return self.advantage(signal[:, 0], traj.group)[:, None].expand(signal.shape)

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        """Return the policy's loss per position, ``(B, T)``."""
        config = self.config
        return ppo_clip_loss(logprob, fixed["old_logprob"], fixed["advantage"], mask, config.clip, config.clip_high)

    def moved(self, logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return how far the policy is from the one that sampled, see :func:`ratio_metrics`."""
        return ratio_metrics(logprob, old_logprob, mask, self.config.clip, self.config.clip_high)

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        """Return ``advantage`` and ``old_logprob``, both ``(B, T)``, and ``weight (B,)``."""
        signal = adv.discounted_returns(self.rewards(traj, before), traj.mask, self.config.gamma)
        advantage = self.corrected(adv.masked(self.advantages(signal, traj), traj.mask), traj, before)
        weight = row_weights(self.config.loss_mean, traj.mask)
        return {"advantage": advantage, "old_logprob": before.logprob, "weight": weight}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        mask, count, weight = traj.mask, traj.mask.sum(), fixed["weight"].unsqueeze(1)
        policy = sequence_mean(weight * self.surrogate(now.logprob, fixed, mask), mask)
        moved = self.moved(now.logprob, fixed["old_logprob"], mask)
        metrics: dict[str, Metric] = {"policy_loss": policy.detach(), "entropy": tally(now.entropy, mask)}
        # Means over tokens carry their own count, because the unit is rows.
        metrics |= {name: x if name.endswith("_max") else (x * count, count) for name, x in moved.items()}
        return policy + sequence_mean(weight * self.kl_penalty(traj, now), mask), metrics
