"""``aggregate.csv``: what the runs of a comparison say together, with 95 % intervals and tests between methods."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.benchmarks.measure import statistics
from lm_envs.benchmarks.measure.statistics import Estimate, nested_mean
from lm_envs.benchmarks.run.matched import at_kl
from lm_envs.benchmarks.run.names import base_task, method_name
from lm_envs.benchmarks.run.results import PER_PROMPT, by_method, estimate_of, number, outcomes, run_key, written
from lm_envs.benchmarks.run.storage import write_lines

COLUMNS = ("task", "method", "against", "statistic", "value", "low", "high", "p", "seeds", "prompts", "counts")
ALL_TASKS = "all"
ALARM = 0.05  # chance that a comparison of equal methods calls any of them better
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """How much higher one method of a task scores than another, on the same prompts and training seeds.

    ``p`` is adjusted for all pairs of the task's methods (:func:`differences`). Without training seeds in the error,
    which takes two of them, there is no telling: one run of a method is not the method.
    """

    ours: str
    theirs: str
    measure: str
    estimate: Estimate
    p: float = math.nan

    @property
    def methods(self) -> tuple[str, str]:
        return self.ours, self.theirs

    def reversed(self) -> Difference:
        """The same seen from the other method."""
        turned = replace(self.estimate, value=-self.estimate.value)
        return replace(self, ours=self.theirs, theirs=self.ours, estimate=turned)

    @property
    def clear(self) -> bool:
        """Whether ours is better."""
        return self.p < ALARM and self.estimate.value > 0 and "seeds" in self.estimate.layers


def methods(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Rows]]:
    """Group results by base task, then by method; the MDP and the bandit env of a task are together."""
    found: dict[str, dict[str, Rows]] = {}
    for (task, algorithm), mine in by_method(rows).items():
        found.setdefault(base_task(task)[0], {})[method_name(task, algorithm)] = mine
    return found


def measure_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return what a task's methods are compared by: gold, or the proxy where there is no judge."""
    return "proxy" if all(math.isnan(number(row["gold"])) for row in rows) else "gold"


def _paired(ours: Rows, theirs: Rows, measure: str) -> tuple[NDArray[np.float64], list[int]]:
    """How much higher ``ours`` scores, ``(S, P)``, paired by prompts and by the task's models and seeds that both have;
    and the models of each."""
    keys = [run_key(row) for row in ours if run_key(row) in set(map(run_key, theirs))]
    if not keys:
        return np.empty((0, 0)), []
    pair = [[next(row for row in rows if run_key(row) == key) for key in keys] for rows in (ours, theirs)]
    a, b = (outcomes(rows, measure) for rows in pair)
    if a.shape != b.shape:
        a, b = (np.array([[number(row[measure])] for row in rows]) for rows in pair)
    return a - b, [task_seed for task_seed, _ in keys]


def differences(by_name: dict[str, Rows]) -> list[Difference]:
    """Compare every two methods of a task.

    Their p-values are adjusted together by Holm's weighted procedure: the pairs with SFT, which every reader looks at,
    share one half of the 5 %, all others the other half.
    """
    measure = measure_of([row for rows in by_name.values() for row in rows])
    pairs = list(itertools.combinations(by_name, 2))
    found = [Difference(a, b, measure, nested_mean(*_paired(by_name[a], by_name[b], measure))) for a, b in pairs]
    adjusted = statistics.holm([each.estimate.p for each in found], _shares(pairs))
    return [replace(each, p=p) for each, p in zip(found, adjusted, strict=True)]


