"""Statistics of a comparison: errors that count prompts and seeds, tests between methods, aggregates over runs.

An outcome is ``(S, P)``: a row per training seed, a column per prompt; all seeds answer the same prompts. Where only a
number per run is known, P is 1. Aggregates and their intervals follow Agarwal et al. 2021, "Deep reinforcement learning
at the edge of the statistical precipice".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, expit, logit, ndtr, ndtri, stdtrit

Array = NDArray[np.float64]
CONFIDENCE = 0.95
RESAMPLES = 2_000
_ROUNDING = 1e-12  # smaller differences between exact values are those of sums
_RIDGE = 0.1  # keeps the logistic fit finite where every prompt is won


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and the degrees of freedom of Student's t; NaN where they are not known.

    Attributes:
        layers: what the error counts: "prompts", "seeds" and the task's "models".
        models: the task's models' part of the variance, from 0 to 1; NaN where the error does not count them.
        p: two-sided p-value of the hypothesis that the value is 0.
    """

    value: float
    error: float = math.nan
    freedom: float = math.nan
    layers: tuple[str, ...] = ()
    p: float = math.nan
    models: float = math.nan

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - self._half

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + self._half

    @property
    def _half(self) -> float:
        return 0.0 if self.error < _ROUNDING else float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2)) * self.error


UNKNOWN = Estimate(math.nan)


def crossed_mean(outcomes: Array, rows: str = "seeds") -> Estimate:
    """Estimate the mean of ``(S, P)`` outcomes over new seeds and new prompts; prompts with a NaN are left out.

    With the mean squares of a two-way layout, of seeds, prompts and the rest, the variance is
    ``(MS_S + MS_P - MS_E) / (S P)`` (Cornfield and Tukey 1956), at least what seeds or prompts alone give, with the
    degrees of freedom of Satterthwaite (1946). One seed counts prompts only, one column seeds only.

    Args:
        rows: the name of the layer that the rows are.
    """
    outcomes = outcomes[:, ~np.isnan(outcomes).any(axis=0)]
    count, prompts = outcomes.shape
    if not outcomes.size:
        return UNKNOWN
    mean = float(outcomes.mean())
    if count == 1 or prompts == 1:
        values, layer = outcomes.ravel(), "prompts" if count == 1 else rows
        if len(values) == 1:
            return Estimate(mean)
        variance, degrees = float(values.var(ddof=1)) / len(values), len(values) - 1
        return Estimate(mean, math.sqrt(variance), degrees, (layer,), _p_value(mean, variance, degrees))
    by_row, by_prompt = outcomes.mean(axis=1), outcomes.mean(axis=0)
    rest = outcomes - by_row[:, None] - by_prompt + mean
    freedom = (count - 1, prompts - 1, (count - 1) * (prompts - 1))
    # Each as its share of the variance of the mean.
    a = float(by_row.var(ddof=1)) / count
    b = float(by_prompt.var(ddof=1)) / prompts
    c = float((rest**2).sum()) / freedom[2] / outcomes.size
    v = max(a + b - c, 0.0)
    both = v, v * v / max(a * a / freedom[0] + b * b / freedom[1] + c * c / freedom[2], 1e-300)
    variance, degrees = max(both, (a, freedom[0]), (b, freedom[1]))
    few, other = (a, b) if count <= prompts else (b, a)
    p = _p_value(mean, few, min(freedom[:2]), max(other - c, 0.0))
    return Estimate(mean, math.sqrt(variance), degrees, (rows, "prompts"), p)


def nested_mean(outcomes: Array, models: Sequence[int]) -> Estimate:
    """Estimate the mean of ``(S, P)`` outcomes, of runs on the models ``(S,)`` of a task, over new models too.

    Runs are nested in models: the mean square of the models' means holds the seeds of each. So it is
    :func:`crossed_mean` with a row per model; models of more or fewer runs count alike. With one model it is that of
    its runs.
    """
    groups = [outcomes[np.equal(models, model)] for model in dict.fromkeys(models)]
    if len(groups) < 2:
        return crossed_mean(outcomes)
    found = crossed_mean(np.array([group.mean(axis=0) for group in groups]), "models")
    if "models" not in found.layers:
        return found
    layers = ("models", "seeds", *(layer for layer in found.layers if layer != "models"))
    if any(len(group) < 2 for group in groups):  # one seed a model: the two cannot be told apart
        return replace(found, layers=layers)
    by_run = [np.nanmean(group, axis=1) for group in groups]
    means = np.array([values.mean() for values in by_run])
    within = float(np.mean([values.var(ddof=1) / len(values) for values in by_run]))
    between = max(float(means.var(ddof=1)) - within, 0.0) / len(groups)
    return replace(found, layers=layers, models=min(between / max(found.error**2, 1e-300), 1.0))


