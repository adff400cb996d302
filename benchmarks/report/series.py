"""The results of a folder of runs, gathered for plots and reports."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import base_task, best_of, method_name
from lm_envs.benchmarks.run.results import COLUMNS, by_method, number, run_folder
from lm_envs.benchmarks.run.storage import Records, read_json

# Okabe and Ito's colors, which people with any kind of color vision can tell apart; yellow is left out, it vanishes
# on white.
_STYLES = {
    "sft": ("#5b5b5b", "X"),
    "best-of-n": ("#E69F00", "D"),
    "expert-iteration": ("#009E73", "s"),
    "reinforce": ("#0072B2", "^"),
    "a2c": ("#CC79A7", "v"),
    "ppo": ("#D55E00", "o"),
}
_SPARE = ("#56B4E9", "#7F3C8D", "#8C6D31", "#1B4F4A", "#B2182B", "#5AB4AC")
_MORE = tuple((_SPARE[i % 6], "Ph<>"[(i + i // 6) % 4]) for i in range(24))


@dataclass(eq=False)
class Series:
    """All seeds of one algorithm on one env of a task: a result per seed, as in ``result.json``."""

    task: str
    algorithm: str
    results: tuple[dict[str, Any], ...]
    out: Path

    def __post_init__(self) -> None:
        self.base, env = base_task(self.task)
        self.bandit = env == "bandit"
        self.label, self.dash = method_name(self.task, self.algorithm), "--" if self.bandit else "-"
        self.folders = [self.out / run_folder(result) for result in self.results]

    def mean(self, column: str) -> float:
        return float(np.mean([number(result[column]) for result in self.results]))

    @property
    def collapsed(self) -> bool:
        """Whether a run of it did."""
        return any(result.get("collapsed") for result in self.results)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folders[0] / "config.json")

    def curve(self, name: str, x: str = "tokens") -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Return the learning curve of each seed: ``x`` and ``validation_<name>``, where both are known."""
        found = []
        for folder in self.folders:
            records = Records(folder / "metrics.jsonl").read()
            key = f"validation_{name}"
            points = [(r[x], r[key]) for r in records if r.get(key) is not None and r.get(x) is not None]
            if points:
                xs, ys = np.array(points, dtype=float).T
                found.append((xs, ys))
        return found

    def test_samples(self) -> list[dict[str, Any]]:
        """Return the first seed's answers to the test prompts."""
        records = Records(self.folders[0] / "samples.jsonl").read()
        return [record for record in records if record["split"] == "test"]


def gather(out: Path, rows: list[dict[str, Any]]) -> list[Series]:
    """Return the series of a comparison, in the order of its rows.

    Raises:
        UserError: there is no finished run.
    """
    if not rows:
        raise UserError(
            f"{out} holds no finished run: nothing to report (a comparison that was stopped goes on with --resume)"
        )
    if missing := [name for row in rows for name in COLUMNS if name not in row]:
        raise UserError(f"a result in {out} lacks {missing[0]!r}: it is of another version; run it again")
    return [Series(task, algorithm, tuple(found), out) for (task, algorithm), found in by_method(rows).items()]


def by_task(series: list[Series]) -> dict[str, list[Series]]:
    """Group series by task; the MDP and the bandit env of a task are together."""
    return {task: [s for s in series if s.base == task] for task in dict.fromkeys(s.base for s in series)}


def styles(series: list[Series]) -> dict[str, tuple[str, str]]:
    """Return color and marker by algorithm, the same in every figure of a report."""
    found: dict[str, tuple[str, str]] = {}
    spare = itertools.cycle(_MORE)
    for algorithm in dict.fromkeys(s.algorithm for s in series):
        kind = "best-of-n" if best_of(algorithm) is not None else algorithm
        known = kind in _STYLES and _STYLES[kind] not in found.values()
        found[algorithm] = _STYLES[kind] if known else next(spare)
    return found
