"""The report of probes: a table with intervals, radar plots, curves along each sweep, and where a method fails."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lm_envs.benchmarks.measure.statistics import UNKNOWN, Estimate, crossed_mean
from lm_envs.benchmarks.probes.base import BATCH, EPISODES, Probe
from lm_envs.benchmarks.probes.registry import load
from lm_envs.benchmarks.report.html import listed
from lm_envs.benchmarks.report.plots import STYLE, as_file
from lm_envs.benchmarks.run.storage import write_lines
from lm_envs.files import write_atomic

FAILS, GOOD = 0.5, 0.9
SUMMARY = ("algorithm", "probe", "score", "low", "high", "seeds")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^vDP"


class Scores:
    """The scores of a sweep, as arrays.

    Attributes:
        probes, algorithms: in the order of tables; without algorithms that no probe suits.
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self._by: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
        for record in records:
            if record["score"] is not None:
                cell = self._by.setdefault((record["probe"], record["algorithm"]), {})
                cell.setdefault(record["value"], {})[record["seed"]] = record["score"]
        known = {name for name, _ in self._by}
        self.probes = {n: load(n) for n in dict.fromkeys(record["probe"] for record in records) if n in known}
        self.algorithms = [n for n in dict.fromkeys(r["algorithm"] for r in records) if n in {a for _, a in self._by}]

    def cell(self, probe: str, algorithm: str) -> NDArray[np.float64]:
        """Return ``(S, N)`` scores of the seeds that have all values of the sweep; ``(0, N)`` if there are none."""
        cell, values = self._by.get((probe, algorithm), {}), self.probes[probe].values
        columns = [cell.get(float(value), {}) for value in values]
        seeds = sorted(set.intersection(*(set(column) for column in columns)))
        return np.array([[column[seed] for column in columns] for seed in seeds]).reshape(len(seeds), len(values))

    def estimate(self, probe: str, algorithm: str) -> Estimate:
        """Return the mean over the sweep, with an error that counts seeds."""
        scores = self.cell(probe, algorithm)
        return crossed_mean(scores.mean(axis=1, keepdims=True)) if len(scores) else UNKNOWN

    @cached_property
    def hopeless(self) -> dict[str, list[float]]:
        """The values of each probe at which no method here reaches :data:`FAILS`."""
        found: dict[str, list[float]] = {}
        for name, probe in self.probes.items():
            means = [cell.mean(axis=0) for a in self.algorithms if len(cell := self.cell(name, a))]
            best = np.max(means, axis=0) if means else np.ones(len(probe.values))
            found[name] = [v for v, score in zip(probe.values, best, strict=True) if score < FAILS]
        return found


def write_summary(scores: Scores, out: Path) -> None:
    """Write ``summary.csv``: a line for each method and probe, its score the mean over the sweep."""
    lines = []
    for algorithm in scores.algorithms:
        for name in scores.probes:
            found, count = scores.estimate(name, algorithm), len(scores.cell(name, algorithm))
            if count:
                ends = [] if math.isnan(found.error) else [("low", max(found.low, 0.0)), ("high", min(found.high, 1.0))]
                line = {"algorithm": algorithm, "probe": name, "score": found.value, "seeds": count}
                lines.append({**line, **dict(ends)})
    write_lines(out / "summary.csv", lines, SUMMARY)


def words(scores: Scores, algorithm: str) -> str:
    """Say where a method stands: near the optimum throughout a sweep, or below :data:`FAILS` at some values.

    Values at which no method of the table does better are not held against it.
    """
    good, bad = [], []
    for name, probe in scores.probes.items():
        cell = scores.cell(name, algorithm)
        if not len(cell):
            continue
        mean = cell.mean(axis=0)
        if mean.min() >= GOOD:
            good.append(name)
        values = [v for v, score in zip(probe.values, mean, strict=True) if score < FAILS]
        if fails := [value for value in values if value not in scores.hopeless[name]]:
            bad.append(f"{name} {_places(probe, fails)}")
    text = f"within a tenth of the optimum throughout {listed(good)}" if good else ""
    said = f"fails in {listed(bad)}" if bad else "fails nowhere that another method here does not"
    return f"{algorithm}: {'; '.join(filter(None, (said, text)))}."


