"""RLOO: REINFORCE on whole responses, each compared with the other responses to its prompt."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.policy_gradient import PolicyGradient, PolicyGradientConfig
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import policy_gradient_loss, sequence_mean, tally
from lm_envs.settings import Rate, Size
from lm_envs.trajectories import Trajectories


@dataclass
class RLOOConfig(PolicyGradientConfig):
    """Settings of :class:`RLOO`; the defaults are for a small language model."""

    whole_episodes = one_step = True

    learning_rate: Rate = 1e-3
    group_size: Size = 4
    """Consecutive episodes that share a prompt, at least 2; the text env must have the same group_size."""


class RLOO(PolicyGradient[RLOOConfig]):
    """``-(1/B) sum_i (R_i - mean_{j != i} R_j) sum_t log pi(y_it|x, y_i<t)`` (Ahmadian et al. 2024, "Back to
    basics", eq. 6; Kool et al. 2019).

    ``R`` is the return of the whole episode, including the KL penalty; j runs over the other episodes of the prompt (of
    the batch, on control). Unbiased. Equal to ``reinforce`` with baseline "leave_one_out", on MDP and bandit envs.
    """

    Config = RLOOConfig
    name = "rloo"
    unit = "sequence"

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        returns = adv.discounted_returns(self.rewards(traj, before), traj.mask, self.config.gamma)[:, 0]
        advantage = returns - adv.leave_one_out(returns, traj.group)
        advantage = adv.masked(advantage[:, None].expand(traj.mask.shape), traj.mask)
        return {"advantage": self.corrected(advantage, traj, before)}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        policy = sequence_mean(policy_gradient_loss(now.logprob, fixed["advantage"], traj.mask), traj.mask)
        metrics: dict[str, Metric] = {"policy_loss": policy.detach(), "entropy": tally(now.entropy, traj.mask)}
        return policy + sequence_mean(self.kl_penalty(traj, now), traj.mask), metrics
