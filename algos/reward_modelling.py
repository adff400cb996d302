"""Reward modeling: a scalar per text that orders texts as annotators did."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.comparisons import Comparisons, by_group, group_weights
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.ops.losses import plackett_luce_loss
from lm_envs.algos.policies.base import Policy
from lm_envs.model.tokens import right_pad
from lm_envs.reward.learned import raw_scores
from lm_envs.settings import Rate, Size
from lm_envs.training import bradley_terry_loss
from lm_envs.trajectories import Trajectories


@dataclass
class Scores:
    """A :class:`RewardPolicy`'s evaluation: ``score (B,)``."""

    score: Tensor


class RewardPolicy(Policy):
    """A transformers sequence-classification model as a policy that agents train.

    The score is read at the position of each text's last token, never by pad id (see
    :func:`lm_envs.reward.learned.raw_scores`).

    Args:
        model: one label (the score) or two (the log-odds).
    """

    sequence_obs = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()

    def evaluate(self, traj: Trajectories) -> Scores:  # type: ignore[override]  # scores are all that its agent reads
        """Score each row's prompt and response, given as ``obs (B, P + T)``."""
        if traj.obs is None:
            raise ValueError("RewardPolicy.evaluate needs Trajectories.obs, (B, P + T) token ids with -1 for none")
        ids = right_pad([row[row >= 0].tolist() for row in traj.obs]).to(self.model.device)
        scores = raw_scores(self.model, ids)
        return Scores(scores.to(torch.promote_types(scores.dtype, torch.float32)))  # differences need precision


@dataclass
class RewardModellingConfig(AgentConfig):
    """Settings of :class:`RewardModelling`; `episodes` is the number of groups per iteration."""

    learning_rate: Rate = 1e-3
    episodes: Size | None = 64
    """Groups of ranked texts per iteration."""
    ranking: Literal["pairs", "plackett-luce"] = "pairs"
    """Interpret a ranking as all its pairs (Bradley-Terry) or as repeated choices of the best of the rest
    (Plackett-Luce)."""


class RewardModelling(Agent[RewardModellingConfig]):
    """Bradley-Terry over all pairs of a group, ``-log sigmoid(s_better - s_worse)``, weighted ``1 / (K choose
    2)`` (Ouyang et al. 2022, eq. 1), or Plackett-Luce.

    All K texts of a prompt are in one minibatch, so each is read once. The policy is a :class:`RewardPolicy`; ``data``
    are groups of texts with a ``rank``, 0 the best, see :func:`lm_envs.algos.engine.comparisons.preferences`.

    Raises:
        ValueError: no data, no ranks, a group in which all ranks are equal, or with "plackett-luce" a group with ties.
    """

    Config = RewardModellingConfig
    name = "reward-modelling"
    unit = "group"
    needs_data = True

    def __init__(
        self, policy: Any, config: RewardModellingConfig | None = None, data: Trajectories | None = None
    ) -> None:
        super().__init__(policy, config)
        self.data = self.rows_of(data)
        if self.config.ranking == "plackett-luce":
            check_strict(self.name, self.data.ranks)

    def rows_of(self, data: Any) -> Comparisons:
        return Comparisons(self.name, data)

    def loss(self, traj: Trajectories, now: Scores, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        assert traj.group is not None and traj.rank is not None
        scores, _ = by_group(now.score, traj.group, 0.0)
        ranks, _ = by_group(traj.rank, traj.group, -1)
        fit = bradley_terry_loss if self.config.ranking == "pairs" else plackett_luce_loss
        loss = fit(scores, ranks, group_weights(traj))
        margins = self.margins(traj, now)[1]
        return loss, {"ranking_loss": loss.detach(), "accuracy": ((margins > 0).sum(), torch.tensor(len(margins)))}

    def margins(self, traj: Trajectories, now: Scores) -> tuple[Tensor, Tensor]:
        """``(N,)`` for each pair of a better and a worse text: the number of its group, and the difference of their
        scores."""
        assert traj.group is not None and traj.rank is not None
        scores, _ = by_group(now.score.detach(), traj.group, 0.0)
        ranks, _ = by_group(traj.rank, traj.group, -1)
        pairs = (ranks[:, :, None] < ranks[:, None, :]) & (ranks >= 0)[:, :, None]
        return pairs.nonzero()[:, 0], (scores[:, :, None] - scores[:, None, :])[pairs]


def check_strict(name: str, ranks: Tensor) -> None:
    """Raise ValueError if two texts of a group share a rank; ``ranks (G, K)``, -1 for no text."""
    for number, row in enumerate(ranks):
        places = row[row >= 0]
        if len(torch.unique(places)) < len(places):
            raise ValueError(
                f"{name}: Plackett-Luce needs strict rankings, and in group {number} two texts share a rank; "
                "use ranking='pairs'"
            )
