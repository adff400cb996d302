"""The figures of a report: win-rates, the reward-KL frontier and learning curves. Labels stand beside the curves, and
an algorithm has one color throughout."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from lm_envs.benchmarks.measure.statistics import performance_profile
from lm_envs.benchmarks.report.human import correlation
from lm_envs.benchmarks.report.series import Series, by_task, styles
from lm_envs.benchmarks.run.aggregate import knows_optimum, prompt_scores
from lm_envs.benchmarks.run.results import number, run_key, table

STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "text.parse_math": False,  # names may hold dollars
    "svg.hashsalt": "lm-envs",  # the same figure gives the same file
}
Style = dict[str, tuple[str, str]]
Segment = NDArray[np.float64]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def win_rates(series: Sequence[Series], style: Style) -> Figure | None:
    """Draw a dot per method with its 95 % interval; None without a judge."""
    lines = [(s, table(s.results)[0]) for s in series if not np.isnan(s.mean("win_rate"))]
    if not lines:
        return None
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(lines)), layout="constrained")
    ax = figure.subplots()
    for place, (s, line) in enumerate(reversed(lines)):
        color, marker = style[s.algorithm]
        rate, estimate = 100 * line.mean["win_rate"], line.estimates["win_rate"]
        ends = rate - 100 * max(estimate.low, 0), 100 * min(estimate.high, 1) - rate
        ax.errorbar(rate, place, xerr=np.reshape(ends, (2, 1)), color=color, capsize=4, linewidth=2)
        ax.plot(rate, place, marker, color=color, markersize=9, markerfacecolor="white" if s.bandit else color)
        ax.annotate(f"{rate:.0f} %", (rate, place), (0, 9), textcoords="offset points", ha="center", fontsize=10)
    ax.axvline(50, color="#888888", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(lines)), [s.label for s, _ in reversed(lines)])
    ax.set_ylim(-0.6, len(lines) - 0.2)
    lows = [np.nanmin([line.mean["win_rate"], line.estimates["win_rate"].low]) for _, line in lines]
    ax.set_xlim(max(min(40, *(100 * low - 4 for low in lows)), -1), 101)
    ax.set_xlabel("% of test prompts won against SFT (bars: 95 % intervals)")
    ax.grid(visible=False, axis="y")
    return figure


def people(series: Sequence[Series], style: Style) -> Figure | None:
    """Win-rates by people against those by the judge, with two standard errors; None where people judged nothing."""
    lines = [(s, table(s.results)[0]) for s in series if s.results[0].get("human")]
    if not lines:
        return None
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    ax = figure.subplots()
    points = []
    for s, line in lines:
        color, marker = style[s.algorithm]
        at = (100 * line.mean["win_rate"], 100 * line.mean["human"])
        errors = (200 * line.spread["human"], 200 * line.spread["win_rate"])
        ax.errorbar(*at, *errors, color=color, linewidth=1.2, alpha=0.6)
        ax.plot(*at, marker, color=color, markersize=9, markerfacecolor="white" if s.bandit else color)
        points.append(Label(at, s.label, color, False))
    ends = (min(*ax.get_xlim(), *ax.get_ylim()), max(*ax.get_xlim(), *ax.get_ylim()))
    ax.axline((50, 50), slope=1, color="#888888", linestyle="--", linewidth=1)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set_xlabel("% won against SFT by the judge (bars: ±2 standard errors)")
    ax.set_ylabel("% won against SFT by people")
    if (order := correlation(series)) is not None:
        ax.set_title(f"Rank correlation {order} of {order.count} methods")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _label(figure, ax, points)
    return figure


def frontier(series: Sequence[Series], style: Style) -> Figure:
    """Draw gold and proxy against KL: the path of training on validation prompts, and the result on test prompts."""
    names = [n for n in ("gold", "proxy") if not all(np.isnan(s.mean(n)) for s in series)]
    height = 4.8 + 0.18 * max(0, len(series) - 10)  # many names need room
    figure = Figure(figsize=(5.6 * len(names), height), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(names), sharex=True))
    labels: list[list[Label]] = []
    for ax, name in zip(panels, names, strict=True):
        points = []
        for s in series:
            color, marker = style[s.algorithm]
            paths = [(kl, value) for (_, kl), (_, value) in zip(s.curve("kl"), s.curve(name), strict=True)]
            if paths:
                kl, value = _mean_of(paths)
                ax.plot(kl, value, s.dash, color=color, alpha=0.6, linewidth=1.4)
            for result in s.results:
                ax.plot(number(result["kl"]), number(result[name]), marker, color=color, alpha=0.5, markersize=4)
            at, bound = (s.mean("kl"), s.mean(name)), bool(s.results[0].get("kl_is_bound"))
            ax.plot(*at, marker, color=color, markersize=10, markerfacecolor="white" if s.bandit else color, zorder=5)
            if bound:
                arrow = {"arrowstyle": "<-", "color": color, "linewidth": 1.6}
                ax.annotate("", at, (-24, 0), textcoords="offset points", arrowprops=arrow)
            points.append(Label(at, s.label, color, bound))
        points += _draw_optimum(ax, series)
        ax.set_title({"gold": "Gold (the judge)", "proxy": "Proxy (the reward that trains)"}[name])
        # Scores rise like the square root of KL (Gao et al. 2022, arXiv:2210.10760), so that is the scale.
        ax.set_xscale("function", functions=(root, _square))
        largest = max(line.get_xdata(orig=False).max() for line in ax.lines)
        least = min(line.get_xdata(orig=False).min() for line in ax.lines)
        ax.set_xticks([*(-x for x in _ticks(-least) if x > 0), *_ticks(largest)])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("KL from SFT, nats per sequence (square-root scale)")
        ax.set_ylabel("mean score")
        ax.margins(x=0.14, y=0.14)
        labels.append(points)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places are found for the axes as they stand now
    for ax, points in zip(panels, labels, strict=True):
        _label(figure, ax, points)
    return figure


def _draw_optimum(ax: Axes, series: Sequence[Series]) -> list[Label]:
    """Draw the exact frontier of a task that has one, as far as the methods go, and return its label."""
    known = next((s.results[0]["frontier"] for s in series if s.results[0].get("frontier")), None)
    if known is None:
        return []
    kl, reward = np.array(known["kl"]), np.array(known["reward"])
    shown = kl <= 1.15 * max(np.max(np.asarray(line.get_xdata(orig=False))) for line in ax.lines)
    ax.plot(kl[shown], reward[shown], color="#222222", linewidth=1.4, zorder=1)
    return [Label((kl[shown][-1], reward[shown][-1]), "most possible", "#222222", arrow=False)]


def learning_curves(series: Sequence[Series], style: Style) -> Figure | None:
    """Draw gold, proxy and KL on validation prompts against training tokens; None if nothing was validated."""
    trained = [s for s in series if s.curve("proxy") or s.curve("return")]
    names = [n for n in ("gold", "proxy", "kl", "return") if any(s.curve(n) for s in trained)]
    if not names:
        return None
    titles = {"gold": "Gold", "proxy": "Proxy", "kl": "KL from SFT, nats", "return": "Return"}
    x_name, x_label = _progress(trained)
    figure = Figure(figsize=(4.7 * len(names), max(4.2, 0.26 * len(series))), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        ends = []
        for s in series:
            color, curves = style[s.algorithm][0], s.curve(name, x_name)
            if curves:
                x, y = _mean_of(curves)
                ax.plot(x / 1000, y, s.dash, color=color, linewidth=2.2)
                ends.append((float(y[-1]), s.label, color))
                if len(curves) > 1:
                    heights = [curve[1][: len(x)] for curve in curves]
                    low, high = np.min(heights, axis=0), np.max(heights, axis=0)
                    ax.fill_between(x / 1000, low, high, color=color, alpha=0.15, linewidth=0)
            elif s not in trained and name in ("gold", "proxy") and not np.isnan(s.mean(name)):
                ax.axhline(s.mean(name), color=color, linestyle=":", linewidth=1.6)
                ends.append((s.mean(name), s.label, color))
        ax.set_title(titles[name])
        ax.set_xlabel(x_label)
        _label_ends(ax, ends, figure.get_size_inches()[1])
    return figure


def profiles(series: Sequence[Series], style: Style) -> Figure | None:
    """Draw the share of runs and prompts whose score is above each value; None where no method has a score."""
    scored = [(s, prompt_scores(list(s.results))) for s in series]
    scored = [(s, found) for s, found in scored if not np.isnan(found).any()]
    if not scored:
        return None
    every = np.concatenate([found.ravel() for _, found in scored])
    low, high = np.quantile(every, (0.005, 0.995))
    thresholds = np.linspace(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3, 161)
    figure = Figure(figsize=(8, max(4.4, 0.3 * len(scored))), layout="constrained")
    ax = figure.subplots()
    for s, found in scored:
        color = style[s.algorithm][0]
        models = [run_key(row)[0] for row in s.results] if len(found) > 1 else None
        share, least, most = performance_profile(found, thresholds, models)
        ax.plot(thresholds, 100 * share, s.dash, color=color, linewidth=2, label=s.label)
        ax.fill_between(thresholds, 100 * least, 100 * most, color=color, alpha=0.13, linewidth=0)
    exact = all(knows_optimum(s.results) for s, _ in scored)
    unit = "1 is the optimum" if exact else "1 is the standard deviation of SFT's gold over prompts"
    ax.set_xlabel(f"score τ (0 is SFT's mean, {unit})")
    ax.set_ylabel("% of runs above τ" if exact else "% of runs and prompts above τ")
    ax.set(ylim=(-2, 102), xlim=(thresholds[0], thresholds[-1]))
    figure.legend(loc="outside right center", frameon=False, fontsize=9.5)
    return figure


def _mean_of(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, as far as all of them go."""
    least = min(len(x) for x, _ in curves)
    x, y = np.mean([(x[:least], y[:least]) for x, y in curves], axis=0)
    return x, y


