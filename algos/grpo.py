"""GRPO: PPO's clip without a critic; episodes of a prompt are scaled to mean 0 and standard deviation 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_envs.algos.engine.batching import Before, rewards
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.policy_gradient import PolicyGradient, PolicyGradientConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import KLEstimator, ppo_clip_loss, ratio_metrics, row_mean, tally
from lm_envs.settings import Count, Positive, Rate, Size
from lm_envs.trajectories import Trajectories

_EPS = 1e-8  # of the standard deviation: a group of equal returns has advantage 0


@dataclass
class GRPOConfig(PolicyGradientConfig):
    """Settings of :class:`GRPO`; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    """Adam's step size at the start."""
    group_size: Size = 8
    """Episodes in a row that share a prompt, at least 2; the text env is made with the same number."""
    minibatches: Count = 2
    """Adam steps per pass."""
    clip: Positive = 0.2
    """How far the ratio to the sampling policy may leave 1 before it earns no more."""
    kl_loss: KLEstimator | None = "k3"
    """Put the KL penalty into the loss, by this estimator. None leaves it in the reward."""


class GRPO(PolicyGradient[GRPOConfig]):
    """``(1/B) sum_i (1/|o_i|) sum_t [max(-A_i rho, -A_i clip(rho)) + kl_coef * k3]`` with ``A_i = (R_i - mean R)
    / std R`` over the prompt's episodes (Shao et al. 2024, "DeepSeekMath", eqs. 3 and 4, signs turned).

    As published, and biased in four ways (Liu et al. 2025, "Understanding R1-Zero-like training", name the first
    two): the standard deviation (population, here) weighs prompts with nearly equal returns up; ``1/|o|``
    makes a token of a long response count less, so long bad responses are punished less and long good ones earn
    less; the mean counts the episode itself, which shrinks the gradient by (K-1)/K; and k3 in the loss pulls
    towards the reference along ``KL(ref || pi)`` (see :func:`~lm_envs.algos.ops.losses.kl_estimate`).
    ``dr-grpo`` drops the first two. Where there is no prompt (control) the group is the batch.
    """

    Config = GRPOConfig
    name = "grpo"
    unit = "sequence"
    published_kl_coef: ClassVar[float | None] = 0.04

    def advantage(self, returns: Tensor, group: Tensor | None) -> Tensor:
        """``(B,)`` from ``(B,)`` returns."""
        return (returns - adv.group_mean(returns, group)) / (adv.group_std(returns, group) + _EPS)

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """A scalar from ``(B, T)``: over a row's tokens, then over rows."""
        return row_mean(x, mask)

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        """``advantage``, one number per row, and ``old_logprob``, both ``(B, T)``.

        Raises:
            ValueError: a prompt has a single episode, whose advantage is 0 whatever it earns.
        """
        if traj.group is not None and int(torch.unique(traj.group, return_counts=True)[1].min()) < 2:
            raise ValueError(
                f"{self.name} compares the episodes of a prompt, and a prompt has only one: set group_size to 2 or more"
            )
        returns = adv.discounted_returns(rewards(traj), traj.mask, self.config.gamma)[:, 0]
        advantage = self.advantage(returns, traj.group)[:, None].expand(traj.mask.shape)
        return {"advantage": adv.masked(advantage, traj.mask), "old_logprob": before.logprob}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        """The clipped objective and the penalty, averaged by :meth:`mean`."""
        mask, count = traj.mask, traj.mask.sum()
        clipped = ppo_clip_loss(now.logprob, fixed["old_logprob"], fixed["advantage"], mask, self.config.clip)
        policy = self.mean(clipped, mask)
        moved = ratio_metrics(now.logprob, fixed["old_logprob"], mask, self.config.clip)
        metrics: dict[str, Metric] = {"policy_loss": policy.detach(), "entropy": tally(now.entropy, mask)}
        # These are means over tokens, and the unit is rows: they carry their own count.
        metrics |= {name: x if name.endswith("_max") else (x * count, count) for name, x in moved.items()}
        return policy + self.mean(self.kl_penalty(traj, now), mask), metrics
