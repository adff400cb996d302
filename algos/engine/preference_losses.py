"""The losses of DPO's family on a batch, with their settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from lm_envs.algos.engine.comparisons import by_group, group_weights
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.ops.advantages import masked
from lm_envs.algos.ops.losses import (
    conservative_dpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from lm_envs.settings import NonNegative, Positive, SettingError
from lm_envs.trajectories import Trajectories

Loss = Literal["sigmoid", "ipo", "cdpo", "robust", "simpo", "orpo", "kto"]
_RATIO: dict[str, Any] = {"beta": 0.1, "length_normalized": False}
READS: dict[str, dict[str, Any]] = {
    "sigmoid": _RATIO,
    "ipo": _RATIO,
    "cdpo": {**_RATIO, "flip_rate": 0.1},
    "robust": {**_RATIO, "flip_rate": 0.1},
    "simpo": {"beta": 2.0, "target_margin": 1.0},
    "orpo": {"odds_weight": 0.1},
    "kto": {"beta": 0.1, "wanted_weight": 1.0, "unwanted_weight": 1.0},
}
"""The settings that each loss reads, with the values that stand for None."""
REFERENCE_FREE = ("simpo", "orpo")


@dataclass
class PreferenceLossConfig(AgentConfig):
    """Adds the loss on preferences and its settings. None is the value in :data:`READS`; ValueError for a setting that
    the loss does not read."""

    loss: Loss = "sigmoid"
    """DPO's "sigmoid" or another: "ipo", "cdpo" (conservative), "robust", "simpo", "orpo", "kto" (from labels)."""
    beta: Positive | None = None
    """Coefficient of the implicit KL penalty; in "simpo" the scale of the mean log-probability."""
    length_normalized: bool | None = None
    """Divide each response's log-ratio by its number of tokens ("sigmoid", "ipo", "cdpo", "robust")."""
    flip_rate: Annotated[float, Interval(ge=0, lt=0.5)] | None = None
    """Share of choices that "cdpo" and "robust" take to be recorded the wrong way round."""
    target_margin: NonNegative | None = None
    """Margin that "simpo" asks for, its gamma."""
    odds_weight: Positive | None = None
    """Weight of the odds ratio in "orpo", its lambda."""
    wanted_weight: Positive | None = None
    """Weight of wanted responses in "kto"."""
    unwanted_weight: Positive | None = None
    """Weight of unwanted responses in "kto"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in dict.fromkeys(name for reads in READS.values() for name in reads):
            if name in READS[self.loss]:
                setattr(self, name, READS[self.loss][name] if getattr(self, name) is None else getattr(self, name))
            elif getattr(self, name) is not None:
                readers = ", ".join(loss for loss, reads in READS.items() if name in reads)
                raise SettingError(f"loss={self.loss!r} does not read {name}, which is for {readers}", name)


def log_ratio(traj: Trajectories, now: Any) -> Tensor:
    """``D = sum_t log pi - log ref`` of each row, ``(B,)``."""
    assert traj.ref_logprob is not None
    return (masked(now.logprob, traj.mask) - masked(traj.ref_logprob, traj.mask).to(now.logprob.dtype)).sum(dim=1)


def drift(log_ratio: Tensor) -> float:
    """KTO's estimate of ``KL(pi || ref)``: the mean log-ratio of mismatched responses, at least 0."""
    return max(0.0, float(log_ratio.double().mean()))


PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor, Any, Tensor | None], Tensor]] = {
    "sigmoid": lambda x, rank, config, weight: dpo_loss(x, rank, config.beta, weight),
    "ipo": lambda x, rank, config, weight: ipo_loss(x, rank, config.beta, weight),
    "cdpo": lambda x, rank, config, weight: conservative_dpo_loss(x, rank, config.beta, config.flip_rate, weight),
    "robust": lambda x, rank, config, weight: robust_dpo_loss(x, rank, config.beta, config.flip_rate, weight),
    "simpo": lambda x, rank, config, weight: simpo_loss(x, rank, config.beta, config.target_margin, weight),
    "orpo": lambda x, rank, config, weight: orpo_loss(x, rank, config.odds_weight, weight),
}


def preference_loss(traj: Trajectories, now: Any, config: PreferenceLossConfig) -> tuple[Tensor, dict[str, Metric]]:
    """Return the config's loss of a batch of whole groups, and its metrics."""
    assert traj.group is not None and traj.rank is not None
    free, beta = config.loss in REFERENCE_FREE, config.beta or 1.0
    each = masked(now.logprob, traj.mask).sum(dim=1) if free else log_ratio(traj, now)
    if free or config.length_normalized:
        each = each / traj.response_lengths
    found, _ = by_group(each, traj.group, 0.0)
    ranks, _ = by_group(traj.rank, traj.group, -1)
    loss = PAIR_LOSSES[config.loss](found, ranks, config, group_weights(traj))
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & (ranks >= 0)[:, :, None]
    margin = (found[:, :, None] - found[:, None, :]).detach()
    return loss, {
        "dpo_loss": loss.detach(),
        "accuracy": ((pairs & (margin > 0)).sum(), pairs.sum()),
        "margin": (beta * masked(margin, pairs).sum(), pairs.sum()),
    }


def label_loss(
    traj: Trajectories, now: Any, config: PreferenceLossConfig, baseline: float
) -> tuple[Tensor, dict[str, Metric]]:
    """Return KTO's loss and its metrics; the baseline is that of the batch's mismatched rows, where it has any."""
    assert traj.rank is not None and config.beta and config.wanted_weight and config.unwanted_weight
    ratio, labeled = log_ratio(traj, now), traj.rank >= 0
    if not bool(labeled.all()):
        baseline = drift(ratio[~labeled].detach())
    ratio, wanted = ratio[labeled], traj.rank[labeled] == 0
    weight = torch.where(wanted, config.wanted_weight, config.unwanted_weight)
    weight = weight if traj.weight is None else weight * traj.weight[labeled]
    loss = kto_loss(ratio, wanted, baseline, config.beta, weight.to(ratio.dtype))
    metrics: dict[str, Metric] = {
        "dpo_loss": loss.detach(),
        "accuracy": (((ratio > baseline) == wanted).sum(), labeled.sum()),
    }
    for name, rows in (("wanted_reward", wanted), ("unwanted_reward", ~wanted)):
        metrics[name] = (config.beta * masked(ratio.detach(), rows).sum(), rows.sum())
    return loss, metrics
