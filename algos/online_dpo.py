"""Online DPO: DPO between the best and the worst of the policy's own samples, in every batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import episode_value, groups
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.preference_losses import REFERENCE_FREE, PreferenceLossConfig, preference_loss
from lm_envs.settings import Rate, Several
from lm_envs.trajectories import Trajectories


@dataclass
class OnlineDPOConfig(PreferenceLossConfig):
    """Settings of :class:`OnlineDPO`; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    group_size: Several = 4
    """Consecutive episodes that share a prompt, at least 2, of which the best and the worst are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "kto":
            raise ValueError("online-dpo learns from pairs: loss must be another than 'kto'")


class OnlineDPO(Agent[OnlineDPOConfig]):
    """``-log sigmoid(beta * (D_best - D_worst))`` on fresh samples (Guo et al. 2024, "Direct language model alignment
    from online AI feedback"; the best and worst of more than two, as Xiong et al. 2024 do), or another ``loss`` of
    :class:`~lm_envs.algos.dpo.DPO`.

    The reward model's score ranks the samples, and the reference is the env's. Groups of equal scores are skipped. Text
    only: control has no reference.
    """

    Config = OnlineDPOConfig
    name = "online-dpo"
    unit = "group"

    def update(self, traj: Trajectories) -> dict[str, float]:
        value = episode_value(traj)
        if traj.ref_logprob is None and self.config.loss not in REFERENCE_FREE:
            raise ValueError("online-dpo needs Trajectories.ref_logprob, which only text envs provide")
        best, worst = extremes(value, groups(traj)[1])
        differ = value[best] > value[worst]
        kept = torch.stack([best[differ], worst[differ]], dim=1)
        metrics = {"score_gap": float((value[best] - value[worst]).double().mean())}
        if not len(kept):
            self.iterations_done += 1
            return metrics | {"updates": 0}
        chosen = traj.select(kept.reshape(-1))
        chosen.rank = torch.tensor([0, 1], device=kept.device).repeat(len(kept))
        chosen.group = torch.arange(len(kept), device=kept.device).repeat_interleave(2)
        return metrics | super().update(chosen)

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        return preference_loss(traj, now, self.config)


def extremes(value: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row indices ``(G,)`` of the largest and of the smallest ``value (B,)`` of each group 0 .. G-1; ties go
    to the earlier row."""
    members = [(group == number).nonzero().squeeze(1) for number in range(int(group.max()) + 1)]
    best = [rows[value[rows].argmax()] for rows in members]
    return torch.stack(best), torch.stack([rows[value[rows].argmin()] for rows in members])
