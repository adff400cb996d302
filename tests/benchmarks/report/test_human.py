"""People's win-rates beside the judge's, recomputed from the samples and from what each annotator said."""

from __future__ import annotations

import csv
import json
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.report.human import add_people, correlation, spearman
from lm_envs.benchmarks.report.plots import people
from lm_envs.benchmarks.report.series import Series, styles
from lm_envs.benchmarks.run.compare import write_results
from lm_envs.benchmarks.run.results import COLUMNS
from lm_envs.feedback.annotators import Annotator, work
from lm_envs.feedback.store import Store
from lm_envs.feedback.study import read_settings
from tests.benchmarks.test_recomputed import N, runs  # noqa: F401 - a fixture is found by its name

pytest.importorskip("krippendorff")


def by_length(item: Any) -> list[float]:
    return [float(len(response.text)) for response in item.responses]


@pytest.mark.parametrize("mode", ["pair", "rank"])
def test_people_s_win_rates_are_their_answers(runs: Any, tmp_path: Path, mode: str, capsys: Any) -> None:  # noqa: F811
    out = runs[0]
    study = tmp_path / "study"
    options = ["--mode", mode, "--overlap", "2", "--limit", "40"]
    main(["people", "new", "--out", str(study), "--comparison", str(out), *options])
    store = Store(study, read_settings(study))
    work(store, "likes long texts", Annotator(by_length, temperature=0))
    work(store, "likes short texts", Annotator(lambda item: [-x for x in by_length(item)], temperature=0, flip=0.5))
    rows = write_results(out)
    before = (out / "results.csv").read_bytes()
    if mode == "rank":
        main(["report", str(out), "--people", str(study)])
        assert (out / "results.csv").read_bytes() == before
        assert "people's win-rate %" in unescape((out / "report.html").read_text())
        assert len(list((out / "plots").glob("*-people.png"))) == 1
        assert "people's win-rate %" in capsys.readouterr().out
    else:
        add_people(out, rows, store.judgments())
    told = {row["algorithm"]: row for row in csv.DictReader((out / "people.csv").open())}
    assert set(told) == {f"best-of-{N}", "reinforce"}
    for name in told:
        per_prompt: dict[str, list[float]] = {}
        for judgment in store.judgments():
            ranks = {r.source: rank for r, rank in zip(judgment.content.responses, judgment.answer.ranks, strict=True)}
            if {name, "sft"} <= set(ranks):
                result = 0.5 + 0.5 * np.sign(ranks["sft"] - ranks[name])
                per_prompt.setdefault(str(judgment.content.prompt), []).append(result)
        means = [np.mean(results) for results in per_prompt.values()]
        assert len(means) > 5
        assert float(told[name]["human_win_rate"]) == pytest.approx(np.mean(means))
        assert float(told[name]["human_win_rate_se"]) == pytest.approx(np.std(means, ddof=1) / len(means) ** 0.5)


def test_a_study_of_something_else_is_refused(runs: Any, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    rows = tmp_path / "t.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "sources": ["sft", "reinforce"]}) + "\n")
    study = tmp_path / "study"
    main(["people", "new", "--out", str(study), "--texts", str(rows)])
    work(Store(study, read_settings(study)), "ann", Annotator(by_length))
    with pytest.raises(SystemExit):
        main(["report", str(runs[0]), "--people", str(study)])
    assert "no method of" in capsys.readouterr().err


def test_the_bars_of_people_are_upright_and_those_of_the_judge_lie() -> None:
    """Two standard errors to each side, of 4 outcomes by people and 16 by the judge."""
    human, wins = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0] * 8
    unknown = dict.fromkeys(COLUMNS, 0.0) | {"task": "t", "algorithm": "ppo", "seed": 0}
    result = unknown | {"win_rate": 0.5, "wins": wins, "human": human}
    series = [Series("t", "ppo", (result,), Path())]
    figure = people(series, styles(series))
    assert figure is not None
    (ax,) = figure.axes
    bars = [bar.get_segments()[0] for bar in ax.collections]
    lies = next(bar for bar in bars if bar[0, 1] == bar[1, 1])
    upright = next(bar for bar in bars if bar[0, 0] == bar[1, 0])
    for bar, axis, outcomes in ((lies, 0, wins), (upright, 1, human)):
        error = np.std(outcomes, ddof=1) / len(outcomes) ** 0.5
        mean = np.mean(outcomes)
        assert bar[:, axis] == pytest.approx([100 * (mean - 2 * error), 100 * (mean + 2 * error)])
        assert bar[0, 1 - axis] == pytest.approx(100 * np.mean(human if axis == 0 else wins))


