"""Metrics of a batch as sampled, and exact averages of an update's metrics over its parts."""

import math
from collections.abc import Mapping

from torch import Tensor

from lm_envs.algos.ops.advantages import masked
from lm_envs.trajectories import Trajectories

Metric = Tensor | tuple[Tensor, Tensor]
"""A scalar, the mean over the loss's units; or ``(sum, count)``; a name ending in ``_max`` holds a maximum."""


class Averages:
    """Averages of metrics over micro-batches and minibatches of any size, as if they had been one."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Metric | float], weight: float) -> None:
        """Add a part. ``weight`` is its number of units, by which scalars count; a pair brings its own count."""
        for name, metric in metrics.items():
            if name.endswith("_max"):
                self._sums[name] = max(self._sums.get(name, -math.inf), float(metric))  # type: ignore[arg-type]
                self._weights[name] = 1.0
                continue
            total, count = metric if isinstance(metric, tuple) else (metric * weight, weight)
            self._sums[name] = self._sums.get(name, 0.0) + float(total)
            self._weights[name] = self._weights.get(name, 0.0) + float(count)

    def join(self, *others: "Averages") -> "Averages":
        """Add all that was added to others, and return these averages."""
        for other in others:
            for name, total in other._sums.items():
                self.add({name: total if name.endswith("_max") else (total, other._weights[name])}, 1.0)  # type: ignore[dict-item]
        return self

    def means(self) -> dict[str, float]:
        """The averages so far, of what was counted at all."""
        return {name: total / self._weights[name] for name, total in self._sums.items() if self._weights[name]}


def describe(traj: Trajectories) -> dict[str, float]:
    """Means over rows: ``length``, and where known ``return``, ``score`` and ``kl`` (nats per sequence)."""
    metrics = {"length": float(traj.response_lengths.double().mean())}
    if traj.reward is not None:
        metrics["return"] = float(masked(traj.reward, traj.mask).sum(dim=1).double().mean())
    if traj.score is not None:
        metrics["score"] = float(traj.score.double().mean())
    if traj.logprob is not None and traj.ref_logprob is not None:
        metrics["kl"] = float(masked(traj.logprob - traj.ref_logprob, traj.mask).sum(dim=1).double().mean())
    return metrics
