"""GSPO: GRPO that clips whole responses, by the geometric mean of their tokens' ratios."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_envs.algos.grpo import EPS, GRPO, GRPOConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import KLEstimator, gspo_loss, ratio_metrics, sequence_ratio
from lm_envs.settings import Positive
from lm_envs.trajectories import Trajectories


@dataclass
class GSPOConfig(GRPOConfig):
    """Settings of :class:`GSPO`; the clip is the paper's, which is narrow because it bounds a mean over tokens."""

    clip: Positive = 3e-4
    """Distance of a response's ratio to the sampling policy from 1 beyond which it is clipped."""
    clip_high: Positive | None = 4e-4
    """The same distance above 1; None is `clip`."""
    by_token: bool = False
    """Give each token an advantage of its own, from the rewards that follow it (the paper's GSPO-token)."""
    kl_loss: KLEstimator | None = None
    """Put the KL penalty into the loss, by this estimator. None leaves it in the reward."""


class GSPO(GRPO):
    """``(1/B) sum_i max(-A_i s_i, -A_i clip(s_i, 1 - 3e-4, 1 + 4e-4))`` with ``s_i = (pi(y_i|x) /
    pi_old(y_i|x))^(1/|y_i|)`` and GRPO's advantage (Zheng et al. 2025, "Group sequence policy optimization", eq. 5; by
    token eq. 13).

    Its first step is that of GRPO without k3 and has the same two biases, the standard deviation and the length. For
    responses of one token, as on a bandit env, it is GRPO with another clip. The paper leaves the KL penalty out; here
    it is in the reward.
    """

    Config = GSPOConfig
    config: GSPOConfig
    name = "gspo"
    published_kl_coef = None

    def advantages(self, signal: Tensor, traj: Trajectories) -> Tensor:
        found = super().advantages(signal, traj)
        if not self.config.by_token:
            return found
        earned = signal[:, :1] - signal  # by earlier tokens
        return found - earned / (adv.group_std(signal[:, 0], traj.group) + EPS).unsqueeze(1)

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        clip = self.config.clip, self.config.clip_high
        return gspo_loss(logprob, fixed["old_logprob"], fixed["advantage"], mask, *clip, self.config.by_token)

    def moved(self, logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Count clipped responses, each as often as it has tokens."""
        whole = sequence_ratio(logprob.detach(), old_logprob, mask).log().expand(mask.shape)
        clipped = ratio_metrics(whole, torch.zeros_like(whole), mask, self.config.clip, self.config.clip_high)
        return ratio_metrics(logprob, old_logprob, mask) | {"clip_fraction": clipped["clip_fraction"]}
