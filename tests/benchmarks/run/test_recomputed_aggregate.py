"""Every line of ``aggregate.csv`` is computed here a second time, from the results by plain loops, scipy's optimizers
and its integrals."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from lm_envs.benchmarks.measure.statistics import crossed_mean
from lm_envs.benchmarks.report.html import headline
from lm_envs.benchmarks.run.aggregate import ALARM, differences, knows_optimum, lead, methods, write_aggregate
from lm_envs.benchmarks.run.matched import at_kl
from lm_envs.benchmarks.run.results import interval, table
from tests.benchmarks.run.test_results import folder_of, result

PROMPTS, KLS = 9, (1.0, 4.0, 30.0)
SEEDS = {"sft": (0, 1, 2, 3), "ppo": (0, 1, 2, 3), "rloo": (1, 2, 3), "best-of-4": (0,)}
UNIT = {"reviews": 2.0, "custom": 0.5}  # standard deviation of SFT's gold


def made() -> list[dict]:
    """Two tasks with a judge, one of them with a bandit env too, and one that is solved exactly."""
    draws, found = np.random.default_rng(3), []
    hard = draws.normal(size=PROMPTS)
    names = [("reviews", name, seeds) for name, seeds in SEEDS.items()] + [("reviews-bandit", "ppo", (0, 1))]
    names += [("custom", name, seeds) for name, seeds in (("rloo", (1,)), ("ppo", SEEDS["ppo"]), ("sft", SEEDS["sft"]))]
    for k, (task, name, seeds) in enumerate(names):
        for seed in seeds:
            golds = hard + 0.4 * draws.normal(size=PROMPTS) + 0.3 * draws.normal() + (name == "ppo") * (1 + k % 2)
            wins = np.sign(golds - hard) / 2 + 0.5
            wins[seed] = 0.5
            gaps = draws.integers(-4, 5, PROMPTS) + 3 * (golds > 1)
            base = task.removesuffix("-bandit")
            row = result(name, seed, float(golds.mean()), 2.0 + seed, wins.tolist(), task=task, prompts=PROMPTS)
            row |= {"golds": golds.tolist(), "length_gaps": gaps.tolist(), "proxy": float(10 - golds.mean())}
            found.append(row | {"sft_gold": 0.1 * len(base), "sft_gold_sd": UNIT[base]})
    for name in ("sft", "ppo", "rloo"):
        for seed in (0, 1, 2):
            regret = 1.0 if name == "sft" else float(draws.random() * (0.2 if name == "ppo" else 1.4))
            regret -= (name, seed) == ("ppo", 0)  # more than the optimum does not count as less of a gap
            found.append(result(name, seed, 0.3 + 0.1 * seed - regret, 1.0, [0.5], task="enumerable", regret=regret))
    for row in found:
        if row["task"] == "enumerable":
            row |= {"wins": [], "win_rate": 0.5 + row["gold"] / 9, "sft_gold": 0.0, "sft_gold_sd": None}
    return found


def curve_of(row: dict) -> list[dict]:
    """A learning curve that rises, and falls back at its end; without outcomes of each prompt on "custom"."""
    draws, found = np.random.default_rng(100 + row["seed"]), []
    for i, kl in enumerate((0.0, 2.0, 5.0 + row["seed"], 3.0)):
        golds, wins = draws.normal(size=5).tolist(), draws.integers(0, 3, 5) / 2
        point = {"iteration": i, "validation_kl": kl, "validation_gold": float(np.mean(golds))}
        point |= {"validation_win_rate": float(wins.mean())}
        if row["task"] == "reviews":
            point |= {"validation_golds": golds, "validation_wins": wins.tolist()}
        found.append(point)
    return found


def crossed(x: np.ndarray) -> dict[str, float | str]:
    """The mean of ``(seeds, prompts)`` with its 95 % interval; p-values are in :func:`p_of`."""
    s, p = x.shape
    if 1 in x.shape:
        layer = "prompts" if s == 1 else "seeds"
        if x.size == 1:
            return {"value": x.mean(), "low": math.nan, "high": math.nan, "counts": ""}
        low, high = stats.t.interval(0.95, x.size - 1, x.mean(), stats.sem(x.ravel()))
        return {"value": x.mean(), "low": low, "high": high, "counts": layer}
    squares, mean = [0.0, 0.0, 0.0], x.mean()
    for i, j in itertools.product(range(s), range(p)):
        squares[0] += (x[i].mean() - mean) ** 2
        squares[1] += (x[:, j].mean() - mean) ** 2
        squares[2] += (x[i, j] - x[i].mean() - x[:, j].mean() + mean) ** 2
    freedom = (s - 1, p - 1, (s - 1) * (p - 1))
    a, b, c = (square / df / (s * p) for square, df in zip(squares, freedom, strict=True))
    variance = max(a + b - c, 0)
    degrees = variance**2 / (a**2 / freedom[0] + b**2 / freedom[1] + c**2 / freedom[2])
    variance, degrees = max((variance, degrees), (a, freedom[0]), (b, freedom[1]))
    half = stats.t.ppf(0.975, degrees) * math.sqrt(variance)
    return {"value": mean, "low": mean - half, "high": mean + half, "counts": "seeds and prompts"}


def p_of(x: np.ndarray) -> float:
    """The variance of what there is less of has a fiducial distribution, what the other one adds is known."""
    s, p = x.shape
    if x.size == 1:
        return math.nan
    if 1 in x.shape:
        return float(stats.ttest_1samp(x.ravel(), 0).pvalue)
    a, b = x.mean(axis=1).var(ddof=1) / s, x.mean(axis=0).var(ddof=1) / p
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0) + x.mean()
    c = (rest**2).sum() / ((s - 1) * (p - 1)) / x.size
    few, other, df = (a, b, s - 1) if s <= p else (b, a, p - 1)
    df, known, mean = min(s, p) - 1, max(other - c, 0), abs(x.mean())

    def tail(u: float) -> float:
        return 2 * special.ndtr(-mean / math.sqrt(few * df / special.chdtri(df, u) + known))

    return float(integrate.quad(tail, 0, 1, limit=200)[0])


def length_controlled(wins: np.ndarray, gaps: np.ndarray) -> dict[str, float | str]:
    x, y = np.tanh(gaps.ravel() / gaps.std()), wins.ravel()

    def loss(w: np.ndarray) -> float:
        z = w[0] + w[1] * x
        return float((np.logaddexp(0, z) - y * z).sum() + 0.05 * w @ w)

    w = optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    value, rate = special.expit(w[0]), special.expit(w[0] + w[1] * x)
    design = np.stack([np.ones_like(x), x], axis=1)
    inverse = np.linalg.inv(
        sum(r * (1 - r) * np.outer(d, d) for r, d in zip(rate, design, strict=True)) + 0.1 * np.eye(2)
    )
    influence = [x.size * (inverse @ d)[0] * (o - r) for d, o, r in zip(design, y, rate, strict=True)]
    found = crossed((value * (1 - value) * np.array(influence)).reshape(wins.shape))
    shift = value - found["value"]
    return found | {"value": value, "low": found["low"] + shift, "high": found["high"] + shift}


def bootstrap(by_task: list[list[float]], statistic: Callable[[np.ndarray], float]) -> dict[str, float | str]:
    value, counts = statistic(np.concatenate(by_task)), [len(scores) for scores in by_task]
    if min(counts) < 2:
        return {"value": value, "low": math.nan, "high": math.nan, "counts": ""}
    draws = np.random.default_rng(0)
    parts = [np.array(scores)[draws.integers(n, size=(2000, n - 1))] for n, scores in zip(counts, by_task, strict=True)]
    error = np.std([statistic(row) for row in np.concatenate(parts, axis=1)], ddof=1)
    half = stats.t.ppf(0.975, sum(counts) - len(counts)) * error
    return {"value": value, "low": value - half, "high": value + half, "counts": "seeds"}


def middle_half(scores: np.ndarray) -> float:
    cut = int(0.25 * len(scores))
    return float(np.mean(sorted(scores)[cut : len(scores) - cut]))


def better(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Mann and Whitney's U over the number of pairs, and where Newcombe's variance puts it on the interval's end."""
    m, n = len(x), len(y)
    u = sum((a > b) + 0.5 * (a == b) for a in x for b in y) / (m * n)

    t = np.linspace(0, 1, 20_001)
    variance = t * (1 - t) / (m * n) * (1 + ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t)))
    inside = t[abs(t - u) <= 1.959964 * np.sqrt(variance)]
    return u, min(u, inside.min()), max(u, inside.max())


