"""What the report, its table and its plots say, recomputed from samples.jsonl and metrics.jsonl."""

from __future__ import annotations

import math
import re
from html import unescape

import numpy as np
import pytest
from scipy import stats

from lm_envs.benchmarks.report.html import write_report
from lm_envs.benchmarks.report.plots import figures
from lm_envs.benchmarks.report.series import gather
from lm_envs.benchmarks.run.results import collect_results
from tests.benchmarks import distinct_task as task
from tests.benchmarks.test_recomputed import (  # noqa: F401 - a fixture is found by its name
    ALL,
    REFERENCE,
    N,
    golds,
    runs,
    sampled,
)

ALGORITHMS = ["sft", f"best-of-{N}", "reinforce"]
BOUND = math.log(N) - (N - 1) / N


def error_of(values) -> float:
    return math.sqrt(np.var(values, ddof=1) / len(values))


@pytest.fixture(scope="module")
def known(runs):  # noqa: F811
    """By run, from its files alone: gold, proxy and KL of each test sample, the outcomes, and the curve's points."""
    theirs = golds("test", sampled(task.load().reference, task.prompts("test"), REFERENCE))
    found = {}
    for key in ALL:
        run = runs[1][key]
        records = run.test_samples
        mine = {name: np.array([r[name] for r in records]) for name in ("gold", "proxy", "kl", "length")}
        if key[0] == f"best-of-{N}":  # measured on other samples
            mine["kl"] = np.array([run.result["kl"]])
        mine["win"] = (1 + np.sign(mine["gold"] - np.array(theirs))) / 2
        metrics = run.lines("metrics.jsonl") if key[0] == "reinforce" else []
        mine["points"] = [m for m in metrics if "validation_gold" in m]
        found[key] = mine
    return found


def seeds_of(known, algorithm) -> list[dict]:
    return [found for (name, _), found in known.items() if name == algorithm]


def mean_of(known, algorithm, name) -> float:
    return float(np.mean([found[name].mean() for found in seeds_of(known, algorithm)]))


def curves_of(known, x, name) -> list[list[list[float]]]:
    """The points of both seeds of REINFORCE."""
    return [[[m[x], m[f"validation_{name}"]] for m in found["points"]] for found in seeds_of(known, "reinforce")]


def win_rate_of(known, algorithm) -> tuple[float, float]:
    """The win-rate and half of its 95 % interval: over prompts, and over seeds where there are two."""
    x = np.array([found["win"] for found in seeds_of(known, algorithm)])
    if len(x) == 1:
        return float(x.mean()), 1.962 * error_of(x[0])
    rest = (x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()).var() * 2 / (x.shape[1] - 1) / 2
    parts = np.array([(x[0].mean() - x[1].mean()) ** 2 / 4, x.mean(axis=0).var(ddof=1) / x.shape[1], rest])
    variance = parts[0] + parts[1] - parts[2]
    freedom = variance**2 / (parts**2 / [1, x.shape[1] - 1, x.shape[1] - 1]).sum()
    variance, freedom = max((variance, freedom), (parts[0], 1), (parts[1], x.shape[1] - 1))
    return float(x.mean()), float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)


@pytest.mark.parametrize("key", ALL, ids=str)
def test_errors_and_shares(runs, known, key):  # noqa: F811
    result, mine, records = runs[1][key].result, known[key], runs[1][key].test_samples
    # float32 sums may flip a sample of the reference's
    assert result["win_rate_se"] == pytest.approx(error_of(mine["win"]), rel=1e-3)
    assert result["gold_se"] == pytest.approx(error_of(mine["gold"]), rel=1e-9)
    assert result["proxy_se"] == pytest.approx(error_of(mine["proxy"]), rel=1e-9)
    assert result["stopped"] == np.mean([r["finish_reason"] == "stop" for r in records])
    assert result["prompts"] == len(records) == 1100
    assert result["episodes"] == {"sft": 1100, f"best-of-{N}": N * 1100, "reinforce": 4 * 32 + 1100}[key[0]]
    assert result["trained_tokens"] == (runs[1][key].scored("train")[1] if key[0] == "reinforce" else 0)


