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
from lm_envs.benchmarks.run.names import best_of, folder_name
from lm_envs.benchmarks.run.results import Line, cell, footnotes, number, plain, shown, table, title
from lm_envs.benchmarks.run.storage import read_json
from lm_envs.files import write_atomic

_FIGURES = {
    "win-rate": (
        "Win-rate",
        "Each test prompt is answered once by the method and once by SFT; the gold judge decides, ties count half.",
    ),
    "people": (
        "People and judge",
        "Each method against SFT, by people and by the judge. On the dashed line the two agree; the rank correlation's "
        "interval resamples prompts and is widened by the noise in both win-rates.",
    ),
    "frontier": (
        "Reward against KL",
        "How much score a method buys for its distance from SFT. Lines: training, on validation prompts, one per seed. "
        "Markers: the end, on test prompts, large for the mean over seeds; an arrow to the left: the KL is at most "
        "this. Where proxy still rises and gold falls, the reward model is being over-optimized.",
    ),
    "learning-curves": (
        "Learning curves",
        "On validation prompts; bold is the mean over seeds, dotted lines are methods without training. The judge only "
        "measures: nothing trains on it.",
    ),
}


def write_report(out: Path, rows: list[dict[str, Any]]) -> Path:
    """Write ``report.html`` and ``plots/*.png`` for the results ``rows`` of the folder ``out``.

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
        sections=[_section(task, mine, made) for task, mine in by_task(series).items()],
        versions=_pairs(series[0].config.get("versions", {}), " "),
        settings=[(f"{folder_name(s.task)}/{s.algorithm}", _settings(s)) for s in series],
    )
    write_atomic(path := out / "report.html", page)
    return path


def headline(lines: Sequence[Line]) -> str:
    """Return what a reader should take away, in a sentence or two."""
    sft = next((line for line in lines if line.algorithm == "sft"), None)
    others = [line for line in lines if line.algorithm != "sft"]
    judged = [line for line in others if not math.isnan(line.mean["gold"])]
    if not others:
        return ""
    if not judged:
        best = max(others, key=lambda line: line.mean["proxy"])
        score = f"{best.mean['proxy']:.2f}"
        return f"{_name(best)} has the highest proxy score, {score}. There is no judge to say whether that is real."
    best = max(judged, key=lambda line: line.mean["gold"])
    against = f" against SFT's {sft.mean['gold']:.2f}" if sft else ""
    bound = "at most " if best.kl_is_bound else ""
    text = (
        f"{_name(best)} reaches the highest gold score, {best.mean['gold']:.2f}{against}, at a KL of "
        f"{bound}{best.mean['kl']:.1f} nats, and wins {100 * best.mean['win_rate']:.0f} % of the test prompts against "
        "SFT."
    )
    unclear = [line for line in judged if not line.mean["win_rate"] - 2 * line.spread["win_rate"] > 0.5]
    if unclear:
        text += f" Not above 50 % by two standard errors: {', '.join(map(_name, unclear))}."
    elif len(judged) > 1:
        text += " Every method is above 50 % by more than two standard errors."
    return text


def _name(line: Line) -> str:
    return f"{line.algorithm} (bandit)" if line.task.endswith("-bandit") else line.algorithm


def _section(task: str, series: list[Series], made: dict[tuple[str, str], Figure]) -> dict[str, Any]:
    """The template's values for a task."""
    lines = table([result for s in series for result in s.results])
    columns, described = shown(lines), series[0].config.get("task", {})
    numbers = {key: f"{n:.3g}" if isinstance(n, float) else n for key, n in (described.get("stats") or {}).items()}
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in numbers.items())
    golds = [line.mean["gold"] for line in lines]
    highest = max((gold for gold in golds if not math.isnan(gold)), default=math.nan)
    cells = [[cell(line, column) for column in columns] for line in lines]
    images = {kind: as_file(made[task, kind], "svg") for kind in _FIGURES if (task, kind) in made}
    return {
        "task": task,
        "description": described.get("description", ""),
        "facts": f" ({facts})" if facts else "",
        "headline": headline(lines),
        "title": title(lines),
        "columns": columns,
        "rows": list(zip(series, (gold == highest for gold in golds), cells, strict=True)),
        "notes": [*footnotes(lines), "; ".join(f"{column.title}: {column.meaning}" for column in columns) + "."],
        "figures": [(*_FIGURES[kind], base64.b64encode(image).decode()) for kind, image in images.items()],
        "seeds": ", ".join(map(str, sorted({s.results[0]["seed"] for s in series}))),
        "samples": _samples(series),
    }


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
