"""ReMax: REINFORCE with the score of the greedy response to the same prompt as the baseline."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.sampling import charge
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.rloo import RLOO, RLOOConfig
from lm_envs.settings import Size
from lm_envs.trajectories import Trajectories


@dataclass
class ReMaxConfig(RLOOConfig):
    """Settings of :class:`ReMax`; the defaults are for a small language model."""

    group_size: Size = 1
    """Consecutive episodes that share a prompt; the text env must have the same group_size."""


class ReMax(RLOO):
    """``-(1/B) sum_i sum_t (G_it - r(x, y_greedy)) log pi(y_it|x, y_i<t)``, ``G`` the rewards that follow, with the KL
    penalty (Li et al. 2023, "ReMax", algorithm 1).

    The baseline depends on the prompt alone, so the gradient is exact. Each prompt of a batch takes one greedy response
    more, by the policy that sampled the batch; it is charged as an episode and a reward call. Text only.
    """

    Config = ReMaxConfig
    name = "remax"

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        signal = adv.discounted_returns(self.rewards(traj, before), traj.mask, self.config.gamma)
        advantage = adv.masked(signal - self._greedy_score(traj).unsqueeze(1), traj.mask)
        return {"advantage": self.corrected(advantage, traj, before)}

    def _greedy_score(self, traj: Trajectories) -> Tensor:
        """``(B,)`` the score of the greedy response to each row's prompt."""
        if self.mdp is None or traj.prompt is None or traj.prompt_index is None:
            raise ValueError("remax scores a greedy response to each prompt: give it a text env, or set .mdp")
        index, place = torch.unique(traj.prompt_index, return_inverse=True)
        first = torch.zeros_like(index).scatter_(0, place.flip(0), torch.arange(len(place)).flip(0).to(place.device))
        response = self.policy.greedy(prompt := traj.prompt[first]).cpu()
        score = torch.as_tensor(self.mdp.score(index.cpu().numpy(), response.numpy())).sum(dim=1)
        charge(self, prompt, response)
        return score.to(place.device)[place]
