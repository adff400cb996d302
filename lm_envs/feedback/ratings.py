"""Rank methods by what people preferred: Bradley-Terry with ties, Elo, cycles among methods.

A judgment of K responses counts as its comparisons between responses of different sources. A tie is half a win for
each. Intervals resample items, because the comparisons of one item depend on each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_envs.feedback.agreement import RESAMPLES, Interval, share
from lm_envs.feedback.store import Judgment

# Half a tie between every two methods, so that one that won or lost everything has a finite rating.
PRIOR = 0.5
ORDERS = 200  # of the battles, for Elo
PER_UNIT = 400.0 / np.log(10.0)  # Elo points in a natural log-odds unit


@dataclass(frozen=True)
class Battle:
    """One comparison between two sources: 1 if the first won, 0 if the second did, 0.5 for a tie."""

    item: int
    first: str
    second: str
    result: float


def battles(judgments: Sequence[Judgment]) -> list[Battle]:
    """The comparisons between different sources in what annotators said, in order of time; skipped items have none."""
    found = []
    for judgment in sorted(judgments, key=lambda each: each.at):
        ranks, responses = judgment.answer.ranks, judgment.content.responses
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if responses[i].source != responses[j].source:
                result = (1 + np.sign(ranks[j] - ranks[i])) / 2
                found.append(Battle(judgment.item, responses[i].source, responses[j].source, float(result)))
    return found


def outcomes(found: Sequence[Battle], against: str) -> dict[str, list[tuple[int, float]]]:
    """Per source (item, result) of its battles with ``against``."""
    values: dict[str, list[tuple[int, float]]] = {}
    for battle in found:
        if battle.second == against:
            values.setdefault(battle.first, []).append((battle.item, battle.result))
        elif battle.first == against:
            values.setdefault(battle.second, []).append((battle.item, 1 - battle.result))
    return values


def win_rates(found: Sequence[Battle], against: str, *, seed: int = 0) -> dict[str, Interval]:
    """How often each source is preferred to ``against``, ties half, with 95 % intervals over items."""
    return {name: share(rows, seed=seed) for name, rows in sorted(outcomes(found, against).items())}


def bradley_terry(found: Sequence[Battle], *, seed: int = 0) -> dict[str, Interval]:
    """Ratings in Elo points around a mean of 0: maximum likelihood of Bradley and Terry (1952), with 95 % intervals.

    ``P(a over b) = 1 / (1 + 10^((rating_b - rating_a) / 400))``. Half a tie is added between every two sources.
    """
    names = sorted({name for battle in found for name in (battle.first, battle.second)})
    if len(names) < 2:
        return {}
    place = {name: k for k, name in enumerate(names)}
    items = sorted({battle.item for battle in found})
    row = {item: k for k, item in enumerate(items)}
    wins = np.zeros((len(items), len(names), len(names)))
    for battle in found:
        a, b, k = place[battle.first], place[battle.second], row[battle.item]
        wins[k, a, b] += battle.result
        wins[k, b, a] += 1 - battle.result
    fitted = _fit(wins.sum(0))
    draws = np.random.default_rng(seed)
    weights = draws.multinomial(len(items), np.full(len(items), 1 / len(items)), size=RESAMPLES)
    resampled = _fit(np.tensordot(weights, wins, 1))
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    counts = (wins.sum(0) + wins.sum(0).T).sum(1)
    points = PER_UNIT * np.stack([fitted, low, high])
    return {
        name: Interval(float(points[0, k]), float(points[1, k]), float(points[2, k]), int(counts[k]))
        for name, k in place.items()
    }


def _fit(wins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-strengths with mean 0 of ``(..., N, N)`` tables of wins: Newton's steps on the concave log-likelihood."""
    count = wins.shape[-1]
    wins = wins + PRIOR / 2 * (1 - np.eye(count))
    games = wins + np.swapaxes(wins, -1, -2)
    logs = np.zeros(wins.shape[:-1])
    for _ in range(100):
        expected = 1 / (1 + np.exp(logs[..., None, :] - logs[..., :, None]))
        gradient = (wins - games * expected).sum(-1)
        weight = games * expected * (1 - expected)
        # The likelihood does not change with a constant: the 1 fixes the mean.
        curvature = np.eye(count) * weight.sum(-1)[..., None] - weight + 1
        step = np.clip(np.linalg.solve(curvature, gradient[..., None])[..., 0], -2, 2)
        logs = logs + step
        if np.abs(step).max() < 1e-10:
            break
    return logs - logs.mean(-1, keepdims=True)


