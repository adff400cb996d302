"""DAPO: GRPO that lets unlikely tokens grow, weighs all tokens alike, and skips groups that teach nothing."""

from dataclasses import dataclass

from lm_envs.algos.grpo import GRPO, GRPOConfig
from lm_envs.algos.ops.losses import KLEstimator, LossMean
from lm_envs.settings import Count, NonNegative, Positive


@dataclass
class DAPOConfig(GRPOConfig):
    """Settings of :class:`DAPO`: GRPO's, with the paper's choices."""

    clip_high: Positive | None = 0.28
    """Distance of the ratio above 1 beyond which it is clipped; None is `clip`."""
    loss_mean: LossMean = "token"
    kl_loss: KLEstimator | None = None
    """Put the KL penalty into the loss, by this estimator. None leaves it in the reward."""
    informative: bool = True
    """Learn only from groups whose scores differ."""
    draws: Count = 10
    """Most batches sampled per iteration, for the groups that were left out; each samples what is missing."""
    overlong: NonNegative = 1.0
    """Taken from the reward of a response of the greatest length (text only), and linearly less of shorter ones."""


class DAPO(GRPO):
    """``(1 / sum_i |o_i|) sum_i sum_t max(-A_i rho, -A_i clip(rho, 0.8, 1.28))`` with GRPO's advantage, over groups
    whose scores differ (Yu et al. 2025, "DAPO", eqs. 8 to 13).

    Each part is a setting of every algorithm that has what it changes. The sum over tokens is divided by the tokens of
    the whole batch, so the length does not turn the gradient; the standard deviation still does. Groups of equal scores
    have advantage 0, so leaving them out changes the direction only where the KL penalty is in the reward. The penalty
    for long responses changes the objective. The paper has no KL penalty (``kl_coef=0``); here it is in the reward,
    where it is exact.
    """

    Config = DAPOConfig
    name = "dapo"
    published_kl_coef = None