def _progress(trained: Sequence[Series]) -> tuple[str, str]:
    """The x-axis of learning curves: sampled tokens, or trained tokens where a method samples none."""
    ends = [x[-1] for s in trained for name in ("proxy", "return") for x, _ in s.curve(name)]
    known = all(s.curve(name, "trained_tokens") for s in trained for name in ("proxy", "return") if s.curve(name))
    if known and not all(ends):
        return "trained_tokens", "trained tokens, thousands"
    return "tokens", "tokens sampled in training, thousands"


_TICKS = (0, 0.2, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Label(NamedTuple):
    """A name and its point; ``arrow`` says that one lies to the left of the point."""

    at: tuple[float, float]
    text: str
    color: str
    arrow: bool


def _ticks(largest: float) -> list[float]:
    """Return round numbers up to about ``largest``, none too near the next on a square-root scale."""
    kept: list[float] = []
    for x in _TICKS:
        if x <= 1.3 * largest and (not kept or np.sqrt(x) - np.sqrt(kept[-1]) > 0.07 * np.sqrt(largest)):
            kept.append(x)
    return kept


def root(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the square root with the sign of x: a KL that is estimated from samples may be negative."""
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(x) * np.square(x)


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], height: float) -> None:
    """Write names to the right of axes in a figure of this height, at the height of their curves' ends, moved apart if
    they would overlap, in the order of the ends, so that no two lines to them cross."""
    order = sorted(ends)
    low, high = ax.get_ylim()
    places = _spread(np.array([y for y, _, _ in order]), 0.26 / height * (high - low), low, high)
    shown: dict[str, Any] = {"fontsize": 9.5, "va": "center", "annotation_clip": False}
    shown |= dict.fromkeys(("xycoords", "textcoords"), ax.get_yaxis_transform())
    for (y, label, color), place in zip(order, places, strict=True):
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        ax.annotate(label, (1.0, y), (1.05, place), color=color, arrowprops=line, **shown)


def _spread(places: NDArray[np.float64], gap: float, low: float, high: float) -> NDArray[np.float64]:
    """Return the nearest places, by least squares, that are ``gap`` apart, in their order; around the middle of the
    range if it is too short for them."""
    from scipy.optimize import isotonic_regression

    if not len(places):
        return places
    steps = gap * np.arange(len(places))
    apart = isotonic_regression(places - steps).x + steps
    room = high - low - steps[-1]
    if room < 0:
        return low + room / 2 + steps
    # Where one end leaves the range, the rest makes room.
    return np.clip(apart, low + steps, high - steps[::-1])


_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
_SIDES = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}


def _label(figure: Figure, ax: Axes, points: Sequence[Label]) -> None:
    """Write names beside points, each at the place around its point where it covers least of the rest."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # text has no size before something can draw it
    pixels = ax.transData.transform([point.at for point in points])
    taken = [
        Bbox.from_bounds(x - (36 if point.arrow else 9), y - 9, 45 if point.arrow else 18, 18)
        for (x, y), point in zip(pixels, points, strict=True)
    ]
    strokes = [_along(ax.transData.transform(line.get_xydata())) for line in ax.lines]
    leaders: list[Segment] = []
    frame, font = ax.get_window_extent(renderer), FontProperties(size=9.5)
    for point, own, here in zip(points, list(taken), pixels, strict=True):
        size = np.array(renderer.get_text_width_height_descent(point.text, font, False)[:2])

        def box_at(distance: float, way: tuple[float, float], here: Any = here, size: Any = size) -> Bbox:
            corner = here + renderer.points_to_pixels(distance) * np.array(way) - size * (1 - np.sign(way)) / 2
            return Bbox.from_bounds(*corner, *size).padded(3)

        def cost(place: tuple[float, tuple[float, float]], here: Any = here, own: Bbox = own) -> float:
            box = box_at(*place)
            segment = np.array([here, np.clip(here, box.min, box.max)])
            leader = _along(segment)
            covered = sum(_within(leader, other) for other in taken if other is not own)
            covered += 100 * sum(_cross(segment, other) for other in leaders)
            outside = box.width * box.height - _overlap(box, frame)
            overlap = sum(_overlap(box, other) for other in taken)
            crossed = sum(_within(stroke, box) for stroke in strokes)
            return 5 * overlap + 10 * outside + 8 * crossed + 15 * covered + 3 * place[0]

        distance, way = min(itertools.product((10, 20, 34, 50, 70, 95), _AROUND), key=cost)
        taken.append(box := box_at(distance, way))
        if distance > 10:
            leaders.append(np.array([here, np.clip(here, box.min, box.max)]))
            strokes.append(_along(leaders[-1]))
        shown: dict[str, Any] = {"color": point.color, "fontsize": 9.5, "zorder": 6}
        shown |= {"ha": _SIDES[int(np.sign(way[0]))][0], "va": _SIDES[int(np.sign(way[1]))][1]}
        shown["path_effects"] = [withStroke(linewidth=2.5, foreground="white")]
        if distance > 10:
            shown["arrowprops"] = {"arrowstyle": "-", "color": point.color, "linewidth": 0.6}
        at = way[0] * distance, way[1] * distance
        ax.annotate(point.text, point.at, at, textcoords="offset points", **shown)


def _along(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points along a polyline of pixels, a few pixels apart."""
    if len(path) < 2:
        return path
    steps = np.linspace(0, 1, 25)[:, None]
    return np.concatenate([a + steps * (b - a) for a, b in itertools.pairwise(path)])


def _cross(a: Segment, b: Segment) -> bool:
    """Whether two segments of pixels, ``(2, 2)``, have a point inside both in common."""

    def side(of: Segment, point: NDArray[np.float64]) -> float:
        along, to = of[1] - of[0], point - of[0]
        return float(along[0] * to[1] - along[1] * to[0])

    return side(a, b[0]) * side(a, b[1]) < 0 and side(b, a[0]) * side(b, a[1]) < 0


def _within(points: NDArray[np.float64], box: Bbox) -> int:
    """Count the points, ``(N, 2)``, in a box."""
    return int(((points > box.min) & (points < box.max)).all(axis=1).sum())


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height


def figures(series: list[Series]) -> dict[tuple[str, str], Figure]:
    """Draw all figures, by (task, kind); the MDP and the bandit env of a task share theirs."""
    style = styles(series)
    found: dict[tuple[str, str], Figure] = {}
    with matplotlib.rc_context(STYLE):
        for task, mine in by_task(series).items():
            made = {"win-rate": win_rates(mine, style), "learning-curves": learning_curves(mine, style)}
            made["profile"] = profiles(mine, style)
            made["people"] = people(mine, style)
            made["frontier"] = None if all(np.isnan(s.mean("kl")) for s in mine) else frontier(mine, style)
            found |= {(task, kind): figure for kind, figure in made.items() if figure is not None}
    return found


def as_file(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """Return a figure as PNG, or as SVG with its letters as outlines, so that it looks the same everywhere."""
    file, options = io.BytesIO(), {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format=kind, **options)
    return file.getvalue()