def _shares(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """What share of the 5 % each pair of methods may spend."""
    with_sft = sum("sft" in pair for pair in pairs)
    others = len(pairs) - with_sft
    half = 0.5 if with_sft and others else 1.0
    return [half / with_sft if "sft" in pair else half / others for pair in pairs]


def enough_seeds(rows: Sequence[dict[str, Any]], ours: str, theirs: str) -> int | None:
    """Return how many seeds would tell two methods of a task apart if they differed as those in ``rows`` do; None if
    more than a hundred."""
    (by_name,) = methods(rows).values()
    pairs = list(itertools.combinations(by_name, 2))
    share = next(s for pair, s in zip(pairs, _shares(pairs), strict=True) if {ours, theirs} == set(pair))
    paired, models = _paired(by_name[ours], by_name[theirs], measure_of(rows))
    if len(set(models)) > 1:  # more models would do as well
        return None
    by_seed = paired.mean(axis=1)
    return statistics.enough_seeds(by_seed, ALARM * share)


def lead(rows: Sequence[dict[str, Any]], name: str) -> list[Difference]:
    """Compare a method with each other one of its task; ``rows`` are the task's results."""
    (by_name,) = methods(rows).values()
    return [each if each.ours == name else each.reversed() for each in differences(by_name) if name in each.methods]


def scores(rows: Rows) -> NDArray[np.float64]:
    """Return a score per run, 0 for SFT: where the optimum is known that is 1, else the unit is the standard deviation
    of SFT's gold over prompts; NaN where neither is known. Of runs on several models of the task, the mean per model.
    """

    def score(row: dict[str, Any]) -> float:
        if not math.isnan(regret := number(row.get("regret"))):
            return 1 - regret
        spread = number(row.get("sft_gold_sd"))
        return (number(row["gold"]) - number(row.get("sft_gold"))) / spread if spread > 0 else math.nan

    found = np.array([score(row) for row in rows])
    models = np.array([row.get("task_seed", 0) for row in rows])
    versions = list(dict.fromkeys(models.tolist()))
    return found if len(versions) == 1 else np.array([found[models == each].mean() for each in versions])


def prompt_scores(rows: Rows) -> NDArray[np.float64]:
    """Return scores per run and test prompt, ``(S, P)``: by SFT's mean and spread over all prompts; ``(S, 1)`` where a
    run has one score."""
    means = scores(rows)[:, None]
    if knows_optimum(rows) or np.isnan(means).any():
        return means
    origin, unit = (np.array([[number(row[name])] for row in rows]) for name in ("sft_gold", "sft_gold_sd"))
    return (outcomes(rows, "gold") - origin) / unit


def mean_score(rows: Rows) -> Estimate:
    """Estimate the mean score of a method's runs; unknown where a run has none."""
    found = scores(rows)
    return statistics.UNKNOWN if np.isnan(found).any() else statistics.stratified([found], lambda x: x.mean(axis=-1))


def knows_optimum(rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether the scores of these runs are 1 at the optimum."""
    return all(not math.isnan(number(row.get("regret"))) for row in rows)


def facts(rows: Sequence[dict[str, Any]], out: Path, match_kl: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Return the lines of ``aggregate.csv``; see :func:`write_aggregate`."""
    found: list[dict[str, Any]] = []
    tasks = methods(rows)
    for task, by_name in tasks.items():
        for name, mine in by_name.items():
            gaps = [row.get("length_gaps") or [] for row in mine]
            wins = outcomes(mine, "win_rate")
            told = {name: estimate_of(mine, outcomes(mine, name)) for name in PER_PROMPT}
            if all(len(gap) == wins.shape[1] for gap in gaps):
                gap = np.array(gaps, dtype=float)
                told["win_rate_length_controlled"] = statistics.length_controlled(
                    wins, gap, [run_key(row)[0] for row in mine]
                )
            told |= _aggregates({task: mine})
            found += [_line(task, name, "", statistic, estimate, mine) for statistic, estimate in told.items()]
            for each in at_kl(mine, out, match_kl):
                at = {"seeds": each.reached, "prompts": None}
                for measure, estimate in (("gold", each.gold), ("win_rate", each.win_rate)):
                    found.append(_line(task, name, "", f"{measure}_at_kl_{each.kl:g}", estimate, mine) | at)
        for pair in differences(by_name):
            ours, theirs = by_name[pair.ours], by_name[pair.theirs]
            statistic = f"{pair.measure}_difference"
            found.append(_line(task, pair.ours, pair.theirs, statistic, pair.estimate, ours, p=pair.p))
            found += _improvement(task, pair.ours, pair.theirs, {task: (ours, theirs)})
    if len(tasks) > 1:
        common = [name for name in dict.fromkeys(itertools.chain(*tasks.values())) if _everywhere(tasks, name)]
        for name in common:
            by_task = {task: by_name[name] for task, by_name in tasks.items()}
            every = list(itertools.chain(*by_task.values()))
            found += [_line(ALL_TASKS, name, "", key, value, every) for key, value in _aggregates(by_task).items()]
        for a, b in itertools.combinations(common, 2):
            both = {task: (by_name[a], by_name[b]) for task, by_name in tasks.items()}
            found += _improvement(ALL_TASKS, a, b, both)
    return [line for line in found if not math.isnan(line["value"])]


def _everywhere(tasks: dict[str, dict[str, Rows]], name: str) -> bool:
    """Whether a method has a score of the same unit on every task."""
    if not all(name in by_name for by_name in tasks.values()):
        return False
    units = {knows_optimum(by_name[name]) for by_name in tasks.values()}
    return len(units) == 1 and not any(np.isnan(scores(by_name[name])).any() for by_name in tasks.values())


def _aggregates(by_task: dict[str, Rows]) -> dict[str, Estimate]:
    """The aggregates of a method's scores."""
    found = [scores(rows) for rows in by_task.values()]
    if any(np.isnan(each).any() for each in found):
        return {}
    told = {
        "score": statistics.stratified(found, lambda x: x.mean(axis=-1)),
        "score_iqm": statistics.stratified(found, statistics.interquartile_mean),
    }
    if all(knows_optimum(rows) for rows in by_task.values()):
        told["optimality_gap"] = statistics.stratified(found, statistics.optimality_gap)
    return told


def _improvement(task: str, ours: str, theirs: str, by_task: dict[str, tuple[Rows, Rows]]) -> list[dict[str, Any]]:
    """The probability that a run of one method scores above a run of the other, where both have scores."""
    a, b = ([scores(pair[side]) for pair in by_task.values()] for side in (0, 1))
    if any(np.isnan(each).any() for each in (*a, *b)):
        return []
    value, low, high = statistics.probability_of_improvement(a, b)
    rows = [row for mine, _ in by_task.values() for row in mine]
    line = _line(task, ours, theirs, "probability_of_improvement", Estimate(value, layers=("seeds",)), rows)
    return [line | {"low": low, "high": high}]


def _line(
    task: str, method: str, against: str, statistic: str, estimate: Estimate, rows: Rows, p: float = math.nan
) -> dict[str, Any]:
    least, most = (0.0, 1.0) if statistic.startswith(("win_rate", "simulated")) else (-math.inf, math.inf)
    return {
        "task": task,
        "method": method,
        "against": against,
        "statistic": statistic,
        "value": estimate.value,
        "low": max(estimate.low, least),
        "high": min(estimate.high, most),
        "p": p,
        "seeds": len({row["seed"] for row in rows}),
        "prompts": rows[0].get("prompts"),
        "counts": " and ".join(estimate.layers),
    }


def write_aggregate(rows: Sequence[dict[str, Any]], out: Path, match_kl: Sequence[float] = ()) -> None:
    """Write ``aggregate.csv`` into the folder of a comparison: an estimate per line, with the ends of its 95 %
    interval, for differences their adjusted p-value, and under ``counts`` what the interval counts. An unknown number
    is an empty cell.

    Args:
        match_kl: KLs at which methods are also compared, see :mod:`lm_envs.benchmarks.run.matched`.
    """
    lines = [{name: written(value) for name, value in line.items()} for line in facts(rows, out, match_kl)]
    write_lines(out / "aggregate.csv", lines, COLUMNS)
