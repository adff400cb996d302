"""Each number that a table, a headline or a figure shows is the one that its name says."""

from __future__ import annotations

import csv
import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lm_envs.benchmarks.report import html, human, plots
from lm_envs.benchmarks.report.html import chosen_prompts, headline, write_report
from lm_envs.benchmarks.report.overoptimization import FLOOR, Curve, draw
from lm_envs.benchmarks.report.plots import frontier, learning_curves, win_rates
from lm_envs.benchmarks.report.series import Series, gather, styles
from lm_envs.benchmarks.run.results import SHOWN, cell, footnotes, shown, table, write_csv
from lm_envs.feedback.store import Judgment
from lm_envs.feedback.study import Answer, Item, Response
from tests.benchmarks.run.test_results import folder_of, result

# Title: the number of a result, its digits, its factor, and whether its spread over seeds is shown
COLUMNS: dict[str, tuple[str, int, int, bool]] = {
    "gold": ("gold", 2, 1, True),
    "gold + %": ("gold_positive", 1, 100, False),
    "proxy": ("proxy", 2, 1, True),
    "proxy + %": ("proxy_positive", 1, 100, False),
    "corpus": ("corpus", 1, 1, True),
    "greedy": ("corpus_greedy", 2, 1, True),
    "over SFT": ("corpus_gain", 2, 1, True),
    "±": ("corpus_gain_se", 2, 1, False),
    "KL": ("kl", 1, 1, True),
    "β": ("kl_coef", 3, 1, False),
    "regret": ("regret", 4, 1, True),
    "frontier gap": ("frontier_gap", 3, 1, True),
    "gradient cosine": ("gradient_cosine", 3, 1, True),
    "length": ("length", 1, 1, False),
    "distinct-2": ("distinct_2", 2, 1, False),
    "perplexity": ("perplexity", 1, 1, False),
    "tokens": ("tokens_generated", 0, 1, False),
    "reward calls": ("reward_calls", 0, 1, False),
    "seconds": ("wall_s", 0, 1, False),
    "comparisons": ("comparisons", 0, 1, False),
    "given tokens": ("given_tokens", 0, 1, False),
    "episodes": ("episodes", 0, 1, False),
    "trained tokens": ("trained_tokens", 0, 1, False),
}


def numbered(algorithm: str, seed: int, **changes: Any) -> dict:
    """A result in which no two numbers are equal."""
    numbers = {name: 0.0123456789 * (place + 1) * (1 + seed) for place, (name, *_) in enumerate(COLUMNS.values())}
    whole = ("tokens_generated", "reward_calls", "comparisons", "given_tokens", "episodes", "trained_tokens")
    numbers |= {name: 1111 * (place + 2) * (1 + seed) for place, name in enumerate(whole)} | {
        "wall_s": 71.4 + 30 * seed
    }
    return result(algorithm, seed, 0.5, 1.0, [1.0, 0.0, 1.0, 1.0]) | numbers | changes


