"""REINFORCE++: PPO's clip without a critic; advantages are scaled over the whole batch, not over a prompt's group."""

from dataclasses import dataclass

from torch import Tensor

from lm_envs.algos.grpo import GRPO, GRPOConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import KLEstimator, LossMean
from lm_envs.settings import Size
from lm_envs.trajectories import Trajectories


@dataclass
class ReinforcePlusPlusConfig(GRPOConfig):
    """Settings of :class:`ReinforcePlusPlus`: GRPO's, for prompts with one response each."""

    group_size: Size = 1
    """Consecutive episodes that share a prompt; the text env must have the same group_size."""
    loss_mean: LossMean = "token"
    kl_loss: KLEstimator | None = None
    """Put the KL penalty into the loss, by this estimator. None leaves it in the reward."""


class ReinforcePlusPlus(GRPO):
    """``max(-A_t rho, -A_t clip(rho))``, a mean over tokens, with ``A_t = (G_t - mean G) / std G`` over all tokens of
    the batch, ``G_t`` the reward minus the KL penalties from token t on (Hu et al. 2025, "REINFORCE++").

    Mean and deviation are of the whole batch, so its bias vanishes as the batch grows: they become a constant baseline
    and a constant scale.
    """

    Config = ReinforcePlusPlusConfig
    name = "reinforce-plus-plus"
    published_kl_coef = None

    def advantages(self, signal: Tensor, traj: Trajectories) -> Tensor:
        return adv.whiten(signal, traj.mask)


@dataclass
class ReinforcePlusPlusBaselineConfig(ReinforcePlusPlusConfig):
    """Settings of :class:`ReinforcePlusPlusBaseline`."""

    group_size: Size = 8
    """Consecutive episodes that share a prompt, at least 2; the text env must have the same group_size."""
    kl_loss: KLEstimator | None = "k2"
    """Estimator that puts the KL penalty into the loss. None leaves it in the reward."""


class ReinforcePlusPlusBaseline(GRPO):
    """:class:`ReinforcePlusPlus` with ``G = R_i - mean R`` over the prompt's episodes before it is scaled over the
    batch, and k2 in the loss (Hu et al. 2025, section on the baseline form).

    The mean includes the episode itself: (K-1)/K of the gradient, which the scale hides. k2 is the KL at each state,
    which omits what an early token does to later KL.
    """

    Config = ReinforcePlusPlusBaselineConfig
    name = "reinforce-plus-plus-baseline"
    published_kl_coef = None

    def advantage(self, returns: Tensor, group: Tensor | None) -> Tensor:
        return returns - adv.group_mean(returns, group)

    def advantages(self, signal: Tensor, traj: Trajectories) -> Tensor:
        return adv.whiten(super().advantages(signal, traj), traj.mask)
