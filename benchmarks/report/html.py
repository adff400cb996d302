"""``report.html``: one file with everything in it, which opens without a network; and the same figures as PNG beside
it."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lm_envs.benchmarks.report.plots import Style, as_png, as_svg, figures, png_path
from lm_envs.benchmarks.report.series import Series, by_task, gather, styles
from lm_envs.benchmarks.run.names import folder_name
from lm_envs.benchmarks.run.results import Line, cell, footnotes, number, plain, shown, table, title
from lm_envs.benchmarks.run.storage import read_json
from lm_envs.files import write_atomic

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1d1d1f;
  background: #fff; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin: 0 0 .2rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
.headline { font-size: 1.12rem; background: #f5f7fa; border-left: 4px solid #D55E00; padding: .7rem 1rem;
  margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .38rem .6rem; border-bottom: 1px solid #e6e6e6; text-align: right; white-space: nowrap;
  vertical-align: top; }
th { color: #555; font-weight: 600; border-bottom: 2px solid #bbb; }
th.text, td.text { text-align: left; } td.wide { white-space: normal; min-width: 24rem; overflow-wrap: anywhere; }
tr.best td { background: #fff8ef; }
.dot { display: inline-block; width: .72em; height: .72em; border-radius: 50%; margin-right: .45em; }
.hollow { background: none !important; border: .16em solid; width: .48em; height: .48em; }
.note { color: #666; font-size: .88rem; margin: .4rem 0; }
.prompt { background: #f5f7fa; padding: .45rem .7rem; margin: 1.4rem 0 0; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
code, pre { font: .86rem ui-monospace, "SF Mono", Menlo, Consolas, monospace; } pre { white-space: pre-wrap; }
"""
_MEANING = {
    "win-rate": "Each test prompt is answered once by the method and once by SFT; the gold judge decides, ties count "
    "half.",
    "frontier": "How much score a method buys for its distance from SFT. Lines: training, on validation prompts, one "
    "per seed. Markers: the end, on test prompts, large for the mean over seeds; an arrow to the left: the KL is at "
    "most this. Where proxy still rises and gold falls, the reward model is being over-optimized.",
    "learning-curves": "On validation prompts; bold is the mean over seeds, dotted lines are methods without training. "
    "The judge only measures: nothing trains on it.",
}
_TITLES = {"win-rate": "Win-rate", "frontier": "Reward against KL", "learning-curves": "Learning curves"}


def write_report(out: Path, rows: list[dict[str, Any]]) -> Path:
    """Write ``report.html`` and ``plots/*.png`` for the results ``rows`` of the folder ``out``.

    Raises:
        UserError: there is no finished run.
    """
    series = gather(out, rows)
    made = figures(series)
    for (task, kind), figure in made.items():
        write_atomic(png_path(out, task, kind), as_png(figure))
    held = read_json(out / "comparison.json") if (out / "comparison.json").exists() else {}
    path = out / "report.html"
    write_atomic(path, page(held, series, made))
    return path


def page(held: dict[str, Any], series: list[Series], made: dict[tuple[str, str], Figure]) -> str:
    """The whole page."""
    name, style = held.get("name", "comparison"), styles(series)
    sections = "".join(_section(task, mine, made, style) for task, mine in by_task(series).items())
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(name)} – lm-envs</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>'
        f"<h1>{_text(name)}</h1><p>{_text(held.get('description', ''))}</p>{sections}{_settings(series)}"
        "</body></html>\n"
    )


def headline(lines: Sequence[Line]) -> str:
    """What a reader should take away, in a sentence or two."""
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


def _section(task: str, series: list[Series], made: dict[tuple[str, str], Figure], style: Style) -> str:
    lines = table([result for s in series for result in s.results])
    described = series[0].config.get("task", {})
    stats = described.get("stats") or {}
    numbers = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in stats.items()}
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in numbers.items())
    about = _text(described.get("description", "")) + (escape(f" ({facts})") if facts else "")
    text = [f'<h2>{_text(task)}</h2><p class="note">{about}</p>']
    if headline(lines):
        text.append(f'<p class="headline">{escape(headline(lines))}</p>')
    text.append(_table(series, lines, style))
    for kind in ("win-rate", "frontier", "learning-curves"):
        if (task, kind) in made:
            data = base64.b64encode(as_svg(made[task, kind])).decode()
            text.append(f'<h3>{_TITLES[kind]}</h3><p class="note">{_MEANING[kind]}</p>')
            text.append(f'<img alt="{_TITLES[kind]}: {escape(task)}" src="data:image/svg+xml;base64,{data}">')
    text.append(_samples(series, style))
    return "".join(text)


def _dot(series: Series, color: str) -> str:
    hollow = " hollow" if series.bandit else ""
    return f'<span class="dot{hollow}" style="background:{color};color:{color}"></span>'


