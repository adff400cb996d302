"""Expert iteration: sample several responses, keep the best, imitate them, repeat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import episode_value
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.demonstrations import token_likelihood
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.policies.adaptation import learned_state, load_learned_state
from lm_envs.settings import Count, Rate, Size
from lm_envs.trajectories import Trajectories


@dataclass
class ExpertIterationConfig(AgentConfig):
    """Settings of :class:`ExpertIteration`; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    group_size: Size = 8
    """Consecutive episodes that share a prompt, of which the best are kept."""
    keep: Size = 1
    """Episodes of each group that are imitated: its best `keep`, fewer than `group_size`."""
    keep_by: Literal["prompt", "overall", "random"] = "prompt"
    """Keep the best of each group (RAFT), as many of the whole batch (ReST), or as many of each group blindly: the
    control that shows what choosing is worth."""
    epochs: Count = 2
    """Passes over the kept episodes."""
    restart: bool = False
    """Imitate from the first weights in every iteration (as AlpacaFarm does) instead of from the last iteration's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep >= self.group_size:
            why = "to imitate every episode chooses nothing"
            raise ValueError(f"keep must be below group_size={self.group_size}, got {self.keep}: {why}")

    @property
    def learned(self) -> int | None:
        return None if self.episodes is None else self.episodes // self.group_size * self.keep


class ExpertIteration(Agent[ExpertIterationConfig]):
    """``-log pi`` on the best episodes of each group (Anthony et al. 2017; RAFT, Dong et al. 2023; `restart` is
    AlpacaFarm's variant, Dubois et al. 2023), or of the whole batch (ReST, Gulcehre et al. 2023, with a quantile as the
    threshold).

    The best episodes have the highest reward-model ``score``, or without one the highest undiscounted return; ties go
    to the earlier episode. Control episodes have no prompt, so a group is `group_size` consecutive episodes.
    """

    Config = ExpertIterationConfig
    name = "expert-iteration"
    unit = "token"

    def __init__(self, policy: Any, config: ExpertIterationConfig | None = None) -> None:
        super().__init__(policy, config)
        self._first: dict[str, Tensor] = {}
        if self.config.restart:
            self._first = {name: t.clone() for name, t in learned_state(policy).items()}

    def update(self, traj: Trajectories) -> dict[str, float]:
        value = episode_value(traj)
        group = torch.arange(len(traj)) // self.config.group_size if traj.group is None else traj.group
        if self.config.restart:
            load_learned_state(self.policy, self._first)
            self.optimizer.state.clear()
        rank, keep = value, self.config.keep
        if self.config.keep_by == "overall":
            group, keep = torch.zeros_like(group), keep * (len(traj) // self.config.group_size)
        elif self.config.keep_by == "random":
            rank = torch.zeros_like(value)  # ties: the first ones
        kept = best_of_groups(rank, group.to(value.device), keep)
        scores = {"kept_score": float(value[kept].double().mean()), "sampled_score": float(value.double().mean())}
        return scores | super().update(traj.select(kept))

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        return token_likelihood(traj, now)

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"first.{name}": t for name, t in self._first.items()}, {}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self._first = {name.removeprefix("first."): t.clone() for name, t in tensors.items()}


def best_of_groups(value: Tensor, group: Tensor, keep: int) -> Tensor:
    """Return the ascending indices of the ``keep`` rows with the largest ``value (B,)`` in each ``group (B,)`` int64
    (all of a smaller group); ties go to the earlier row."""
    order = torch.argsort(value, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]  # by group, within it best first
    sizes = torch.unique_consecutive(group[order], return_counts=True)[1]
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    place = torch.arange(len(value), device=value.device) - starts
    return order[place < keep].sort().values
