"""CISPO (MiniMax 2025): REINFORCE with a clipped importance weight without a gradient, against the group's mean."""

from dataclasses import dataclass

import torch

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import rewards
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.ops.losses import masked_mean, nll
from lm_envs.settings import Positive, Size


@dataclass
class CISPOConfig(AgentConfig):
    """Settings of CISPO."""

    clip: Positive = 0.2
    """Importance weights are at most 1 + clip."""
    group_size: Size = 4
    """Responses per prompt."""


class CISPO(Agent[CISPOConfig]):
    """``-min(ratio, 1 + clip) A log pi``, the weight without a gradient, a mean over tokens."""

    Config, name = CISPOConfig, "cispo"

    def prepare(self, traj, before):
        returns = torch.where(traj.mask, rewards(traj), 0.0).sum(dim=1)
        grouped = returns.unflatten(0, (-1, self.config.group_size))
        advantage = (grouped - grouped.mean(dim=1, keepdim=True)).flatten()
        return {"advantage": advantage.unsqueeze(1).expand_as(traj.mask), "logprob": before.logprob}

    def loss(self, traj, now, fixed):
        ratio = (now.logprob - fixed["logprob"]).detach().exp()
        weight = ratio.clamp(max=1 + self.config.clip) * fixed["advantage"]
        loss = masked_mean(weight * nll(now.logprob, traj.mask), traj.mask)
        return loss, {"ratio": masked_mean(ratio, traj.mask)}