# Shares of a chi-squared distribution, fine where it is near 0 and the variance may therefore be large.
_SHARES = np.concatenate([[0.0], np.logspace(-12, -1, 400), np.linspace(0.1, 1, 201)[1:]])


@functools.cache
def _over_chi_squared(degrees: int) -> Array:
    """``degrees / chi2`` in the middle of each of :data:`_SHARES`."""
    return degrees / chdtri(degrees, 1 - (_SHARES[1:] + _SHARES[:-1]) / 2)


def _p_value(mean: float, variance: float, degrees: int, known: float = 0.0) -> float:
    """Return the two-sided p-value of a mean of this estimated variance, with degrees of freedom, and a known one more.

    The fiducial distribution of Fisher (1935), ``E[2 Phi(-|mean| / sqrt(variance degrees / chi2 + known))]``: without
    the known part Student's t. Satterthwaite's is too light in the tails that :func:`holm` looks at.
    """
    if variance + known < _ROUNDING**2:
        return float(abs(mean) < _ROUNDING)
    spread = np.sqrt(variance * _over_chi_squared(degrees) + known)
    return float((np.diff(_SHARES) * 2 * ndtr(-abs(mean) / spread)).sum())


def holm(p_values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Adjust p-values so that calling all below 0.05 true errs in at most 5 % of comparisons (Holm 1979, section 4);
    NaN stays.

    Args:
        weights: how much of the 5 % each may spend, in any unit; equal by default.
    """
    weights = [1.0] * len(p_values) if weights is None else weights
    known = sorted((p / w, w, i) for i, (p, w) in enumerate(zip(p_values, weights, strict=True)) if not math.isnan(p))
    found, least, left = [math.nan] * len(p_values), 0.0, math.fsum(w for _, w, _ in known)
    for ratio, weight, i in known:
        least = max(least, min(1.0, ratio * left))
        found[i] = least
        left -= weight
    return found


def enough_seeds(values: Array, level: float, most: int = 100) -> int | None:
    """Return how many seeds would give a mean a p-value below ``level`` if they differed as ``values`` ``(S,)``, one
    per seed, do; None if more than ``most``."""
    mean, variance = float(values.mean()), float(values.var(ddof=1))
    counts = (n for n in range(2, most + 1) if _p_value(mean, variance / n, n - 1) < level)
    return next(counts, None)


def length_controlled(wins: Array, gaps: Array, models: Sequence[int] | None = None) -> Estimate:
    """Estimate the win-rate at equal lengths, from outcomes and differences in length (tokens), both ``(S, P)``.

    ``P(win) = sigmoid(a + b tanh(gap / sd))`` is fitted, and ``sigmoid(a)`` is the win-rate at a gap of 0 (Dubois et
    al. 2024, "Length-controlled AlpacaEval", without their terms for instructions). Its error is that of
    :func:`crossed_mean` of the fit's influence values.
    """
    known = ~(np.isnan(wins) | np.isnan(gaps)).any(axis=0)
    wins, gaps = wins[:, known], gaps[:, known]
    if not wins.size:
        return UNKNOWN
    x = np.stack([np.ones(wins.size), np.tanh(gaps.ravel() / max(float(gaps.std()), 1e-12))], axis=1)
    weights = np.zeros(2)
    for _ in range(50):
        rate = expit(x @ weights)
        curvature = (x * (rate * (1 - rate))[:, None]).T @ x + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, x.T @ (wins.ravel() - rate) - _RIDGE * weights)
        weights = weights + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    value = float(expit(weights[0]))
    influence = np.linalg.solve(curvature, (x * (wins.ravel() - rate)[:, None]).T)[0] * wins.size
    found = nested_mean((value + value * (1 - value) * influence).reshape(wins.shape), models or [0] * len(wins))
    return replace(found, value=value, p=math.nan)


# Aggregates of scores, one per run, by task; rows ``(..., N)`` are averaged over the last axis


def interquartile_mean(scores: Array) -> Array:
    """Mean of the middle half: a quarter of the scores, rounded down, is left out at each end."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def optimality_gap(scores: Array, optimum: float = 1.0) -> Array:
    """Mean amount by which scores fall short of the optimum; more than it does not count."""
    return np.maximum(optimum - scores, 0).mean(axis=-1)


def performance_profile(
    scores: Array, thresholds: Array, models: Sequence[int] | None = None
) -> tuple[Array, Array, Array]:
    """Return the share of scores ``(S, P)`` above each threshold ``(K,)``, and the ends of its 95 % intervals.

    The intervals stay within 0 and 1 and hold near them, where resampling a few runs gives none: over seeds and prompts
    that of :func:`crossed_mean` for the share's logit, over runs or prompts alone that of Wilson (1927). NaN for a
    single score; no width over runs and prompts where the share is 0 or 1, which says nothing of its error.
    """
    models = models or [0] * len(scores)
    found = [_share((scores > threshold).astype(float), models) for threshold in thresholds]
    shares, lows, highs = np.array(found).T
    return shares, lows, highs


def _share(outcomes: Array, models: Sequence[int]) -> tuple[float, float, float]:
    """A share of outcomes ``(S, P)`` of 0 and 1, of runs on these models of a task, with its interval."""
    share, count = float(outcomes.mean()), outcomes.size
    if count == 1:
        return share, math.nan, math.nan
    if 1 in outcomes.shape:
        z2 = float(ndtri((1 + CONFIDENCE) / 2)) ** 2
        middle = (share + z2 / (2 * count)) / (1 + z2 / count)
        half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count) / (1 + z2 / count)
        return share, middle - half, middle + half
    if share in (0.0, 1.0):
        return share, share, share
    found = nested_mean(outcomes, models)
    share, half = found.value, (found.high - found.value) / (found.value * (1 - found.value))
    return share, float(expit(logit(share) - half)), float(expit(logit(share) + half))


