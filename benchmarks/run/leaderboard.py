"""``leaderboard.json``: the results of a suite by task and method, in a form that a page of many suites can show.

The documentation shows those in ``benchmarks/results/leaderboard``; ``lm-envs report`` writes the file of a folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_envs.benchmarks.measure.statistics import Estimate
from lm_envs.benchmarks.run.aggregate import lead, mean_score, measure_of, methods
from lm_envs.benchmarks.run.results import estimate_of, number, outcomes
from lm_envs.benchmarks.run.storage import write_json

_MEANS = ("proxy", "kl", "length", "distinct_2", "tokens_generated", "reward_calls", "wall_s")


def write_leaderboard(rows: Sequence[dict[str, Any]], out: Path, held: Mapping[str, Any], versions: Any) -> None:
    """Write ``leaderboard.json`` into the folder of a comparison.

    Args:
        held: the content of ``comparison.json``.
        versions: of the packages that the runs were made with.
    """
    tasks = [
        {"task": task, "prompts": next(iter(by_name.values()))[0].get("prompts"), "methods": _methods(by_name)}
        for task, by_name in methods(rows).items()
    ]
    about = {"suite": held.get("name", "comparison"), "description": held.get("description", "")}
    write_json(out / "leaderboard.json", about | {"versions": versions, "tasks": tasks})


def _methods(by_name: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The methods of a task, the best first, those of which a run collapsed last."""
    every = [row for rows in by_name.values() for row in rows]
    measure = measure_of(every)
    means = {name: _mean(rows, measure) for name, rows in by_name.items()}
    fallen = {name: sum(bool(row.get("collapsed")) for row in rows) for name, rows in by_name.items()}
    last = {name for name in by_name if fallen[name] or math.isnan(means[name])}
    order = sorted(by_name, key=lambda name: -math.inf if name in last else means[name], reverse=True)
    worse = {each.theirs for each in lead(every, order[0]) if each.clear}
    return [
        {
            "method": name,
            "seeds": sorted(row["seed"] for row in by_name[name]),
            "not_told_from_the_best": name not in worse and not fallen[name],
            measure: _interval(estimate_of(by_name[name], outcomes(by_name[name], measure))),
            "win_rate": _interval(estimate_of(by_name[name], outcomes(by_name[name], "win_rate")), 0.0, 1.0),
            "score": _interval(mean_score(by_name[name])),
        }
        | {column: _mean(by_name[name], column) for column in _MEANS}
        | ({"collapsed": fallen[name]} if fallen[name] else {})
        for name in order
    ]


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    return sum(number(row.get(column)) for row in rows) / len(rows)


def _interval(estimate: Estimate, least: float = -math.inf, most: float = math.inf) -> list[float]:
    """A value and the ends of its 95 % interval."""
    return [estimate.value, max(estimate.low, least), min(estimate.high, most)]
