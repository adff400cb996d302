"""Dr. GRPO: GRPO without the two divisions that bias it."""

from dataclasses import dataclass

from torch import Tensor

from lm_envs.algos.grpo import GRPO, GRPOConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import KLEstimator, LossMean


@dataclass
class DrGRPOConfig(GRPOConfig):
    """Settings of :class:`DrGRPO`: GRPO's, with the KL penalty in the reward."""

    loss_mean: LossMean = "sum"
    kl_loss: KLEstimator | None = None
    """Put the KL penalty into the loss, by this estimator. None leaves it in the reward."""


class DrGRPO(GRPO):
    """``(1/B) sum_i sum_t max(-A_i rho, -A_i clip(rho))`` with ``A_i = R_i - mean R`` (Liu et al. 2025,
    "Understanding R1-Zero-like training: a critical perspective", section 3.3).

    There is no division by the group's standard deviation or the response's length; the paper's division by a constant,
    the longest length, is left to the learning rate. The mean includes the episode itself, so the gradient is (K-1)/K
    of the true one, in the same direction. The paper has no KL penalty (``kl_coef=0``); here it is in the reward, where
    it is exact.
    """

    Config = DrGRPOConfig
    name = "dr-grpo"
    published_kl_coef = None

    def advantage(self, returns: Tensor, group: Tensor | None) -> Tensor:
        return returns - adv.group_mean(returns, group)