def _table(series: list[Series], lines: Sequence[Line], style: Style) -> str:
    columns = shown(lines)
    head = "".join(f'<th title="{escape(column.meaning)}">{escape(column.title)}</th>' for column in columns)
    golds = [line.mean["gold"] for line in lines if not math.isnan(line.mean["gold"])]
    body = []
    for s, line in zip(series, lines, strict=True):
        best = ' class="best"' if golds and line.mean["gold"] == max(golds) else ""
        cells = "".join(f"<td>{escape(cell(line, column))}</td>" for column in columns)
        name = f'<td class="text">{_dot(s, style[s.algorithm][0])}{_text(s.label)}</td>'
        body.append(f"<tr{best}>{name}<td>{len(line.seeds)}</td>{cells}</tr>")
    meanings = "; ".join(f"{column.title}: {column.meaning}" for column in columns if column.meaning)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in [*footnotes(lines), meanings + "."])
    return (
        f'<h3>{title(lines)}</h3><div class="scroll"><table>'
        f'<tr><th class="text">method</th><th>seeds</th>{head}</tr>{"".join(body)}</table></div>{notes}'
    )


def chosen_prompts(samples: dict[str, list[dict[str, Any]]]) -> list[tuple[int, str]]:
    """Which test prompts are shown, and why: the first three, and the one where the proxy flatters most."""
    count = min(len(found) for found in samples.values())
    chosen = [(i, "") for i in range(min(3, count))]

    def flattery(i: int) -> float:
        gaps = [number(found[i]["proxy"]) - number(found[i]["gold"]) for found in samples.values()]
        return max((gap for gap in gaps if not math.isnan(gap)), default=-math.inf)

    rest = range(len(chosen), count)
    if rest and max(map(flattery, rest)) > -math.inf:
        chosen.append((max(rest, key=flattery), "chosen: the reward model flatters one of these most"))
    return chosen


def _samples(series: list[Series], style: Style) -> str:
    samples = {s.label: mine for s in series if (mine := s.test_samples())}
    if not samples:
        return ""
    seeds = ", ".join(map(str, sorted({s.results[0]["seed"] for s in series})))
    text = [
        f'<h3>Sample texts</h3><p class="note">The same test prompts, answered once by each method (seed {seeds}). '
        "The first three are the first test prompts, not picked.</p>"
    ]
    for i, why in chosen_prompts(samples):
        first = next(iter(samples.values()))[i]
        reason = f' <span class="note">({escape(why)})</span>' if why else ""
        text.append(
            f'<p class="prompt"><b>{_text(first["prompt"])}</b> …{reason}</p><div class="scroll"><table>'
            '<tr><th class="text">method</th><th class="text">continuation</th><th>gold</th><th>proxy</th>'
            '<th title="log of its probability under the policy over that under SFT, nats">log-ratio</th></tr>'
        )
        for s in series:
            if s.label not in samples:
                continue
            found = samples[s.label][i]
            end = "" if found["finish_reason"] == "stop" else ' <span class="note">[cut at the limit]</span>'
            # Best-of-n's own log-probability is unknown: what was recorded is that of the policy it sampled from.
            ratio = math.nan if s.results[0].get("kl_is_bound") else found["kl"]
            figures_ = "".join(f"<td>{_figure(value)}</td>" for value in (found["gold"], found["proxy"], ratio))
            text.append(
                f'<tr><td class="text">{_dot(s, style[s.algorithm][0])}{_text(s.label)}</td>'
                f'<td class="text wide">{_text(found["response"])}{end}</td>{figures_}</tr>'
            )
        text.append("</table></div>")
    return "".join(text)


def _figure(value: Any) -> str:
    return "–" if math.isnan(number(value)) else plain(value, 2)


def _settings(series: list[Series]) -> str:
    text = ["<h2>Settings</h2>"]
    versions = series[0].config.get("versions", {})
    text.append(f'<p class="note">{escape(", ".join(f"{k} {v}" for k, v in versions.items()))}</p>')
    for s in series:
        config, run = s.config, s.config.get("run", {})
        parts = {"settings": config.get("agent"), "environment": config.get("env")}
        parts |= {"plan": run.get("plan"), "task options": run.get("options")}
        rows = ""
        for part, values in parts.items():
            if values:
                pairs = _text(", ".join(f"{key}={value}" for key, value in values.items()))
                rows += f'<tr><td class="text">{part}</td><td class="text wide"><code>{pairs}</code></td></tr>'
        where = f"{folder_name(s.task)}/{s.algorithm}"
        text.append(f"<details><summary>{escape(where)}</summary><table>{rows}</table></details>")
    return "".join(text)


def _text(text: str) -> str:
    """Text of the user's or the policy's, so that its direction and its markup end with it."""
    return f"<bdi>{escape(text)}</bdi>"
