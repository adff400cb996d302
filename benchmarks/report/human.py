"""What people preferred, beside what the judge did: a study of a comparison's test samples in its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.report.series import Series, by_task, gather
from lm_envs.benchmarks.run.results import number, table
from lm_envs.benchmarks.run.storage import write_lines
from lm_envs.feedback import ratings
from lm_envs.feedback.agreement import RESAMPLES, Interval
from lm_envs.feedback.store import Judgment

_FEWEST = 3  # methods of which an order says something


def add_people(out: Path, rows: list[dict[str, Any]], judgments: Sequence[Judgment]) -> Path:
    """Add what people said to the results of a comparison, and write ``people.csv``.

    Each result gets ``human``: per test prompt the mean outcome against SFT by people, 1 where they preferred the
    method's response, 1/2 for a tie; NaN where they did not compare it with SFT's.

    Args:
        out: the comparison's folder.
        rows: its results; they are changed.
        judgments: of a study of its test samples.

    Raises:
        UserError: no response of this comparison was compared with SFT's.
    """
    for mine in by_task(gather(out, rows)).values():
        prompts = max(([record["prompt"] for record in s.test_samples()] for s in mine), key=len)
        places = {prompt: place for place, prompt in reversed(list(enumerate(prompts)))}  # the first of equal ones
        here = [j for j in judgments if isinstance(j.content.prompt, str) and j.content.prompt in places]
        place_of = {judgment.item: places[str(judgment.content.prompt)] for judgment in here}
        for label, found in ratings.outcomes(ratings.battles(here), "sft").items():
            said: list[list[float]] = [[] for _ in prompts]
            for item, result in found:
                said[place_of[item]].append(result)
            for s in mine:
                if s.label == label:
                    for row in s.results:
                        row["human"] = [float(np.mean(values)) if values else np.nan for values in said]
    if not any("human" in row for row in rows):
        raise UserError(f"in this study no method of {out} was compared with sft on a test prompt")
    lines = [
        {"task": line.task, "algorithm": line.algorithm, "win_rate": line.mean["win_rate"]}
        | {"win_rate_se": line.spread["win_rate"], "human_win_rate": line.mean["human"]}
        | {"human_win_rate_se": line.spread["human"]}
        for line in table(rows)
        if not np.isnan(line.mean["human"])
    ]
    write_lines(path := out / "people.csv", lines, list(lines[0]))
    return path


def correlation(series: Sequence[Series], *, seed: int = 0) -> Interval | None:
    """Spearman's rank correlation of simulated and human win-rates over the methods of a task, with an interval; None
    with fewer than three methods.

    Prompts are resampled, each with what both sides said of it. Noise shrinks a rank correlation, in the estimate and
    once more in a resample, so that the 95 % of the resamples alone would hardly ever reach the true correlation of
    methods near each other. The interval is what covers them and their reflection at the estimate.
    """
    known = [s.results for s in series if (said := s.results[0].get("human")) and _measured(s.results, len(said))]
    if len(known) < _FEWEST:
        return None
    human = np.array([results[0]["human"] for results in known])
    judge = np.array([np.mean([[number(w) for w in row["wins"]] for row in results], axis=0) for results in known])
    draws = np.random.default_rng(seed)

    found = []
    for _ in range(RESAMPLES):
        chosen = draws.integers(human.shape[1], size=human.shape[1])
        with np.errstate(invalid="ignore"):  # a method without a prompt
            rate = np.nansum(human[:, chosen], axis=1) / (~np.isnan(human[:, chosen])).sum(axis=1)
        found.append(spearman(rate, judge[:, chosen].mean(axis=1)))
    value = spearman(np.nanmean(human, axis=1), judge.mean(axis=1))
    low, high = np.nanquantile(found, (0.025, 0.975))
    low, high = max(-1.0, min(low, 2 * value - high)), min(1.0, max(high, 2 * value - low))
    return Interval(value, float(low), float(high), len(known))


def _measured(results: Sequence[dict[str, Any]], prompts: int) -> bool:
    return all(len(row.get("wins", ())) == prompts for row in results)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Correlation of ranks (Spearman 1904), ties sharing their mean rank; NaN where one side is all ties."""
    ranks = [(np.searchsorted(np.sort(x), x, "left") + np.searchsorted(np.sort(x), x, "right")) / 2 for x in (a, b)]
    a, b = (rank - rank.mean() for rank in ranks)
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else float("nan")
