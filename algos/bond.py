"""J-BOND: learn to write in one sample the better of two samples of an anchor that follows the policy."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import Before, rewards
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.sampling import sample_beside
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import policy_gradient_loss, sequence_mean, tally
from lm_envs.model.tokens import same_width
from lm_envs.settings import NonNegative, Probability, Rate, Several
from lm_envs.training import at_least_float32
from lm_envs.trajectories import Trajectories, whole_episodes

BELOW = -math.log(16)
"""Reward of a response below both samples of the anchor: a median one then has ``log F = log 1/2`` on average."""


@dataclass
class BONDConfig(AgentConfig):
    """Settings of :class:`BOND`; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    group_size: Several = 4
    """Consecutive episodes that share a prompt, at least 2; the text env must have the same group_size."""
    forward_weight: Probability = 0.5
    """Share of the divergence ``KL(best-of-2 || pi)``, the rest is ``KL(pi || best-of-2)``; the paper's beta."""
    anchor_rate: Probability = 0.02
    """How far the anchor moves to the policy after each batch; 0 leaves it where the policy began."""
    anchor_kl_coef: NonNegative = 1.0
    """Weight of a further ``KL(pi || anchor)``; the paper's gamma."""


class BOND(Agent[BONDConfig]):
    """``(1 - b) KL(pi || p_2) + b KL(p_2 || pi) + gamma KL(pi || anchor)``, p_2 the best of two samples of the anchor
    (Sessa et al. 2024, "BOND: aligning LLMs with best-of-n distillation", algorithm 2, J-BOND).

    The first is REINFORCE on ``-log 16`` for a response below both of the anchor's samples, else 0, less ``log pi /
    anchor``, with a leave-one-out baseline; the second imitates the better sample. The anchor is a moving average of
    the policy's weights, so that n doubles and doubles: nothing holds it near the reference, only the pace is bounded.
    Scores alone count, not the KL penalty. Each response takes two of the anchor, which are charged. Text only.
    """

    Config = BONDConfig
    name = "bond"
    unit = "sequence"

    def __init__(self, policy: Any, config: BONDConfig | None = None) -> None:
        super().__init__(policy, config)
        # A moving average loses small steps in bfloat16.
        self._anchor = {name: at_least_float32(p.detach()).clone() for name, p in self._parameters.items()}

    def update(self, traj: Trajectories) -> dict[str, float]:
        rewards(traj)  # raises where there are none
        traj, config = traj.to(next(iter(self._parameters.values())).device), self.config
        if traj.prompt is None or traj.response is None or traj.score is None or traj.prompt_index is None:
            raise ValueError("bond learns from text and a score per response")
        if self.mdp is None or traj.group is None:
            raise ValueError("bond scores samples of its anchor: give it a text env, or set .mdp")
        own = whole_episodes(traj.prompt, traj.response)
        with self._as_anchor():
            other = self._answer(traj)
            anchored = Before(self.policy, own, config.micro_batch).logprob
        drift = (Before(self.policy, own, config.micro_batch).logprob - anchored).sum(dim=1)
        index = traj.prompt_index.repeat_interleave(2).cpu().numpy()
        score = torch.as_tensor(self.mdp.score(index, other.cpu().numpy())).sum(dim=1).view(-1, 2)
        below = traj.score.cpu() < score.amin(dim=1)
        backward, forward = 1 - config.forward_weight, config.forward_weight
        value = backward * BELOW * below.to(drift) - (backward + config.anchor_kl_coef) * drift
        advantage = value - adv.leave_one_out(value, traj.group)
        best = other.view(len(own), 2, -1)[torch.arange(len(own)), score.argmax(dim=1)]
        both = same_width(traj.response, best.to(traj.response.device))
        # Rows of both kinds are weighted log-probabilities; a mean over twice the rows halves each.
        weight = 2 * torch.cat([advantage, torch.full_like(advantage, forward)])
        joined = whole_episodes(traj.prompt.repeat(2, 1), torch.cat(both))
        joined.reward = weight.unsqueeze(1).expand(joined.mask.shape)
        metrics = {"below_both": float(below.double().mean()), "anchor_kl": float(drift.double().mean())}
        metrics |= super().update(joined)
        for name, p in self._parameters.items():
            self._anchor[name].lerp_(at_least_float32(p.detach()), config.anchor_rate)
        return metrics

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        return {"advantage": adv.masked(rewards(traj), traj.mask)}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        loss = sequence_mean(policy_gradient_loss(now.logprob, fixed["advantage"], traj.mask), traj.mask)
        return loss, {"entropy": tally(now.entropy, traj.mask)}

    def _answer(self, traj: Trajectories) -> Tensor:
        """Two responses to each row's prompt, ``(2 B, T)``, those of a row adjacent."""
        assert traj.prompt is not None
        prompt = traj.prompt.repeat_interleave(2, dim=0)
        return sample_beside(self, self.policy, prompt, 2 * self.episodes_done + np.arange(len(prompt)))

    @contextmanager
    def _as_anchor(self) -> Iterator[None]:
        """Give the policy the anchor's weights meanwhile."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._put(self._anchor)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(weights[name])

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"anchor.{name}": p for name, p in self._anchor.items()}, {}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for name, anchor in self._anchor.items():
            anchor.copy_(tensors[f"anchor.{name}"])