@pytest.fixture(scope="module")
def page(runs) -> str:  # noqa: F811
    out = runs[0]
    path = write_report(out, collect_results(out, [task.NAME], ALGORITHMS))
    return re.sub("</?bdi>", "", path.read_text())


def test_the_reports_table(page, known):
    parts = []
    for part in page.split("<table>")[1:3]:
        part = part.split("</table>")[0]
        titles = [unescape(t) for t in re.findall(r"<th[^>]*>([^<]*)</th>", part)]
        rows = [row.split("</td><td>") for row in re.findall(r"<tr[^>]*><td class=\"text\">(.*?)</tr>", part)]
        assert len(rows) == 3 and titles[0] == "method"
        parts.append([dict(zip(titles, [re.sub("<[^>]*>", "", c) for c in row], strict=True)) for row in rows])
    for result, cost, algorithm in zip(*parts, ALGORITHMS, strict=True):
        cells = result | cost
        assert cost["method"] == algorithm and "reward calls" not in result
        seeds = seeds_of(known, algorithm)
        assert cells["method"] == algorithm and cells["seeds"] == str(len(seeds))
        for name in ("gold", "proxy"):
            text = f"{mean_of(known, algorithm, name):.2f}"
            if len(seeds) == 2:  # the standard deviation of two numbers
                first, second = (found[name].mean() for found in seeds)
                text += f" ±{abs(first - second) / math.sqrt(2):.2f}"
            assert cells[name] == text
        rate, half = win_rate_of(known, algorithm)
        shown, low, high = map(float, re.findall(r"[\d.]+", cells["win-rate %"]))
        assert shown == pytest.approx(100 * rate, abs=0.16)
        assert (low, high) == pytest.approx((max(100 * (rate - half), 0), min(100 * (rate + half), 100)), abs=0.8)
        kl = f"{round(mean_of(known, algorithm, 'kl'), 1) + 0.0:.1f}"
        assert cells["KL"].startswith(kl) and cells["KL"].endswith(f"(≤{BOUND:.1f})") == ("best" in algorithm)
        assert cells["length"] == f"{mean_of(known, algorithm, 'length'):.1f}"
        assert cells["reward calls"] == {"sft": "0", f"best-of-{N}": f"{N * 1100:,}", "reinforce": "128"}[algorithm]


def test_the_reports_headline(page, known):
    best = max(ALGORITHMS[1:], key=lambda name: mean_of(known, name, "gold"))
    gold, start = mean_of(known, best, "gold"), mean_of(known, "sft", "gold")
    said = unescape(re.search(r'<div class="headline">(.*?)</div>', page)[1])
    said = " ".join(re.findall("<p>(.*?)</p>", said))
    assert gold < start  # here training made it worse, and best-of-4 by the proxy too
    told = f"No method's gold score is above SFT's {start:.2f}; {best} comes nearest, with {gold:.2f} ["
    assert said.startswith(told)
    unclear = [name for name in ALGORITHMS[1:] for rate, half in [win_rate_of(known, name)] if rate - half <= 0.5]
    assert (f"holds 50 % or less: {', '.join(unclear)}." in said) == bool(unclear)
    assert "One seed of a method cannot tell which method is better." in said  # SFT and best-of-n have one


def test_the_reports_texts_are_those_of_the_first_seed(page, runs, known):  # noqa: F811
    first = {name: runs[1][name, 3].test_samples for name in ALGORITHMS}
    prompts = [unescape(p) for p in re.findall(r'<p class="prompt"><b>(.*?)</b>', page)]
    flattery = np.max([[r["proxy"] - r["gold"] for r in first[name][3:]] for name in ALGORITHMS], axis=0)
    chosen = [0, 1, 2, 3 + int(flattery.argmax())]
    assert prompts == [first["sft"][i]["prompt"] for i in chosen]
    text, number = r'<td class="text wide">(.*?)(?: <span.*?)?</td>', "<td>(.*?)</td>"
    shown = re.findall(text + 3 * number, page)
    expected = [first[name][i] for i in chosen for name in ALGORITHMS]
    for (response, gold, proxy, _), record in zip(shown, expected, strict=True):
        assert unescape(response) == record["response"]
        assert float(gold) == pytest.approx(record["gold"], abs=6e-3) and float(proxy) == record["proxy"]
    ratios = [ratio for *_, ratio in shown]
    assert ratios[1::3] == ["–"] * 4  # unknown of best-of-n
    assert [float(r) for r in ratios[2::3]] == pytest.approx([first["reinforce"][i]["kl"] for i in chosen], abs=6e-3)