def test_each_column_of_the_table_shows_its_number(tmp_path: Path) -> None:
    rows = [numbered("ppo", 0), numbered("ppo", 1), numbered("sft", 0, kl_coef=0.5)]
    lines = table(rows)
    titles = [column.title for column in shown(lines)]
    assert titles == ["win-rate %", *COLUMNS]
    for column in SHOWN:
        if column.title in COLUMNS:
            name, digits, factor, spread = COLUMNS[column.title]
            a, b = (factor * row[name] for row in rows[:2])
            sd = abs(a - b) / math.sqrt(2)
            more = digits + (spread and f"{sd:.{digits}f}".strip("0.") == "")  # one more, where it would be 0
            text = f"{(a + b) / 2:,.{more}f}" + (f" ±{sd:.{more}f}" if spread else "")
            assert cell(lines[0], column) == text, column.title
            assert cell(lines[1], column) == f"{factor * rows[2][name]:,.{digits}f}"
    write_csv(rows, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        for row, read in zip(rows, csv.DictReader(file), strict=True):
            names = {name for name, *_ in COLUMNS.values()} - {"gold_positive", "proxy_positive"}
            for name in {*names, "win_rate", "win_rate_se"}:
                assert read[name] == (str(row[name]) if isinstance(row[name], int) else f"{row[name]:.6g}"), name


def test_columns_that_say_nothing_are_left_out() -> None:
    def titles(*rows: dict) -> set[str]:
        return {column.title for column in shown(table(rows))}

    free = {"comparisons": 0, "given_tokens": 0}
    found = titles(numbered("ppo", 0, **free), numbered("sft", 0, **free, kl_coef=None))
    assert not {"comparisons", "given tokens", "β", "people's win-rate %"} & found
    other = {"task": "other", "kl_coef": 0.7}
    assert "β" not in titles(numbered("ppo", 0), numbered("ppo", 0, **other))  # the same within each task
    assert "β" in titles(numbered("ppo", 0), numbered("ppo", 0, **other), numbered("rloo", 0, task="other"))


def test_a_bound_of_one_seed_is_one_of_the_line() -> None:
    rows = [result("best-of-4", seed, 0.5, 0.64 + seed, [1.0, 0.0], kl_is_bound=bool(seed)) for seed in (0, 1)]
    (line,) = table(rows)
    kl = next(column for column in SHOWN if column.name == "kl")
    assert cell(line, kl) == "≤1.1" and any(note.startswith("≤:") for note in footnotes([line]))


# ---- headlines and the page ----


def golds(mean: float, seed: int) -> list[float]:
    return [mean + 0.01 * seed + 0.1 * (i % 5) for i in range(40)]


def many(methods: dict[str, float], seeds: int = 4, **changes: Any) -> list[dict]:
    """Methods that differ by little noise, each in its gold."""
    return [
        result(name, seed, mean, 3.25 + mean, [1.0, 0.0, 1.0, 1.0] * 10, golds=golds(mean, seed if mean else -seed))
        | changes
        for name, mean in methods.items()
        for seed in range(seeds)
    ]


def test_the_headline_names_the_nearest_of_those_that_are_worse() -> None:
    text = headline(many({"sft": 0.0, "a": 0.5, "b": 0.9, "c": 0.7, "d": 0.3, "e": 0.8}))
    assert text.startswith("b reaches the highest gold score, 0.90 [")
    assert re.search(r"against SFT's 0\.00, at a KL of 4\.2 nats, and wins 75 % \[", text)
    apart = [float(x) for x in re.findall(r"(?:e|c|a) by (\d\.\d\d)", text)]
    assert re.search(r"better than e by .*, c by .*, a by .* and 2 more\.", text) and apart == [0.1, 0.2, 0.4]
    assert "holds 50 %" not in text  # 30 of 40 prompts
    bound = headline(many({"sft": 0.0, "best-of-4": 0.5}, kl_is_bound=True))
    assert "at a KL of at most 3.8 nats" in bound
    half = headline(many({"sft": 0.0, "a": 0.5, "b": 0.4}, wins=[1.0, 0.0] * 20, win_rate=0.5))
    assert half.endswith("The win-rate's interval holds 50 % or less: a, b.")


def test_without_a_judge_the_headline_is_about_the_proxy() -> None:
    unjudged = {"gold": None, "golds": [], "wins": [], "win_rate": None}
    rows = [row | {"proxy": 2 * row["gold"]} | unjudged for row in many({"sft": 0.0, "a": 0.5, "b": 0.9, "c": 0.7})]
    assert headline(rows).startswith("b has the highest proxy score, 1.80.")


def test_prompts_where_the_proxy_flatters_any_method_are_shown() -> None:
    one = [{"gold": g, "proxy": p} for g, p in ((0, 9), (0, 9), (0, 9), (0, -1), (5, 0), (0, 2), (None, 90))]
    two = [{"gold": g, "proxy": p} for g, p in ((0, 0), (0, 0), (0, 0), (0, 3), (9, 0), (0, 0), (None, 90))]
    assert [i for i, _ in chosen_prompts({"one": one, "two": two})] == [0, 1, 2, 3]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[dict]]:
    """A finished comparison of three methods, two of them alike, on two envs, and its results."""
    rows = many({"sft": 0.0, "ppo": 0.9, "rloo": 0.9}, seeds=3, prompts=40)
    rows += [row | {"task": "reviews-bandit"} for row in many({"ppo": 0.4}, seeds=3, prompts=40)]
    draws = np.random.default_rng(1)
    for row in rows:
        if row["algorithm"] == "rloo":
            row["golds"] = (np.array(row["golds"]) + draws.normal(0, 0.3)).tolist()
            row["gold"] = float(np.mean(row["golds"]))
        folder = folder_of(tmp_path, row)
        bandit = row["task"] == "reviews-bandit"
        agent, env = {"clip": 0.125, "seed": row["seed"]}, {"temperature": 0.75}
        run = {"plan": {"iterations": 33}, "options": {"size": 44}}
        about = {"description": "D", "stats": {"accuracy": 0.123456, "pairs": 1234}}
        config = {"agent": agent, "env": env, "run": run, "task": about, "versions": {"torch": "9"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "result.json").write_text(json.dumps(row))
        told = {"prompt": "p", "gold": 0.25, "proxy": 0.5, "kl": 0.125, "finish_reason": "stop"}
        records = [told | {"split": "validation", "response": "curve"}]
        records += [told | {"split": "test", "response": f"{row['algorithm']} {row['seed']} {bandit}"}]
        records += [told | {"split": "test", "response": "cut", "finish_reason": "length"}]
        (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        points = [
            {
                "iteration": i,
                "tokens": 1000 * i,
                "trained_tokens": 3000 * i + row["seed"],
                "validation_proxy": i + row["seed"],
            }
            | {"validation_gold": i * row["gold"], "validation_kl": float(i), "validation_win_rate": 0.75}
            for i in range(3 + (row["seed"] == 2))  # the last seed's curve is longer
        ]
        lines = points if row["algorithm"] != "sft" else []
        (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in lines))
    return tmp_path, rows


def test_the_page_says_what_each_run_was_and_marks_the_best(
    written: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "figures", lambda series: {})
    out, rows = written
    (out / "comparison.json").write_text(
        json.dumps({"name": "N", "description": "About it", "match_kl": [1.0, 2.5, 9.0]})
    )
    page = unescape(re.sub("</?bdi>", "", write_report(out, rows).read_text()))
    assert "<h1>N</h1><p>About it</p>" in page and '<p class="note">torch 9</p>' in page
    assert '<p class="note">D</p>' in page and "(seed 0)" in page
    facts = re.findall(r'<tr><td class="text">(.*?)</td><td>(.*?)</td></tr>', page.split("task's models</summary>")[1])
    assert facts[:2] == [("accuracy", "0.123"), ("pairs", "1234")]
    for part, values in (
        ("settings", "clip=0.125, seed=0"),
        ("environment", "temperature=0.75"),
        ("plan", "iterations=33"),
        ("task options", "size=44"),
    ):
        assert f'<td class="text">{part}</td><td class="text wide"><code>{values}</code>' in page
    marked = re.findall(r'<tr class="best"><td class="text">.*?</span>(.*?)</td><td>(\d)</td>', page)
    assert marked == [("ppo", "3"), ("rloo", "3")]
    responses = re.findall(r'<td class="text wide">([^<]*?)(?: <span class="note">(.*?)</span>)?</td><td>', page)
    first = ["sft 0 False", "ppo 0 False", "rloo 0 False", "ppo 0 True"]
    assert responses == [(text, "") for text in first] + [("cut", "[cut at the limit]")] * 4
    cells = re.findall(r"<td>([^<]*)</td>", page.split("At the same KL")[1].split("</table>")[0])
    rloo = [row["gold"] for row in rows if row["algorithm"] == "rloo"]
    assert cells[:6] == ["–"] * 6  # sft has no curve
    assert cells[12].startswith(f"{np.mean(rloo):.2f} [") and cells[13] == "75.0 [75.0, 75.0]"  # at 1 nat
    share = (math.sqrt(2.5) - math.sqrt(2)) / (math.sqrt(3) - math.sqrt(2))
    assert cells[8] == f"{0.9 * (2 + share):.2f} (1 of 3 seeds)" and cells[10] == cells[11] == "never (KL 3.0)"


# ---- figures ----


def test_the_learning_curves_are_means_as_far_as_all_seeds_go(written: tuple[Path, list[dict]]) -> None:
    out, rows = written
    series = gather(out, rows)
    figure = learning_curves(series, styles(series))
    assert figure is not None
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["Gold", "Proxy", "KL from SFT, nats"]
    ax = figure.axes[1]
    thick = [line for line in ax.lines if line.get_linewidth() == 2.2]
    for line, style in zip(thick, ("-", "-", "--"), strict=True):
        assert line.get_xdata().tolist() == [0, 1, 2] and line.get_ydata().tolist() == [1.0, 2.0, 3.0]
        assert line.get_linestyle() == style
    names = {text.get_text(): text for text in ax.texts}
    assert set(names) == {"ppo", "rloo", "ppo (bandit)", "sft"}
    for band in ax.collections:  # from the lowest seed to the highest
        edges = {x: sorted(y for at, y in band.get_paths()[0].vertices if at == x) for x in (0.0, 1.0, 2.0)}
        assert {x: (found[0], found[-1]) for x, found in edges.items()} == {x: (x, x + 2) for x in edges}
    assert len(ax.collections) == 3


def test_learning_curves_over_trained_tokens(written: tuple[Path, list[dict]]) -> None:
    out, rows = written
    for path in out.glob("reviews/rloo/*/metrics.jsonl"):
        lines = [json.loads(line) | {"tokens": 0} for line in path.read_text().split("\n") if line]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    series = [s for s in gather(out, rows) if s.algorithm != "sft"]
    figure = learning_curves(series, styles(series))
    assert figure is not None
    first = figure.axes[0].lines[0]
    assert first.get_xdata() == pytest.approx([0, 3, 6], abs=2e-3) and "trained tokens" in figure.axes[0].get_xlabel()


def drawn_result(algorithm: str, kl: float, gold: float, wins: list[float], **changes: Any) -> dict:
    return result(algorithm, 0, gold, kl, wins, golds=[gold] * len(wins), **changes)


def test_the_frontier_has_its_optimum_its_bounds_and_its_hollow_marks(tmp_path: Path) -> None:
    best = {"kl": [0.0, 1.0, 2.0, 4.0, 99.0], "reward": [0.0, 1.0, 1.5, 1.75, 2.0]}
    rows = [
        drawn_result("ppo", 4.0, 0.5, [1.0, 0.0], frontier=best),
        drawn_result("ppo", 3.0, 0.25, [1.0, 0.0], task="reviews-bandit"),
        drawn_result("best-of-4", 1.0, 0.125, [1.0, 0.0], kl_is_bound=True),
    ]
    series = [Series(row["task"], row["algorithm"], (row,), tmp_path) for row in rows]
    style = styles(series)
    figure = frontier(series, style)
    gold, proxy = figure.axes
    assert [ax.get_title() for ax in (gold, proxy)] == ["Gold (the judge)", "Proxy (the reward that trains)"]
    line = next(line for line in gold.lines if line.get_color() == "#222222")
    assert line.get_xydata().tolist() == [[0, 0], [1, 1], [2, 1.5], [4, 1.75]]  # as far as the methods go
    marks = {tuple(m.get_xydata()[0]): m for m in gold.lines if m.get_markersize() == 10}
    assert set(marks) == {(4.0, 0.5), (3.0, 0.25), (1.0, 0.125)}
    hollow = [at for at, mark in marks.items() if mark.get_markerfacecolor() == "white"]
    assert hollow == [(3.0, 0.25)] and marks[1.0, 0.125].get_color() == style["best-of-4"][0]
    assert [text.xy for text in gold.texts if text.arrow_patch is not None and not text.get_text()] == [(1.0, 0.125)]
    assert [mark.get_ydata()[0] for mark in proxy.lines if mark.get_markersize() == 10] == [1.0] * 3


def test_the_bars_of_win_rates_end_at_the_ends_of_their_scale() -> None:
    row = drawn_result("ppo", 4.0, 0.5, [1.0, 1.0, 1.0, 0.0])
    series = [Series("reviews", "ppo", (row,), Path())]
    figure = win_rates(series, styles(series))
    assert figure is not None
    (ax,) = figure.axes
    low = 0.75 - stats.t.ppf(0.975, 3) * 0.25
    assert ax.collections[0].get_segments()[0][:, 0] == pytest.approx([100 * max(low, 0), 100])
    assert {text.get_text() for text in ax.texts} == {"75 %"}


def test_a_drawing_of_over_optimisation_is_of_its_curves() -> None:
    fit = {"alpha": 1.5, "beta": 0.5, "r2": 0.75}
    far = [0.0, 1.0, 0.5, 1.5 * FLOOR, 0.25]
    curves = [
        Curve(40, 0.875, "best-of-n", [0.0, 1.0, 4.0], [0.0, 1.25, 2.0], [0.0, 1.0, 1.0], fit),
        Curve(8, 0.625, "best-of-n", [0.0, 1.0, 4.0], [0.0, 0.5, 0.75], [0.0, 0.25, 0.5], {"alpha": math.nan}),
        Curve(8, 0.625, "ppo", [0.0, 1.0, 4.0, 9.0, 16.0], [0.0, 1.0, 2.0, 3.0, 4.0], far, fit),
    ]
    best, ppo = draw(curves).axes
    for ax, mine in ((best, curves[:2]), (ppo, curves[2:])):
        dashed = [line.get_xydata().tolist() for line in ax.lines if line.get_linestyle() == "--"]
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        for curve, proxy, gold in zip(mine, dashed, dots, strict=True):
            d = [math.sqrt(kl) for kl in curve.kl]
            assert proxy == [list(pair) for pair in zip(d, curve.proxy, strict=True)]
            assert gold.get_xydata().tolist() == [list(pair) for pair in zip(d, curve.gold, strict=True)]
            assert gold.get_label() == f"{curve.pairs} pairs ({100 * curve.accuracy:.0f}% ordered correctly)"
    assert best.lines[1].get_color() != best.lines[4].get_color() == ppo.lines[1].get_color()  # of 8 pairs
    (x, y), (u, v) = best.lines[2].get_data(), ppo.lines[2].get_data()
    assert x[-1] == 2 and np.allclose(y, x * (1.5 - 0.5 * x))
    assert u[-1] == 2 and np.allclose(v[1:], u[1:] * (1.5 - 0.5 * np.log(u[1:])))  # up to where gold falls too far
    assert ppo.get_ylim() == (2 * FLOOR, pytest.approx(1.1 * 3)) and ppo.get_xlim()[1] == pytest.approx(1.15 * 3)


# ---- people ----


def test_people_beside_the_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of several equal prompts counts. The file holds the means and errors of both sides."""
    prompts = ["p", "q", "p", "r"]
    rows = [result("ppo", seed, 0.5, 1.0, [1.0, 0.0, 0.5, float(seed)]) for seed in (0, 1)]
    rows.append(result("sft", 0, 0.0, 0.0, [0.5] * 4))
    for row in rows:
        folder = folder_of(tmp_path, row)
        records = [{"split": "test", "prompt": prompt, "response": row["algorithm"]} for prompt in prompts]
        (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def judged(number: int, prompt: str, ranks: tuple[int, int]) -> Judgment:
        item = Item(prompt, (Response("x", "ppo"), Response("y", "sft")))
        return Judgment("ann", number, item, (0, 1), Answer(ranks=ranks), 0.0)

    said = [judged(1, "p", (0, 1)), judged(2, "p", (0, 0)), judged(3, "r", (1, 0)), judged(4, "elsewhere", (0, 1))]
    with human.add_people(tmp_path, rows, said).open() as file:
        (row,) = csv.DictReader(file)
    assert (
        rows[0]["human"]
        == rows[1]["human"]
        == [0.75, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True), 0.0]
    )
    assert (row["task"], row["algorithm"]) == ("reviews", "ppo")
    assert float(row["win_rate"]) == np.mean([r["win_rate"] for r in rows[:2]])
    assert float(row["human_win_rate"]) == 0.375
    assert float(row["human_win_rate_se"]) == pytest.approx(0.375)  # of 0.75 and 0
    (line,) = [line for line in table(rows) if line.algorithm == "ppo"]
    assert cell(line, next(column for column in SHOWN if column.name == "human")) == "37.5 ±37.5"
    assert float(row["win_rate_se"]) == pytest.approx(line.estimates["win_rate"].error, rel=1e-5) != 0.375


def test_the_rank_correlation_s_interval_is_computed_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two seeds the judge's outcomes are means; resamples are of prompts, and reflected at the estimate."""
    monkeypatch.setattr(human, "RESAMPLES", 60)
    draws = np.random.default_rng(3)
    wins = draws.integers(0, 3, (5, 2, 30)) / 2 * np.linspace(0.6, 1, 5)[:, None, None]
    said = (
        np.where(draws.random((5, 30)) < 0.7, draws.integers(0, 3, (5, 30)) / 2, math.nan)
        * np.linspace(0.7, 1, 5)[:, None]
    )
    series = []
    for k in range(5):
        mine = [result(f"m{k}", s, 0.0, 1.0, wins[k, s].tolist()) | {"human": said[k].tolist()} for s in (0, 1)]
        series.append(Series("reviews", f"m{k}", tuple(mine), Path()))
    found = human.correlation(series, seed=4)
    assert found is not None
    value = stats.spearmanr(np.nanmean(said, axis=1), wins.mean(axis=(1, 2))).statistic
    resampled, drawn = [], np.random.default_rng(4)
    for _ in range(60):
        chosen = drawn.integers(30, size=30)
        rates = [np.mean([x for x in row[chosen] if not math.isnan(x)]) for row in said]
        resampled.append(stats.spearmanr(rates, wins[:, :, chosen].mean(axis=(1, 2))).statistic)
    low, high = np.quantile(resampled, (0.025, 0.975))
    low, high = max(-1, min(low, 2 * value - high)), min(1, max(high, 2 * value - low))
    assert (found.value, found.low, found.high, found.count) == pytest.approx((value, low, high, 5))


def test_names_beside_curves_are_apart_in_order_and_inside() -> None:
    found = plots._spread(np.array([0.0, 0.1, 5.0, 9.9, 10.0]), 1.0, 0.0, 10.0)
    assert found == pytest.approx([0.0, 1.0, 5.0, 9.0, 10.0])
    assert plots._spread(np.array([4.0, 4.0, 4.5]), 1.0, 0.0, 10.0) == pytest.approx(np.array([3.5, 4.5, 5.5]) - 1 / 3)
    crowded = plots._spread(np.array([1.0] * 5), 1.0, 0.0, 2.0)  # too many: around the middle
    assert crowded == pytest.approx([-1.0, 0.0, 1.0, 2.0, 3.0])


def test_lines_to_names_do_not_cross() -> None:
    a, b = np.array([[0.0, 0.0], [2.0, 2.0]]), np.array([[0.0, 2.0], [2.0, 0.0]])
    assert plots._cross(a, b) and not plots._cross(a, a + [0.0, 1.0]) and not plots._cross(a, b + [3.0, 0.0])
    assert not plots._cross(a, np.array([[2.0, 2.0], [3.0, 0.0]]))  # they only touch


def test_a_headline_of_many_methods_names_some() -> None:
    rows = many({f"m{i}": 0.5 for i in range(12)})
    for row in rows:
        shift = (row["seed"] * 7 + int(row["algorithm"][1:]) * 5) % 11
        row |= {"gold": row["gold"] + shift, "golds": [x + shift for x in row["golds"]]}
    assert re.search(r"Not told apart from it: (m\d+, ){7}2 more\.", headline(rows))
    assert html._some(list("abcdefgh")) == list("abcdefgh") and html._some(list("abcdefghi"))[-1] == "2 more"
