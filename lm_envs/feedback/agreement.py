"""How far annotators agree: raw agreement, Cohen's and Fleiss' kappa, Krippendorff's alpha; their biases and times.

A judgment of K responses is K (K - 1) / 2 comparisons: 1 if one response was put first, -1 if the other was,
0 for a tie. Which response is the first category alternates between items. Were it always the same method, people who
agree that it is better would hardly use the other category, and seem to agree by chance. Intervals resample items
(percentile bootstrap), because the comparisons of one item depend on each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lm_envs.feedback.store import Judgment

RESAMPLES = 1_000
Unit = tuple[int, int, int]  # item, first response, second response


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; NaN where there is nothing to estimate it from."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]" if self.count else "-"


def comparisons(judgments: Sequence[Judgment]) -> dict[Unit, dict[str, int]]:
    """Per comparison what each annotator said, -1, 0 or 1; skipped items are left out."""
    found: dict[Unit, dict[str, int]] = {}
    for judgment in judgments:
        ranks = judgment.answer.ranks
        for i, j in itertools.combinations(range(len(ranks)), 2):
            one, other = (i, j) if (judgment.item + i + j) % 2 == 0 else (j, i)
            found.setdefault((judgment.item, i, j), {})[judgment.annotator] = int(np.sign(ranks[other] - ranks[one]))
    return found


def raw_agreement(said: Mapping[Unit, Mapping[str, int]]) -> float:
    """The share of pairs of annotators that said the same of a comparison, over all comparisons; NaN without a pair."""
    same = [a == b for votes in said.values() for a, b in itertools.combinations(votes.values(), 2)]
    return float(np.mean(same)) if same else float("nan")


def cohen_kappa(first: Sequence[int], second: Sequence[int]) -> float:
    """Agreement of two annotators beyond chance, ``(p_o - p_e) / (1 - p_e)`` (Cohen 1960); NaN where ``p_e`` is 1.

    Args:
        first, second: what each said of the same things, in the same order.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or not a.size:
        return float("nan")
    chance = sum(float((a == value).mean() * (b == value).mean()) for value in np.union1d(a, b))
    return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else float("nan")


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float:
    """Agreement of n annotators beyond chance (Fleiss 1971).

    Args:
        counts: per thing that was judged, how many annotators chose each category; every row sums to the same n >= 2.

    Raises:
        ValueError: rows with unequal sums; Krippendorff's alpha takes those.
    """
    table = np.asarray(counts, dtype=float)
    if not table.size:
        return float("nan")
    n = table[0].sum()
    if n < 2 or (table.sum(1) != n).any():
        raise ValueError("Fleiss' kappa needs the same number of annotators, at least 2, for each thing judged")
    observed = ((table * (table - 1)).sum(1) / (n * (n - 1))).mean()
    chance = ((table.sum(0) / table.sum()) ** 2).sum()
    return float((observed - chance) / (1 - chance)) if chance < 1 else float("nan")


def alpha(values: Mapping[Any, Mapping[str, float]], level: Literal["nominal", "ordinal"]) -> float:
    """Krippendorff's alpha; NaN with fewer than two values that can be compared, or where all are equal.

    Args:
        values: per thing that was judged, each annotator's value; annotators may be missing.
        level: ``nominal`` or ``ordinal``.
    """
    import krippendorff

    annotators = sorted({name for row in values.values() for name in row})
    table = [[row.get(name, np.nan) for row in values.values()] for name in annotators]
    paired = [value for row in values.values() if len(row) > 1 for value in row.values()]
    if len(set(paired)) < 2:
        return float("nan")
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement=level))