@pytest.fixture(scope="module")
def drawn(runs):  # noqa: F811
    out = runs[0]
    made = figures(gather(out, collect_results(out, [task.NAME], ALGORITHMS)))
    return {kind: figure for (_, kind), figure in made.items()}


def test_the_win_rates_drawn(drawn, known):
    (ax,) = drawn["win-rate"].axes
    bars = [c.get_segments()[0] for c in ax.collections]
    dots = [line.get_xydata()[0] for line in ax.lines if line.get_markersize() == 9]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert sorted(names) == sorted(ALGORITHMS) and len(bars) == 3
    for place, (name, bar) in enumerate(zip(names, bars, strict=True)):
        rate, half = win_rate_of(known, name)
        ends = max(100 * (rate - half), 0), min(100 * (rate + half), 100)
        assert bar[:, 0] == pytest.approx(ends, abs=0.5)
        assert any(dot == pytest.approx([100 * rate, place], abs=0.2) for dot in dots)


def test_the_profiles_drawn(drawn, known, runs):  # noqa: F811
    """The share of golds above a value, from the mean of SFT's answers to the same prompts, in the unit of theirs."""
    (ax,) = drawn["profile"].axes
    assert [line.get_label() for line in ax.lines] == ALGORITHMS and len(ax.collections) == 3
    for line, algorithm in zip(ax.lines, ALGORITHMS, strict=True):
        x, share = line.get_xydata()[::20].T
        above = []
        for key in (key for key in ALL if key[0] == algorithm):
            start = runs[1][key].result
            score = (known[key]["gold"] - start["sft_gold"]) / start["sft_gold_sd"]
            above.append([100 * (score > at).mean() for at in x])
        assert share == pytest.approx(np.mean(above, axis=0), abs=0.1)


def test_the_frontier_drawn(drawn, known):
    for ax, name in zip(drawn["frontier"].axes, ("gold", "proxy"), strict=True):
        big = [line.get_xydata()[0] for line in ax.lines if line.get_markersize() == 10]
        small = [line.get_xydata()[0] for line in ax.lines if line.get_markersize() == 4 and len(line.get_xdata()) == 1]
        paths = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) > 2]
        for algorithm, dot in zip(ALGORITHMS, big, strict=True):
            assert dot == pytest.approx([mean_of(known, algorithm, "kl"), mean_of(known, algorithm, name)], abs=1e-6)
        ends = [[found["kl"].mean(), found[name].mean()] for found in known.values()]
        assert np.array(small) == pytest.approx(np.array(ends), abs=1e-6)
        points = np.mean(curves_of(known, "validation_kl", name), axis=0)
        assert len(paths) == 1 and paths[0] == pytest.approx(points)
        assert [text.get_text() for text in ax.texts if text.get_text()] == ALGORITHMS


def test_the_learning_curves_drawn(drawn, known):
    for ax, name in zip(drawn["learning-curves"].axes, ("gold", "proxy", "kl"), strict=True):
        points = (np.array(curves_of(known, "tokens", name)) / [1000, 1]).tolist()
        (mean,) = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "-"]
        assert mean == pytest.approx(np.mean(points, axis=0))
        (band,) = ax.collections
        for x, values in zip(mean[:, 0], np.array(points)[:, :, 1].T, strict=True):
            drawn_there = [y for at, y in band.get_paths()[0].vertices if at == pytest.approx(x)]
            assert (min(drawn_there), max(drawn_there)) == pytest.approx((values.min(), values.max()))
        level = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
        assert level == pytest.approx([] if name == "kl" else [mean_of(known, a, name) for a in ALGORITHMS[:2]])


def test_the_curve_is_of_this_task(known):
    for found in seeds_of(known, "reinforce"):
        assert [m["iteration"] for m in found["points"]] == [0, 1, 2, 3, 4] and found["points"][0]["tokens"] == 0
