"""Reward modelling: a scalar per text that orders texts as annotators did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm_envs.algos.agent import Agent
from lm_envs.algos.batching import stream
from lm_envs.algos.config import AgentConfig
from lm_envs.algos.metrics import Metric
from lm_envs.algos.sft import demonstrations
from lm_envs.rewards import raw_scores, right_pad
from lm_envs.supervised import bradley_terry_loss
from lm_envs.trajectories import Trajectories

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lm_envs.tasks.task import TextTask


@dataclass
class Scores:
    """What a :class:`RewardPolicy` evaluates to: ``score (B,)``."""

    score: Tensor


class RewardPolicy(nn.Module):
    """A transformers sequence-classification model as something that agents train.

    The score is read at each text's last token **by place**, never by pad id (see
    :func:`lm_envs.rewards.raw_scores`).

    Args:
        model: one label (the score) or two (the log-odds).
    """

    sequence_obs = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()

    def evaluate(self, traj: Trajectories) -> Scores:
        """The score of each row's whole text, prompt and response, read from ``obs (B, P + T)``."""
        if traj.obs is None:
            raise ValueError("RewardPolicy.evaluate needs Trajectories.obs, (B, P + T) token ids with -1 for none")
        ids = right_pad([row[row >= 0].tolist() for row in traj.obs]).to(self.model.device)
        return Scores(raw_scores(self.model, ids))


@dataclass
class RewardModellingConfig(AgentConfig):
    """Settings of :class:`RewardModelling`; `episodes` is the number of groups per iteration."""

    learning_rate: float = 1e-3
    """Adam's step size at the start."""
    episodes: int | None = 64
    """Groups of ranked texts per iteration."""


class RewardModelling(Agent[RewardModellingConfig]):
    """Bradley-Terry over all pairs of a group, ``-log sigmoid(s_better - s_worse)``, weighted ``1 / (K choose
    2)`` (Ouyang et al. 2022).

    All K texts of a prompt stand in one minibatch, so each is read once.

    Args:
        policy: something whose ``evaluate`` gives a ``score (B,)``: :class:`RewardPolicy`.
        config: settings.
        data: groups of texts with a ``rank``, 0 the best; see :func:`preferences`.

    Raises:
        ValueError: no data, no ranks, or a group in which all ranks are equal.
    """

    Config = RewardModellingConfig
    name = "reward-modelling"
    unit = "group"
    needs_data = True

    def __init__(
        self, policy: Any, config: RewardModellingConfig | None = None, data: Trajectories | None = None
    ) -> None:
        super().__init__(policy, config)
        if data is None or data.group is None or data.rank is None:
            raise ValueError(
                "reward-modelling learns from preferences: pass data=Trajectories with group and rank, "
                "see reward_modelling.preferences"
            )
        ranks, present = by_group(data.rank, data.group, -1)
        flat = (ranks.amax(dim=1) == ranks.masked_fill(ranks < 0, ranks.max() + 1).amin(dim=1)).nonzero()
        if len(flat):
            name = int(torch.unique(data.group)[flat[0, 0]])
            raise ValueError(f"reward-modelling: group {name} has no two texts of different rank, so no pair to learn")
        self.data = data
        order = torch.argsort(data.group, stable=True)
        self._groups = order.split(present.sum(dim=1).tolist())

    @classmethod
    def data_of(cls, task: TextTask) -> Trajectories | None:
        """None: a task keeps its reward model, not the preferences that made it."""
        return None

    def batches(self) -> Iterator[Trajectories]:
        """Passes over the groups, each in a new order that depends on the seed and the pass alone."""
        size = self.config.episodes
        assert size is not None
        for index in stream(len(self._groups), size, self.config.seed, self.iterations_done):
            # A group drawn twice in one batch (there are fewer than `size`) must not become one group of
            # twice the texts.
            rows = [self._groups[i] for i in index]
            batch = self.data.select(torch.cat(rows))
            sizes = torch.tensor([len(r) for r in rows])
            batch.group = torch.repeat_interleave(torch.arange(len(rows)), sizes)
            yield batch

    def loss(self, traj: Trajectories, now: Scores, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        """The mean over groups of the mean over pairs, and the share of pairs that the scores order
        rightly.
        """
        assert traj.group is not None and traj.rank is not None
        scores, _ = by_group(now.score, traj.group, 0.0)
        ranks, _ = by_group(traj.rank, traj.group, -1)
        loss = bradley_terry_loss(scores, ranks)
        pairs = (ranks[:, :, None] < ranks[:, None, :]) & (ranks >= 0)[:, :, None]
        right = pairs & (scores[:, :, None] > scores[:, None, :])
        return loss, {"pair_loss": loss.detach(), "accuracy": (right.sum(), pairs.sum())}


def by_group(x: Tensor, group: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Rows as a table, one line per group.

    Args:
        x: ``(B,)``.
        group: ``(B,)`` int64.
        fill: for groups smaller than the largest.

    Returns:
        ``(G, K)`` in the order of the groups' numbers and of the rows within each, and where it holds a row,
        bool.
    """
    counts = torch.unique(group, return_counts=True)[1]
    present = torch.arange(int(counts.max()), device=x.device) < counts[:, None]
    table = x.new_full(present.shape, fill)
    return table.masked_scatter(present, x[torch.argsort(group, stable=True)]), present


def preferences(
    groups: Sequence[Sequence[Sequence[int]]],
    rank: Sequence[Sequence[int]],
    prompt_length: int,
    max_new_tokens: int,
) -> Trajectories:
    """Ranked texts as Trajectories.

    Args:
        groups: per prompt its texts as token ids, prompt and response in one.
        rank: per prompt the rank of each text, 0 the best.
        prompt_length, max_new_tokens: as for :func:`lm_envs.algos.sft.demonstrations`.
    """
    texts = [text for group in groups for text in group]
    number = [i for i, group in enumerate(groups) for _ in group]
    traj = demonstrations(texts, prompt_length, max_new_tokens, number)
    traj.rank = torch.as_tensor([place for ranks in rank for place in ranks], dtype=torch.int64)
    if traj.rank.shape != (len(texts),):
        raise ValueError(f"preferences: {len(texts)} texts and {len(traj.rank)} ranks; there must be one rank per text")
    return traj
