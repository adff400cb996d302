"""Comparison at the same KL: each run's validation curve, read off where its KL first reaches a value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.benchmarks.measure.statistics import UNKNOWN, Estimate, nested_mean
from lm_envs.benchmarks.run.results import number, run_folder
from lm_envs.benchmarks.run.storage import Records

MEASURES = {"gold": "validation_golds", "win_rate": "validation_wins"}


@dataclass(frozen=True)
class Matched:
    """A method at a KL: gold and win-rate on validation prompts over the runs that got there.

    ``furthest`` is the largest KL of its curves, NaN without any.
    """

    kl: float
    reached: int
    runs: int
    furthest: float
    gold: Estimate = UNKNOWN
    win_rate: Estimate = UNKNOWN


def at_kl(rows: Sequence[Mapping[str, Any]], out: Path, kls: Sequence[float]) -> list[Matched]:
    """Read a method off at each KL, nats per response.

    Between two points of a curve the root of the KL and the outcome of each prompt are interpolated linearly. The
    intervals count prompts and seeds, not the error of the KL itself.

    Args:
        rows: the method's results, one per seed.
        out: the folder of the comparison.
    """
    curves = [_curve(out / run_folder(row)) for row in rows]
    furthest = max((point["validation_kl"] for curve in curves for point in curve), default=math.nan)
    found = []
    for kl in kls:
        read = [_read(curve, kl) for curve in curves]
        held = [each for each in read if each is not None]
        models = [row.get("task_seed", 0) for row, each in zip(rows, read, strict=True) if each is not None]
        estimates = {name: _estimate([each[name] for each in held], models) for name in MEASURES}
        found.append(Matched(kl, len(held), len(rows), furthest, **estimates))
    return found


def _curve(folder: Path) -> list[dict[str, Any]]:
    records = Records(folder / "metrics.jsonl").read()
    return [record for record in records if record.get("validation_kl") is not None]


def _read(curve: Sequence[Mapping[str, Any]], kl: float) -> dict[str, NDArray[np.float64]] | None:
    """Per prompt what a run had when its KL first reached a value; None if it never did."""
    for before, after in itertools.pairwise(curve):
        low, high = before["validation_kl"], after["validation_kl"]
        if low <= kl <= high and low < high:
            below, here, above = (math.sqrt(max(x, 0.0)) for x in (low, kl, high))
            share = (here - below) / (above - below)
            return {name: (1 - share) * _outcomes(before, name) + share * _outcomes(after, name) for name in MEASURES}
    return None


def _outcomes(point: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    """A point's outcomes per prompt, or its mean where the results have no more."""
    values = point.get(MEASURES[name]) or [point.get(f"validation_{name}")]
    return np.array([number(value) for value in values])


def _estimate(read: Sequence[NDArray[np.float64]], models: Sequence[int]) -> Estimate:
    return nested_mean(np.array(read), models) if len({len(values) for values in read}) == 1 else UNKNOWN