def test_rank_correlation_is_scipys_and_its_interval_is_wide_where_methods_are_alike() -> None:
    draws = np.random.default_rng(0)
    for _ in range(20):
        a, b = draws.integers(0, 4, size=(2, 7)).astype(float)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)

    def series(rates: list[float], human: list[float]) -> list[Series]:
        made = []
        for k, (rate, other) in enumerate(zip(rates, human, strict=True)):
            outcomes = [(draws.random(300) < p).astype(float).tolist() for p in (rate, other)]
            outcomes[1][k] = float("nan")  # not compared
            result = {"task": "t", "algorithm": f"m{k}", "seed": 0, "wins": outcomes[0], "human": outcomes[1]}
            made.append(Series("t", f"m{k}", (result,), Path()))
        return made

    apart = correlation(series([0.1, 0.3, 0.5, 0.7, 0.9], [0.1, 0.3, 0.5, 0.7, 0.9]))
    reverse = correlation(series([0.1, 0.3, 0.5, 0.7, 0.9], [0.9, 0.7, 0.5, 0.3, 0.1]))
    alike = correlation(series([0.5] * 5, [0.5] * 5))
    assert apart is not None and reverse is not None and alike is not None
    assert apart.value == pytest.approx(1) and apart.low > 0.8 and apart.count == 5
    assert reverse.value == pytest.approx(-1) and alike.high - alike.low > 0.8
    assert correlation(series([0.1, 0.9], [0.1, 0.9])) is None


def method(number: int, wins: list[float], human: list[float]) -> Series:
    """A method of one seed, by what the judge and people said of each prompt."""
    row = {"task": "t", "algorithm": f"m{number}", "seed": 0, "wins": wins, "human": human}
    return Series("t", f"m{number}", (row,), Path())


def test_the_interval_keeps_together_what_people_and_the_judge_said_of_a_prompt() -> None:
    """People who say what the judge says have its order in each resample, however near the methods are."""
    wins = (np.random.default_rng(0).random((6, 100)) < 0.5).astype(float).tolist()
    found = correlation([method(k, row, row) for k, row in enumerate(wins)])
    assert found is not None and (found.value, found.low, found.high) == pytest.approx((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4, 5, 6), (1, 0, 3, 2, 5, 4, 6), (2, 5, 0, 6, 1, 3, 4), (6, 5, 4, 3, 2, 1, 0)]
)
@pytest.mark.parametrize("apart", [0.02, 0.05])
def test_intervals_of_the_rank_correlation_cover_the_true_one(
    order: tuple[int, ...], apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Studies of 86 of 512 prompts, as in docs/people.md; people and the judge see the same responses."""
    monkeypatch.setattr("lm_envs.benchmarks.report.human.RESAMPLES", 200)
    draws, covered = np.random.default_rng(0), []
    rates = 0.55 + apart * np.arange(7)
    true = spearman(rates, rates[list(order)])
    for _ in range(60):
        hard, luck = draws.normal(size=512), draws.normal(size=(7, 512))
        wins = hard + luck < 2**0.5 * stats.norm.ppf(rates)[:, None]
        other = hard + 0.8 * luck + 0.6 * draws.normal(size=(7, 512))
        human = np.where(np.arange(512) < 86, other < 2**0.5 * stats.norm.ppf(rates[list(order)])[:, None], np.nan)
        rows = zip(wins.astype(float).tolist(), human.tolist(), strict=True)
        found = correlation([method(k, *row) for k, row in enumerate(rows)])
        assert found is not None
        covered.append(found.low - 1e-9 <= true <= found.high + 1e-9)
    print(f"true {true:.2f}, {100 * apart:.0f} points apart: {np.mean(covered):.2f} of the intervals cover it")
    assert np.mean(covered) > 0.75
