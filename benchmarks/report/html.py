"""``report.html``: one file with everything in it, which opens without a network; and the same figures as PNG beside
it."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from lm_envs.benchmarks.report.plots import as_file, figures
from lm_envs.benchmarks.report.series import Series, by_task, gather, styles
from lm_envs.benchmarks.run.aggregate import Difference, differences, enough_seeds, lead, measure_of, methods
from lm_envs.benchmarks.run.leaderboard import write_leaderboard
from lm_envs.benchmarks.run.matched import Matched, at_kl
from lm_envs.benchmarks.run.names import best_of, folder_name, method_name
from lm_envs.benchmarks.run.results import (
    Column,
    Line,
    cell,
    enough_digits,
    footnotes,
    interval,
    number,
    plain,
    shown,
    table,
    title,
)
from lm_envs.benchmarks.run.storage import read_json
from lm_envs.files import write_atomic

_FIGURES = {
    "win-rate": (
        "Win-rate",
        "Each test prompt is answered once by the method and once by SFT; the gold judge decides, ties count half.",
    ),
    "profile": (
        "Performance profile",
        "How many answers of a method, over its runs and the test prompts, score above a value: the further to the "
        "right a curve lies, the better, and where two cross neither is better throughout. Bands: pointwise 95 % "
        "intervals over what the table's intervals count.",
    ),
    "people": (
        "People and judge",
        "Each method against SFT, by people and by the judge. On the dashed line the two agree; the rank correlation's "
        "interval resamples prompts and is widened by the noise in both win-rates.",
    ),
    "frontier": (
        "Reward against KL",
        "How much score a method buys for its distance from SFT. Lines: training, on validation prompts, mean over "
        "seeds. Markers: the end, on test prompts, large for the mean over seeds; an arrow to the left: the KL is at "
        "most this. A KL below 0 is an estimate from few samples. Where proxy still rises and gold falls, the reward "
        "model is being over-optimized.",
    ),
    "learning-curves": (
        "Learning curves",
        "On validation prompts: the mean over seeds, in a band from the lowest seed to the highest; dotted lines are "
        "methods without training. The judge only measures: nothing trains on it.",
    ),
}


_NAMED = 3  # methods in a headline that the best is better than
_MANY = 7  # names in a list of it
_COSTS = (
    *("tokens_generated", "scored_tokens", "reward_calls", "wall_s", "comparisons", "given_tokens", "episodes"),
    "trained_tokens",
)


def write_report(out: Path, rows: list[dict[str, Any]], show: bool = False) -> Path:
    """Write ``report.html``, ``leaderboard.json`` and ``plots/*.png`` for the results ``rows`` of the folder ``out``.

    Args:
        show: samples of sensitive tasks too.

    Raises:
        UserError: there is no finished run.
    """
    series = gather(out, rows)
    made = figures(series)
    for (task, kind), figure in made.items():
        write_atomic(out / "plots" / f"{folder_name(task)}-{kind}.png", as_file(figure, "png"))
    held = read_json(out / "comparison.json") if (out / "comparison.json").exists() else {}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    template.globals["colors"] = {name: color for name, (color, _) in styles(series).items()}
    page = template.render(
        name=held.get("name", "comparison"),
        description=held.get("description", ""),
        sections=[_section(task, mine, made, held.get("match_kl", ()), show) for task, mine in by_task(series).items()],
        versions=_pairs(_versions(series), " "),
        settings=[(f"{folder_name(s.task)}/{s.algorithm}", _settings(s)) for s in series],
    )
    write_leaderboard(rows, out, held, series[0].config.get("versions"))
    write_atomic(path := out / "report.html", page)
    return path


def _versions(series: Sequence[Series]) -> dict[str, str]:
    """The versions that the runs were made with; where they differ, all of them."""
    found: dict[str, dict[str, None]] = {}
    for each in series:
        for name, version in each.config.get("versions", {}).items():
            found.setdefault(name, {})[str(version)] = None
    return {name: " and ".join(versions) for name, versions in found.items()}


def headline(rows: Sequence[dict[str, Any]]) -> str:
    """Return what a reader should take away from a task's results, in two or three sentences."""
    return " ".join(answers(rows))


def answers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say which method of a task is the best and by how much, how sure that is, and which wins are none."""
    lines = table(rows)
    sft = next((line for line in lines if line.algorithm == "sft"), None)
    others = [line for line in lines if line.algorithm != "sft"]
    if not others:
        return []
    fallen = [line for line in others if line.collapsed]
    names = listed(_some([_name(line) for line in fallen]))
    collapse = [f"Collapsed, so not ranked: {names}."] if fallen else []
    others = [line for line in others if not line.collapsed]
    judged = [line for line in others if not math.isnan(line.mean["gold"])]
    if not others:
        return collapse
    if not judged:
        best = max(others, key=lambda line: line.mean["proxy"])
        text = f"{_name(best)} has the highest proxy score, {best.mean['proxy']:.2f}."
        told = [text, _told_apart(rows, _name(best)), "There is no judge to say whether that is real."]
        return [line for line in (*told, *collapse) if line]
    best = max(judged, key=lambda line: line.mean["gold"])
    against = f" against SFT's {sft.mean['gold']:.2f}" if sft else ""
    bound = "at most " if best.kl_is_bound else ""
    gold, wins = (best.estimates[name] for name in ("gold", "win_rate"))
    first = f"{_name(best)} reaches the highest gold score, {best.mean['gold']:.2f}{interval(gold, 2)}{against}"
    if sft and not best.mean["gold"] > sft.mean["gold"]:
        first = (
            f"No method's gold score is above SFT's {sft.mean['gold']:.2f}; {_name(best)} comes nearest, with "
            f"{best.mean['gold']:.2f}{interval(gold, 2)}"
        )
    text = (
        f"{first}, at a KL of {bound}{best.mean['kl']:.1f} nats, and wins {100 * best.mean['win_rate']:.0f} %"
        f"{interval(wins, 0, 100, 100)} of the test prompts against SFT."
    )
    even = [_name(line) for line in judged if not line.estimates["win_rate"].low > 0.5]
    half = f"The win-rate's interval holds 50 % or less: {', '.join(_some(even))}." if even else ""
    return [line for line in (text, _told_apart(rows, _name(best)), half, *collapse) if line]


def _told_apart(rows: Sequence[dict[str, Any]], best: str) -> str:
    """Say which methods of a task the best is better than, with intervals, and which it cannot be told apart from."""
    over = lead(rows, best)
    if not over:
        return ""
    if not any("seeds" in each.estimate.layers for each in over):
        return "One seed of a method cannot tell which method is better."
    worse = sorted((each for each in over if each.clear), key=lambda each: each.estimate.value)
    named = [f"{each.theirs} by {each.estimate.value:.2f}{interval(each.estimate, 2)}" for each in worse[:_NAMED]]
    named += [f"{len(worse) - _NAMED} more"] * (len(worse) > _NAMED)
    same = [each for each in over if not each.clear]
    told = [f"It is better than {listed(named)}."] if named else []
    if same:
        told.append(f"Not told apart from it: {', '.join(_some([each.theirs for each in same]))}.")
    # Beside SFT's interval a reader would expect more: it is of one pair, and the test is of all of them.
    sft = next((each for each in same if each.theirs == "sft" and each.estimate.low > 0), None)
    if sft is not None and (seeds := enough_seeds(rows, best, "sft")) is not None:
        pairs = f"among {len(over) + 1} methods" if len(over) > 1 else "at this spread"
        gap = f"{sft.estimate.value:.2f}{interval(sft.estimate, 2)}"
        told.append(f"It is {gap} above SFT; {pairs} it takes about {seeds} seeds to tell that from chance.")
    return " ".join(told)


def _some(names: Sequence[str]) -> list[str]:
    """The names, or the first of many and how many more there are."""
    more = len(names) - _MANY
    return list(names) if more <= 1 else [*names[:_MANY], f"{more} more"]


def listed(texts: Sequence[str]) -> str:
    """Join texts as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def _name(line: Line) -> str:
    return method_name(line.task, line.algorithm)


def _section(
    task: str, series: list[Series], made: dict[tuple[str, str], Figure], match_kl: Sequence[float], show: bool
) -> dict[str, Any]:
    """The template's values for a task."""
    rows = [result for s in series for result in s.results]
    lines = table(rows)
    columns, described = shown(lines), series[0].config.get("task", {})
    numbers = {key: f"{n:.3g}" if isinstance(n, float) else n for key, n in (described.get("stats") or {}).items()}
    judged = [line for line in lines if not (line.collapsed or math.isnan(line.mean["gold"]))]
    best = _name(max(judged, key=lambda line: line.mean["gold"])) if judged else ""
    worse = {each.theirs for each in lead(rows, best) if each.clear}
    marked = {best} | {s.label for s in series if worse and s.label not in worse}
    results = [column for column in columns if column.name not in _COSTS]
    costs = [column for column in columns if column.name in _COSTS]
    cells, cost_cells = ([[cell(line, column) for column in part] for line in lines] for part in (results, costs))
    seeds = sorted({s.results[0]["seed"] for s in series})
    images = {kind: as_file(made[task, kind], "svg") for kind in _FIGURES if (task, kind) in made}
    return {
        "task": task,
        "description": described.get("description", ""),
        "facts": [(key.replace("_", " "), value) for key, value in numbers.items()],
        "headline": answers(rows),
        "title": title(lines),
        "columns": results,
        "cost_columns": costs,
        "costs": list(zip(series, cost_cells, strict=True)),
        "cost_note": _meanings(costs),
        "rows": list(zip(series, (s.label in marked for s in series), cells, strict=True)),
        "notes": [
            *(["Shaded: the highest gold, and what is not told apart from it."] if worse else []),
            *footnotes(lines),
            _meanings(results),
        ],
        "measure": measure_of(rows),
        "differences": _differences(rows),
        "matched_kl": [f"{kl:g}" for kl in match_kl],
        "matched": [(s, _matched(at_kl(s.results, s.out, match_kl))) for s in series if match_kl],
        "figures": [(*_FIGURES[kind], base64.b64encode(image).decode()) for kind, image in images.items()],
        "seeds": f"seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds])}",
        "samples": [] if (hidden := described.get("sensitive", False) and not show) else _samples(series),
        "hidden": hidden,
    }


def _differences(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """A row per method of a task: how much higher it scores than each method of the columns, and whether it is better;
    nothing for a single method."""
    (by_name,) = methods(rows).values()
    found = {each.methods: each for pair in differences(by_name) for each in (pair, pair.reversed())}
    if not found:
        return []
    return [(ours, [_difference(found.get((ours, theirs))) for theirs in by_name]) for ours in by_name]


def _difference(pair: Difference | None) -> tuple[str, bool]:
    """A cell of the table of differences, and whether the row's method is better."""
    if pair is None or math.isnan(pair.estimate.value):
        return "–", False
    half = pair.estimate.high - pair.estimate.value
    digits = 2 if math.isnan(half) else enough_digits(half / 2, 2)
    p = "" if math.isnan(pair.p) else "\np < 0.001" if pair.p < 0.001 else f"\np {pair.p:.2g}"
    return f"{plain(pair.estimate.value, digits)}\n{interval(pair.estimate, digits).strip()}{p}", pair.clear


def _meanings(columns: Sequence[Column]) -> str:
    return "; ".join(f"{column.title}: {column.meaning}" for column in columns) + "."


def _matched(found: Sequence[Matched]) -> list[str]:
    """The cells of a method at each KL: gold and win-rate with intervals, or that it never got there."""
    cells = []
    for each in found:
        for estimate, digits, factor, most in ((each.gold, 2, 1, math.inf), (each.win_rate, 1, 100, 100)):
            if math.isnan(each.furthest):
                cells.append("–")
            elif not each.reached:
                cells.append(f"never (KL {each.furthest:.1f})")
            elif math.isnan(estimate.value):
                cells.append("–")
            else:
                text = plain(factor * estimate.value, digits) + interval(estimate, digits, factor, most)
                cells.append(text + (f" ({each.reached} of {each.runs} seeds)" if each.reached < each.runs else ""))
    return cells


def chosen_prompts(samples: dict[str, list[dict[str, Any]]]) -> list[tuple[int, str]]:
    """Choose which test prompts to show, and say why: the first three, and the one where the proxy flatters most."""
    count = min(len(found) for found in samples.values())
    chosen = [(i, "") for i in range(min(3, count))]

    def flattery(i: int) -> float:
        gaps = [number(found[i]["proxy"]) - number(found[i]["gold"]) for found in samples.values()]
        return max((gap for gap in gaps if not math.isnan(gap)), default=-math.inf)

    rest = range(len(chosen), count)
    if rest and max(map(flattery, rest)) > -math.inf:
        chosen.append((max(rest, key=flattery), "chosen: the reward model flatters one of these most"))
    return chosen


def _samples(series: list[Series]) -> list[tuple[str, str, list[Any]]]:
    """The chosen prompts: text, reason for the choice, and a row per method."""
    samples = {s.label: mine for s in series if (mine := s.test_samples())}
    found = []
    for i, why in chosen_prompts(samples) if samples else []:
        rows = []
        for s in [s for s in series if s.label in samples]:
            one = samples[s.label][i]
            # Best-of-n's own log-probability is unknown; the recorded one is that of the policy it sampled from.
            ratio = math.nan if best_of(s.algorithm) is not None else one["kl"]
            figures_ = [number(value) for value in (one["gold"], one["proxy"], ratio)]
            texts = ["–" if math.isnan(value) else plain(value, 2) for value in figures_]
            rows.append((s, one["response"], one["finish_reason"] == "stop", texts))
        found.append((next(iter(samples.values()))[i]["prompt"], why, rows))
    return found


def _settings(series: Series) -> list[tuple[str, str]]:
    config, run = series.config, series.config.get("run", {})
    parts = {"settings": config.get("agent"), "environment": config.get("env")}
    parts |= {"plan": run.get("plan"), "task options": run.get("options")}
    return [(part, _pairs(values, "=")) for part, values in parts.items() if values]


def _pairs(values: dict[str, Any], between: str) -> str:
    return ", ".join(f"{key}{between}{value}" for key, value in values.items())