def improvement(pairs: list[tuple[list[float], list[float]]]) -> dict[str, float | str]:
    found = [better(x, y) for x, y in pairs]
    mean = np.mean([value for value, *_ in found])
    low, high = (math.sqrt(sum((f[0] - f[k]) ** 2 for f in found)) / len(found) for k in (1, 2))
    return {"value": mean, "low": mean - low, "high": mean + high, "counts": "seeds"}


def grouped(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    found: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        base = row["task"].removesuffix("-bandit")
        name = row["algorithm"] + " (bandit)" * (base != row["task"])
        found.setdefault(base, {}).setdefault(name, []).append(row)
    return found


def per_prompt(rows: list[dict], name: str) -> np.ndarray:
    lists = [row[{"win_rate": "wins", "gold": "golds"}[name]] if row["wins"] else [row[name]] for row in rows]
    return np.array(lists, dtype=float)


def scores(rows: list[dict]) -> list[float]:
    if rows[0]["task"] == "enumerable":
        return [1 - row["regret"] for row in rows]
    return [(row["gold"] - row["sft_gold"]) / row["sft_gold_sd"] for row in rows]


def read_off(rows: list[dict], kl: float) -> dict[str, np.ndarray]:
    """Per run that got there, its outcomes where the root of the KL first is that of ``kl``."""
    found: dict[str, list] = {"gold": [], "win_rate": []}
    for row in rows:
        points = curve_of(row) if row["algorithm"] in ("ppo", "rloo") and row["task"] in UNIT else []
        for one, two in itertools.pairwise(points):
            x, y = one["validation_kl"], two["validation_kl"]
            if x <= kl <= y:
                w = (math.sqrt(kl) - math.sqrt(x)) / (math.sqrt(y) - math.sqrt(x))
                for name, each in found.items():
                    many = {"gold": "validation_golds", "win_rate": "validation_wins"}[name]
                    at = [np.array(p.get(many, [p[f"validation_{name}"]])) for p in (one, two)]
                    each.append(at[0] + w * (at[1] - at[0]))
                break
    return {name: np.array(each) for name, each in found.items()}


def holm(p_values: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Holm's weighted procedure: pairs with SFT share one half of the 5 %, where there are others."""
    of_sft = {pair: "sft" in pair for pair in p_values}
    kinds = len(set(of_sft.values()))
    weight = {pair: 1 / kinds / list(of_sft.values()).count(of_sft[pair]) for pair in p_values}
    left = [pair for pair in p_values if not math.isnan(p_values[pair])]
    found, least = dict.fromkeys(p_values, math.nan), 0.0
    while left:
        share = {pair: p_values[pair] / weight[pair] for pair in left}
        first = min(share, key=lambda pair: share[pair])
        found[first] = least = max(least, min(1.0, share[first] * sum(weight[pair] for pair in left)))
        left.remove(first)
    return found


def expected(rows: list[dict]) -> list[dict]:
    found: list[dict] = []

    def line(task: str, method: str, against: str, statistic: str, of: dict, mine: list[dict], **more) -> None:
        known = {"p": math.nan, "seeds": len({row["seed"] for row in mine}), "prompts": mine[0].get("prompts")}
        found.append({"task": task, "method": method, "against": against, "statistic": statistic} | of | known | more)

    def aggregates(task: str, method: str, by_task: list[list[dict]]) -> None:
        mine, every = [scores(each) for each in by_task], [row for each in by_task for row in each]
        line(task, method, "", "score", bootstrap(mine, lambda x: float(np.mean(x))), every)
        line(task, method, "", "score_iqm", bootstrap(mine, middle_half), every)
        if every[0]["task"] == "enumerable":
            gap = bootstrap(mine, lambda x: float(np.mean(np.clip(1 - x, 0, None))))
            line(task, method, "", "optimality_gap", gap, every)

    tasks = grouped(rows)
    for task, by_name in tasks.items():
        for name, mine in by_name.items():
            line(task, name, "", "win_rate", crossed(per_prompt(mine, "win_rate")), mine)
            line(task, name, "", "gold", crossed(per_prompt(mine, "gold")), mine)
            if mine[0]["wins"]:
                gaps = np.array([row["length_gaps"] for row in mine], dtype=float)
                controlled = length_controlled(per_prompt(mine, "win_rate"), gaps)
                line(task, name, "", "win_rate_length_controlled", controlled, mine)
            aggregates(task, name, [mine])
            for kl in KLS:
                for measure, values in read_off(mine, kl).items():
                    if len(values):
                        told = {"seeds": len(values), "prompts": None}
                        line(task, name, "", f"{measure}_at_kl_{kl:g}", crossed(values), mine, **told)
        pairs = []
        for a, b in itertools.combinations(by_name, 2):
            seeds = [row["seed"] for row in by_name[a] if row["seed"] in [r["seed"] for r in by_name[b]]]
            sides = [[next(r for r in by_name[name] if r["seed"] == seed) for seed in seeds] for name in (a, b)]
            pairs.append((a, b, per_prompt(sides[0], "gold") - per_prompt(sides[1], "gold") if seeds else None))
        adjusted = holm({(a, b): math.nan if x is None else p_of(x) for a, b, x in pairs})
        for a, b, x in pairs:
            if x is not None:
                line(task, a, b, "gold_difference", crossed(x), by_name[a], p=adjusted[a, b])
            chance = improvement([(scores(by_name[a]), scores(by_name[b]))])
            line(task, a, b, "probability_of_improvement", chance, by_name[a])
    units = {task for task in tasks if task != "enumerable"}
    if len(tasks) > 1 and (set(tasks) == units):
        common = [name for name in tasks["reviews"] if name in tasks["custom"]]
        for name in common:
            aggregates("all", name, [by_name[name] for by_name in tasks.values()])
        for a, b in itertools.combinations(common, 2):
            chance = improvement([(scores(by_name[a]), scores(by_name[b])) for by_name in tasks.values()])
            every = [row for by_name in tasks.values() for row in by_name[a]]
            line("all", a, b, "probability_of_improvement", chance, every)
    for each in found:
        if each["statistic"].startswith("win_rate"):
            each |= {"low": max(each["low"], 0.0), "high": min(each["high"], 1.0)}
    return found


@pytest.mark.parametrize("tasks", [("reviews", "custom"), ("reviews", "enumerable"), ("enumerable",)], ids=str)
def test_every_line(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    rows = [row for row in made() if row["task"].removesuffix("-bandit") in tasks]
    for row in rows:
        if row["algorithm"] in ("ppo", "rloo") and row["task"] in UNIT:
            lines = [*curve_of(row), {"iteration": 99, "kl": 1.0}]
            (folder_of(tmp_path, row) / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_aggregate(rows, tmp_path, KLS)
    with (tmp_path / "aggregate.csv").open() as file:
        found = list(csv.DictReader(file))
    known = expected(rows)
    if "reviews" in tasks:  # the largest KL, although each curve falls back
        ppo = grouped(rows)["reviews"]["ppo"]
        assert {each.furthest for each in at_kl(ppo, tmp_path, KLS)} == {5.0 + max(SEEDS["ppo"])}
    assert [list(row.values())[:4] for row in found] == [list(line.values())[:4] for line in known]
    for row, line in zip(found, known, strict=True):
        name = tuple(row.values())[:4]
        assert (row["seeds"], row["prompts"]) == (str(line["seeds"]), str(line["prompts"] or "")), name
        assert row["counts"] == line["counts"], name
        room = 1e-3 if "probability" in row["statistic"] else 1e-5
        for key in ("value", "low", "high"):
            number = float(row[key] or "nan")
            assert number == pytest.approx(line[key], rel=1e-5, abs=room, nan_ok=True), (name, key)
        assert float(row["p"] or "nan") == pytest.approx(line["p"], rel=5e-3, nan_ok=True), name


def test_what_is_clearly_better_is_said_with_the_differences_of_the_csv(tmp_path: Path) -> None:
    rows = [row for row in made() if row["task"] == "reviews"]
    known = {(line["method"], line["against"]): line for line in expected(rows) if "difference" in line["statistic"]}
    best = max(table(rows), key=lambda line: line.mean["gold"]).algorithm
    found = lead(rows, best)
    assert {each.theirs for each in found} == set(SEEDS) - {best} and all(each.ours == best for each in found)
    clear = {}
    for each in found:
        line = known.get((best, each.theirs)) or known[each.theirs, best]
        sign = 1 if (best, each.theirs) in known else -1
        assert each.estimate.value == pytest.approx(sign * line["value"])
        assert each.clear == (line["p"] < 0.05 == ALARM and sign * line["value"] > 0 and "seeds" in line["counts"])
        clear[each.theirs] = each.clear
    assert set(clear.values()) == {True, False} and not any(each.reversed().clear for each in found)
    text = headline(rows)
    for each in found:
        if each.clear:
            assert f"{each.theirs} by {each.estimate.value:.2f}{interval(each.estimate, 2)}" in text
        else:
            assert each.theirs in text.split("Not told apart from it: ")[1]


def test_seeds_and_prompts_may_change_places() -> None:
    """There may be more seeds than prompts, or other rows than seeds."""
    x = np.random.default_rng(0).normal(0.4, 1, (3, 7)) + np.arange(7) / 7
    for each in (x, x.T):
        found = crossed_mean(each, "models")
        assert found.p == pytest.approx(p_of(each), rel=2e-3) and found.layers == ("models", "prompts")
    assert crossed_mean(x[:, :1], "models").layers == ("models",)
    assert not knows_optimum([{"regret": 0.1}, {"regret": None}])


def test_methods_are_compared_by_gold_where_any_of_them_has_one() -> None:
    rows = [row for row in made() if row["task"] == "custom"]
    (by_name,) = methods(rows).values()
    assert {each.measure for each in differences(by_name)} == {"gold"}
    unknown = {name: [row | {"gold": None, "golds": []} for row in mine] for name, mine in by_name.items()}
    assert {each.measure for each in differences({**unknown, "ppo": by_name["ppo"]})} == {"gold"}
    for each in differences(unknown):
        pairs = [{row["seed"]: row["proxy"] for row in unknown[name]} for name in (each.ours, each.theirs)]
        apart = [pairs[0][seed] - pairs[1][seed] for seed in pairs[0] if seed in pairs[1]]
        assert each.measure == "proxy"
        assert each.estimate.value == pytest.approx(np.mean(apart) if apart else math.nan, nan_ok=True)
