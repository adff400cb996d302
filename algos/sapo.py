"""SAPO: GRPO whose clip is a sigmoid, so that a token far from the sampling policy counts less and never nothing."""

from dataclasses import dataclass

from torch import Tensor

from lm_envs.algos.grpo import GRPO, GroupConfig
from lm_envs.algos.ops.losses import ratio_metrics, sapo_loss
from lm_envs.settings import Positive


@dataclass
class SAPOConfig(GroupConfig):
    """Settings of :class:`SAPO`; the temperatures are the paper's."""

    tau: Positive = 1.0
    """Temperature of the gate where the advantage is positive; a larger one closes it nearer to a ratio of 1."""
    tau_negative: Positive = 1.05
    """The same where the advantage is negative, which pushes probability to every other token."""


class SAPO(GRPO):
    """``-(1/B) sum_i (1/|o_i|) sum_t A_i (4 / tau) sigmoid(tau (rho_it - 1))`` with GRPO's advantage (Gao et al. 2025,
    "Soft adaptive policy optimization").

    At ratio 1 the gate's slope is 1, so its first step is that of GRPO without k3 and has the same two biases, the
    standard deviation and the length. The slope falls toward 0 on both sides of 1, also where PPO's clip would let a
    ratio come back. The paper has no KL penalty (``kl_coef=0``); here it is in the reward.
    """

    Config = SAPOConfig  # type: ignore[assignment]
    config: SAPOConfig  # type: ignore[assignment]
    name = "sapo"
    published_kl_coef = None

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        taus = self.config.tau, self.config.tau_negative
        return sapo_loss(logprob, fixed["old_logprob"], fixed["advantage"], mask, *taus)

    def moved(self, logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Nothing is clipped, so no fraction of it is reported."""
        return ratio_metrics(logprob, old_logprob, mask)