def stratified(by_task: Sequence[Array], statistic: Callable[[Array], Array], seed: int = 0) -> Estimate:
    """Estimate a statistic of the scores of all tasks together; its error is that of a bootstrap within each task.

    A resample has one score fewer than its task, so that the error of a mean is unbiased (Rao and Wu 1988), and the
    interval is Student's: the percentiles of three to ten runs a task are too narrow. NaN error if a task has one run.
    """
    value = float(statistic(np.concatenate(by_task)))
    if any(len(scores) < 2 for scores in by_task):
        return Estimate(value)
    draws = np.random.default_rng(seed)
    parts = [scores[draws.integers(len(scores), size=(RESAMPLES, len(scores) - 1))] for scores in by_task]
    spread = float(statistic(np.concatenate(parts, axis=1)).std(ddof=1))
    return Estimate(value, spread, sum(len(scores) - 1 for scores in by_task), ("seeds",))


def probability_of_improvement(ours: Sequence[Array], theirs: Sequence[Array]) -> tuple[float, float, float]:
    """Return the probability that a run of one method scores above a run of another, ties half, the mean over tasks,
    and the ends of its 95 % interval.

    Per task it is Mann and Whitney's U by the number of pairs, with the interval of Newcombe (2006, method 5), which
    holds where one method always wins; the intervals of tasks add as in MOVER (Zou and Donner 2008).
    """
    found = [_superiority(x, y) for x, y in zip(ours, theirs, strict=True)]
    values, lows, highs = np.array(found).T
    below, above = (math.sqrt(((values - end) ** 2).sum()) / len(found) for end in (lows, highs))
    mean = float(values.mean())
    return mean, mean - below, mean + above


def _superiority(x: Array, y: Array) -> tuple[float, float, float]:
    value = float((0.5 + 0.5 * np.sign(x[:, None] - y)).mean())
    grid = np.linspace(0, 1, 2_001)
    more = (len(x) + len(y)) / 2 - 1
    variance = grid * (1 - grid) * (1 + more * ((1 - grid) / (2 - grid) + grid / (1 + grid))) / (len(x) * len(y))
    z = float(ndtri((1 + CONFIDENCE) / 2))
    inside = grid[np.abs(grid - value) <= z * np.sqrt(variance)]
    return value, min(value, float(inside.min(initial=value))), max(value, float(inside.max(initial=value)))
