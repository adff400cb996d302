"""CISPO: GRPO that clips the importance weight instead of the update."""

from dataclasses import dataclass

from torch import Tensor

from lm_envs.algos.grpo import GRPO, GRPOConfig
from lm_envs.algos.ops.losses import KLEstimator, LossMean, cispo_loss
from lm_envs.settings import Positive


@dataclass
class CISPOConfig(GRPOConfig):
    """Settings of :class:`CISPO`: GRPO's, with bounds on the importance weight."""

    clip: Positive = 1.0
    """Distance below 1 at which the importance weight is bounded; 1 sets no bound, as in the paper."""
    clip_high: Positive | None = 4.0
    """Distance above 1 at which the importance weight is bounded; None is `clip`. The paper does not publish one."""
    loss_mean: LossMean = "token"
    kl_loss: KLEstimator | None = None
    """Put the KL penalty into the loss, by this estimator. None leaves it in the reward."""


class CISPO(GRPO):
    """``-(1 / sum_i |o_i|) sum_i sum_t sg(clip(rho, 0, 5)) A_i log pi`` with GRPO's advantage (MiniMax 2025,
    "MiniMax-M1", eqs. 4 and 5).

    No token is ever left without a gradient, as PPO's clip leaves those that moved most. Its first step is REINFORCE's
    with GRPO's advantage; the standard deviation is its only bias. The paper has no KL penalty (``kl_coef=0``); here it
    is in the reward.
    """

    Config = CISPOConfig
    name = "cispo"
    published_kl_coef = None

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        clip = self.config.clip, self.config.clip_high
        return cispo_loss(logprob, fixed["old_logprob"], fixed["advantage"], mask, *clip)