def _places(probe: Probe, values: Sequence[float]) -> str:
    """Say at which values of a sweep: all of it, an end of it, or a list."""
    every, count = list(probe.values), len(values)
    if count == len(every):
        return "throughout"
    if count > 1 and every[-count:] == list(values):
        return f"from {values[0]:g} on"
    if count > 1 and every[:count] == list(values):
        return f"up to {values[-1]:g}"
    return f"at {listed([f'{value:g}' for value in values])}"


def beyond(scores: Scores) -> str:
    """Say where no method of the table does better than :data:`FAILS`; "" if there is no such place."""
    found = [f"{name} {_places(scores.probes[name], values)}" for name, values in scores.hopeless.items() if values]
    return f"No method here reaches {FAILS:g} in {listed(found)}." if found else ""


def text_cell(found: Estimate) -> tuple[str, str]:
    """Return a cell of the table: the score, and half the width of its 95 % interval, "" where one is not known."""
    score = "" if math.isnan(found.value) else f"{found.value:.2f}"
    half = (found.high - found.low) / 2
    return score, "" if math.isnan(found.error) else f"±{half:.2f}" if half >= 0.005 else "±<0.01"


def as_markdown(scores: Scores) -> str:
    """Return the table of scores, a line for each probe and six methods at a time, and where methods fail: the text of
    ``scores.md``, for a page of one's own."""
    size, parts = len(_COLORS), []
    for chunk in (scores.algorithms[i : i + size] for i in range(0, len(scores.algorithms), size)):
        parts += [f"| probe | {' | '.join(chunk)} |", "|---" + "|---:" * len(chunk) + "|"]
        for name in scores.probes:
            cells = (" ".join(text_cell(scores.estimate(name, algorithm))) for algorithm in chunk)
            parts.append(f"| {name} | {' | '.join(cell.strip() for cell in cells)} |")
        parts.append("")
    said = [*(words(scores, algorithm) for algorithm in scores.algorithms), *filter(None, [beyond(scores)])]
    return "\n".join([*parts, *(f"- {line}" for line in said), ""])


def _short(algorithm: str) -> str:
    """The name of an algorithm without the folders of its file."""
    return algorithm.rpartition("/")[2]


def radar(scores: Scores) -> Figure:
    """Draw a radar plot for each method: a spoke for each probe, the score from the center out."""
    names, count = list(scores.probes), len(scores.algorithms)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.7 * columns, 3.6 * rows), layout="constrained")
    angles = 2 * np.pi * np.arange(len(names)) / len(names)
    for place, algorithm in enumerate(scores.algorithms):
        ax: Any = figure.add_subplot(rows, columns, place + 1, projection="polar")
        ax.set_theta_zero_location("N")
        ax.set_theta_direction(-1)
        mean = np.array([scores.estimate(name, algorithm).value for name in names])
        known = ~np.isnan(mean)
        around, radius = (np.append(x[known], x[known][:1]) for x in (angles, mean))
        ax.fill(around, radius, color=_COLORS[0], alpha=0.2)
        ax.plot(around, radius, color=_COLORS[0], linewidth=1.6)
        ax.plot(angles[known], mean[known], "o", color=_COLORS[0], markersize=3)
        ax.set_ylim(0, 1)
        ax.set_yticks([0.25, 0.5, 0.75, 1], ["", "0.5", "", "1"], fontsize=7, color="#777777")
        ax.set_xticks(angles, names, fontsize=7.5)
        for angle, label, has in zip(angles, ax.get_xticklabels(), known, strict=True):
            label.set_horizontalalignment(
                "center" if abs(np.sin(angle)) < 0.1 else "left" if angle < np.pi else "right"
            )
            label.set_color("black" if has else "#bbbbbb")
        ax.tick_params(axis="x", pad=-2)
        ax.set_title(_short(algorithm), fontsize=11, loc="center", pad=12)
    return figure