def elo(found: Sequence[Battle], *, k: float = 16.0, start: float = 1000.0, seed: int = 0) -> dict[str, Interval]:
    """Elo ratings (Elo 1978): the mean over random orders of the battles, with 95 % intervals over resampled items.

    Elo depends on the order of play, which means nothing in a study: hence the orders, of each resample too.
    """
    names = sorted({name for battle in found for name in (battle.first, battle.second)})
    place = {name: index for index, name in enumerate(names)}
    first = np.array([place[battle.first] for battle in found], dtype=int)
    second = np.array([place[battle.second] for battle in found], dtype=int)
    result = np.array([battle.result for battle in found])
    draws = np.random.default_rng(seed)

    def play(rows: Sequence[NDArray[np.int64]], orders: int) -> NDArray[np.float64]:
        """(R, N): the mean ratings over orders of each row of battles; all rows and orders play at a time."""
        most = max(map(len, rows))
        battles = np.stack([np.pad(row, (0, most - len(row)), constant_values=-1) for row in rows]).repeat(orders, 0)
        battles = np.take_along_axis(battles, np.argsort(draws.random(battles.shape, np.float32), axis=1), axis=1)
        rating, every = np.full((len(battles), len(names)), start), np.arange(len(battles))
        for column in battles.T:
            a, b = first[column], second[column]
            expected = 1 / (1 + 10 ** ((rating[every, b] - rating[every, a]) / 400))
            change = np.where(column < 0, 0.0, k * (result[column] - expected))
            rating[every, a] += change
            rating[every, b] -= change
        return rating.reshape(len(rows), orders, len(names)).mean(1)

    of_item: dict[int, list[int]] = {}
    for number, battle in enumerate(found):
        of_item.setdefault(battle.item, []).append(number)
    if not of_item:
        return {}
    (means,) = play([np.arange(len(found))], ORDERS)
    groups = [np.array(numbers) for numbers in of_item.values()]
    drawn = draws.integers(len(groups), size=(RESAMPLES // 5, len(groups)))
    at_once = max(1, 2_000_000 // len(found) // 10)  # resamples, so that memory stays small
    parts = [drawn[k : k + at_once] for k in range(0, len(drawn), at_once)]
    resampled = np.concatenate([play([np.concatenate([groups[g] for g in row]) for row in part], 10) for part in parts])
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    counts = np.bincount(np.concatenate([first, second]), minlength=len(names))
    return {name: Interval(float(means[i]), float(low[i]), float(high[i]), int(counts[i])) for name, i in place.items()}


def cycles(found: Sequence[Battle]) -> tuple[int, int]:
    """Triples of sources whose majorities go in a circle, and all triples in which every two were compared."""
    score: dict[tuple[str, str], float] = {}
    for battle in found:
        score[battle.first, battle.second] = score.get((battle.first, battle.second), 0.0) + battle.result - 0.5
        score[battle.second, battle.first] = score.get((battle.second, battle.first), 0.0) + 0.5 - battle.result
    names = sorted({name for pair in score for name in pair})
    circular = complete = 0
    for a, b, c in itertools.combinations(names, 3):
        if (a, b) in score and (b, c) in score and (a, c) in score:
            complete += 1
            signs = {np.sign(score[a, b]), np.sign(score[b, c]), np.sign(score[c, a])}
            circular += signs in ({1.0}, {-1.0})
    return circular, complete