def ratings(judgments: Sequence[Judgment]) -> dict[tuple[int, int], dict[str, float]]:
    """Per (item, response) each annotator's rating, of studies that rate."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for judgment in judgments:
        for place, rating in enumerate(judgment.answer.ratings):
            found.setdefault((judgment.item, place), {})[judgment.annotator] = float(rating)
    return found


def against_others(said: Mapping[Unit, Mapping[str, int]], name: str) -> list[bool]:
    """For each comparison of an annotator on which a majority of the others is agreed: the same as that majority?"""
    found = []
    for votes in said.values():
        others = [vote for other, vote in votes.items() if other != name]
        if name in votes and others:
            best = max(set(others), key=others.count)
            if 2 * others.count(best) > len(others):
                found.append(votes[name] == best)
    return found


def against_known(judgments: Sequence[Judgment], name: str) -> list[bool]:
    """For each comparison of a gold item that has a better response: did the annotator put that one first?"""
    found = []
    for judgment in judgments:
        known, ranks = judgment.content.known, judgment.answer.ranks
        if judgment.annotator == name and known and ranks:
            for i, j in itertools.combinations(range(len(known)), 2):
                if known[i] != known[j]:
                    found.append(int(np.sign(ranks[j] - ranks[i])) == int(np.sign(known[j] - known[i])))
    return found


def predicted(judgments: Sequence[Judgment], scores: Sequence[Sequence[float]]) -> list[tuple[int, float, float]]:
    """(item, margin, 1 or 0) per comparison that people decided: how far apart a model's scores of the two are, and
    whether people preferred the one that it scores higher; 0.5 where it scores them alike.

    Args:
        scores: of each judgment's responses.
    """
    found = []
    for judgment, row in zip(judgments, scores, strict=True):
        ranks = judgment.answer.ranks
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if ranks[i] != ranks[j]:
                margin = (row[i] - row[j]) * np.sign(ranks[j] - ranks[i])
                found.append((judgment.item, abs(float(margin)), 0.5 + 0.5 * float(np.sign(margin))))
    return found


def position_bias(judgments: Sequence[Judgment]) -> list[tuple[int, float]]:
    """(item, 1 or 0) per decided comparison: was the response that was shown first preferred? Half is no bias."""
    return _preferred(judgments, lambda judgment, i, j: judgment.order.index(j) - judgment.order.index(i))


def length_bias(judgments: Sequence[Judgment]) -> list[tuple[int, float]]:
    """(item, 1 or 0) per decided comparison of unequal lengths in characters: was the longer response preferred?"""
    return _preferred(
        judgments,
        lambda judgment, i, j: len(judgment.content.responses[i].text) - len(judgment.content.responses[j].text),
    )


def _preferred(judgments: Sequence[Judgment], lead: Callable[[Judgment, int, int], int]) -> list[tuple[int, float]]:
    found = []
    for judgment in judgments:
        ranks = judgment.answer.ranks
        for i, j in itertools.combinations(range(len(ranks)), 2):
            ahead = lead(judgment, i, j)
            if ranks[i] != ranks[j] and ahead:
                found.append((judgment.item, float((ranks[i] < ranks[j]) == (ahead > 0))))
    return found


def intervals(
    statistic: Callable[[Sequence[Judgment]], float], judgments: Sequence[Judgment], *, seed: int = 0
) -> Interval:
    """A statistic of judgments with the 95 % percentile interval over resampled items."""
    items: dict[int, list[Judgment]] = {}
    for judgment in judgments:
        items.setdefault(judgment.item, []).append(judgment)
    value = statistic(judgments)
    if not items or np.isnan(value):
        return Interval(value, float("nan"), float("nan"), 0)
    draws = np.random.default_rng(seed)
    groups = list(items.values())
    found: list[float] = []
    for _ in range(RESAMPLES):
        # A group that is drawn twice counts as two items, or its annotators would be merged.
        chosen = [
            _renumbered(judgment, copy)
            for copy, group in enumerate(draws.integers(len(groups), size=len(groups)))
            for judgment in groups[group]
        ]
        found.append(statistic(chosen))
    low, high = np.nanquantile(found, (0.025, 0.975)) if not np.isnan(found).all() else (float("nan"),) * 2
    return Interval(value, float(low), float(high), len(groups))


def _renumbered(judgment: Judgment, item: int) -> Judgment:
    return Judgment(judgment.annotator, item, judgment.content, judgment.order, judgment.answer, judgment.at)


def share(found: Sequence[tuple[int, float]], *, seed: int = 0) -> Interval:
    """The mean of (item, value) with the 95 % percentile interval over resampled items."""
    if not found:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    items = sorted({item for item, _ in found})
    place = {item: k for k, item in enumerate(items)}
    sums, counts = np.zeros(len(items)), np.zeros(len(items))
    for item, value in found:
        sums[place[item]] += value
        counts[place[item]] += 1
    draws = np.random.default_rng(seed).integers(len(items), size=(RESAMPLES, len(items)))
    means: NDArray[np.float64] = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), len(found))


def seconds(judgments: Sequence[Judgment]) -> float:
    """The median time of an answer; NaN without answers. A median, because people fetch coffee."""
    found = [judgment.answer.seconds for judgment in judgments]
    return float(median(found)) if found else float("nan")
