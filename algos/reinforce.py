"""REINFORCE: the score-function gradient with a choice of baselines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.demonstrations import MixesDemonstrations
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.policy_gradient import PolicyGradient, PolicyGradientConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import policy_gradient_loss, sequence_mean, tally, value_loss
from lm_envs.settings import Count, Finite, NonNegative, Rate, Share, Size
from lm_envs.trajectories import Trajectories

Baseline = Literal["none", "constant", "running_mean", "batch_mean", "leave_one_out", "value"]


@dataclass
class ReinforceConfig(PolicyGradientConfig):
    """Settings of :class:`REINFORCE`; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    group_size: Size = 4
    baseline: Baseline = "leave_one_out"
    """Subtracted from the returns: nothing, `baseline_constant`, a moving average over past batches, the batch's mean,
    the mean of the other episodes of the prompt (RLOO), or a learned value."""
    baseline_constant: Finite = 0.0
    """Value of the baseline "constant"."""
    baseline_decay: Share = 0.9
    """Share of the past that the baseline "running_mean" keeps per batch."""
    reward_to_go: bool = False
    """Weight an action by the rewards after it instead of the whole return: same expectation, less variance."""
    whiten_advantage: bool = False
    """Scale advantages to mean 0 and standard deviation 1 over the batch."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss (baseline "value")."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""
    alpha: NonNegative = 0.0
    """Weight of the likelihood of demonstrations; 0 learns only from returns."""
    demonstrations: Count = 32
    """Demonstrations per Adam step, if `alpha` is not 0."""


class REINFORCE(MixesDemonstrations, PolicyGradient[ReinforceConfig]):
    """``-(1/B) sum_b sum_t A_t log pi(a_t|s_t)`` with ``A = G - baseline`` (Williams 1992).

    The KL penalty is part of the reward, so it enters before the baseline. With baseline "leave_one_out" and whole
    returns this is RLOO (Ahmadian et al. 2024, "Back to basics"). The batch's mean includes the episode itself, which
    scales the gradient by (B-1)/B; the other baselines are unbiased. An episode cut by a time limit is bootstrapped
    from the critic (baseline "value"); without a critic its return ends at the cut, which is a bias.

    With ``alpha`` the loss also has ``-alpha * log p(y*|x)`` of demonstrations, the mean over them of sums over tokens,
    as in Paulus et al. 2018, "A deep reinforced model for abstractive summarization", eq. 16, with their gamma
    ``1 / (1 + alpha)``. ``data`` then holds the demonstrations.
    """

    Config = ReinforceConfig
    name = "reinforce"
    unit = "sequence"
    mixing_weight = "alpha"

    def __init__(self, policy: Any, config: ReinforceConfig | None = None, data: Trajectories | None = None) -> None:
        super().__init__(policy, config, data)
        self._mean = self._weight = 0.0  # of past returns, for "running_mean"

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        """Return ``advantage (B, T)``, and with a learned value its ``target (B, T)``."""
        config, mask = self.config, traj.mask
        critic = config.baseline == "value"
        bootstrap = adv.value_at_end(before.value, mask) if critic else None
        signal = adv.discounted_returns(self.rewards(traj, before), mask, config.gamma, bootstrap)
        if not config.reward_to_go:
            signal = adv.masked(signal[:, :1].expand_as(signal), mask)
        # The factor discount^t of the true gradient is omitted, as usual.
        advantage = adv.masked(signal - self._baseline(traj, signal, before), mask)
        if config.whiten_advantage:
            advantage = adv.whiten(advantage, mask)
        fixed = {"advantage": self.corrected(advantage, traj, before)}
        return fixed | {"target": signal} if critic else fixed

    def _baseline(self, traj: Trajectories, signal: Tensor, before: Before) -> Tensor | float:
        config = self.config
        if config.baseline == "none":
            return 0.0
        if config.baseline == "constant":
            return config.baseline_constant
        if config.baseline == "value":
            return before.value[:, :-1]
        if config.baseline == "running_mean":
            # The mean of *past* batches does not depend on this batch's actions.
            baseline = self._mean / self._weight if self._weight else 0.0
            mean = float(adv.masked(signal, traj.mask).sum() / traj.mask.sum())
            self._mean, self._weight = adv.running_mean(self._mean, self._weight, mean, config.baseline_decay)
            return baseline
        # Finished rows count with their last entry.
        signal = adv.extend(signal, traj.mask)
        if config.baseline == "batch_mean":
            return adv.group_mean(signal)
        return adv.leave_one_out(signal, traj.group)

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        config, mask = self.config, traj.mask
        policy = sequence_mean(policy_gradient_loss(now.logprob, fixed["advantage"], mask), mask)
        metrics: dict[str, Metric] = {"policy_loss": policy.detach(), "entropy": tally(now.entropy, mask)}
        loss = policy + sequence_mean(self.kl_penalty(traj, now), mask)
        if config.entropy_coef:
            loss = loss - config.entropy_coef * sequence_mean(now.entropy, mask)
        if "target" in fixed:
            value = value_loss(now.value[:, :-1], fixed["target"], mask)
            loss = loss + config.value_coef * sequence_mean(value, mask)
            metrics["value_loss"] = tally(value, mask)
        return loss, metrics

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"running_mean": [self._mean, self._weight]}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self._mean, self._weight = values["running_mean"]