def curves(scores: Scores, algorithms: Sequence[str]) -> Figure:
    """Draw the score along each sweep, a panel a probe: the mean over seeds, and their range as a band."""
    columns = min(4, len(scores.probes))
    rows = math.ceil(len(scores.probes) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.75 * rows + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for ax, (name, probe) in zip(panels, scores.probes.items(), strict=False):
        _curve(ax, scores, name, algorithms)
        ax.set_title(name)
        ax.set_xticks(range(len(probe.values)), [f"{value:g}" for value in probe.values], fontsize=8.5)
        ax.set_xlabel(probe.axis, fontsize=8.5)
        ax.set_ylim(-0.04, 1.04)
        ax.tick_params(axis="y", labelsize=8.5)
    for ax in panels[::columns]:
        ax.set_ylabel("score", fontsize=8.5)
    for ax in panels[len(scores.probes) :]:
        ax.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(algorithms), frameon=False, fontsize=9.5)
    return figure


def _curve(ax: Axes, scores: Scores, name: str, algorithms: Sequence[str]) -> None:
    for number, algorithm in enumerate(algorithms):
        cell = scores.cell(name, algorithm)
        # Side by side, because methods that do equally well would hide one another.
        x = np.arange(cell.shape[1]) + 0.07 * (number - (len(algorithms) - 1) / 2)
        style: dict[str, Any] = {"color": _COLORS[number], "marker": _MARKERS[number]}
        mean = cell.mean(axis=0) if len(cell) else np.full(cell.shape[1], np.nan)
        ax.plot(x, mean, markersize=4, linewidth=1.5, label=_short(algorithm), **style)
        if len(cell) > 1:
            ax.fill_between(x, cell.min(axis=0), cell.max(axis=0), color=_COLORS[number], alpha=0.12, linewidth=0)


def figures(scores: Scores) -> dict[str, Figure]:
    """Draw all figures by the name of their file: curves for six methods at a time, spokes from three probes on."""
    size = len(_COLORS)
    chunks = [scores.algorithms[i : i + size] for i in range(0, len(scores.algorithms), size)]
    with matplotlib.rc_context(STYLE):
        drawn = {f"curves-{i}" if len(chunks) > 1 else "curves": curves(scores, c) for i, c in enumerate(chunks, 1)}
        return {"radar": radar(scores), **drawn} if len(scores.probes) > 2 else drawn


def write_report(records: Sequence[dict[str, Any]], out: Path) -> Scores:
    """Write ``summary.csv``, ``scores.md``, ``report.html`` and ``plots/*.png`` for the records of a folder."""
    scores = Scores(records)
    write_summary(scores, out)
    write_atomic(out / "scores.md", as_markdown(scores))
    pictures = []
    for name, figure in figures(scores).items():
        write_atomic(out / "plots" / f"{name}.png", as_file(figure, "png"))
        pictures.append((name, base64.b64encode(as_file(figure, "svg")).decode()))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = template.render(
        probes=scores.probes,
        rows=[(a, [text_cell(scores.estimate(name, a)) for name in scores.probes]) for a in scores.algorithms],
        shades=[[_shade(scores.estimate(name, a).value) for name in scores.probes] for a in scores.algorithms],
        said=[*(words(scores, a) for a in scores.algorithms), *filter(None, [beyond(scores)])],
        seeds=len({record["seed"] for record in records}),
        pictures=pictures,
        episodes=EPISODES,
        batch=BATCH,
        fails=FAILS,
        notes=sorted({f"{r['algorithm']} in {r['probe']}: {r['note']}" for r in records if r["note"]}),
    )
    write_atomic(out / "report.html", page)
    return scores


def _shade(score: float) -> str:
    return "" if math.isnan(score) else f"rgba(0, 114, 178, {0.45 * score**2:.2f})"
