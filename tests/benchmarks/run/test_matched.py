"""Methods at the same KL, from curves written by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.report.html import write_report
from lm_envs.benchmarks.run.aggregate import facts, write_aggregate
from lm_envs.benchmarks.run.compare import write_results
from lm_envs.benchmarks.run.matched import at_kl
from lm_envs.benchmarks.run.storage import write_sealed
from lm_envs.benchmarks.run.suite_files import parse_suite
from tests.benchmarks.run.test_results import folder_of, result, write


def curve(out: Path, row: dict, kls: list[float], golds: list[list[float]]) -> None:
    wins = [[float(gold > 0) for gold in each] for each in golds]
    points = [
        {"iteration": i, "validation_kl": kl, "validation_golds": g, "validation_wins": w, "validation_gold": g[0]}
        for i, (kl, g, w) in enumerate(zip(kls, golds, wins, strict=True))
    ]
    lines = [*points, {"iteration": 99, "kl": 1e3}]  # an iteration without a validation
    (folder_of(out, row) / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in lines))


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    made = [result("ppo", seed, 0.5, 9.0, [1.0, 0.0]) for seed in (0, 1)] + [result("sft", 0, 0.0, 0.0, [0.5, 0.5])]
    write(tmp_path, made, curve=False)
    curve(tmp_path, made[0], [0.0, 1.0, 9.0, 4.0, 16.0], [[0.0, 0.0], [1.0, 3.0], [3.0, 7.0], [9.0, 9.0], [5.0, 5.0]])
    curve(tmp_path, made[1], [0.0, 4.0], [[0.0, 0.0], [2.0, 2.0]])
    return made


def test_a_curve_is_read_off_where_it_first_gets_there(tmp_path, rows):
    """The root of 4 is halfway between those of 1 and 9; later the curve comes back to 4, which does not count."""
    found = at_kl(rows[:2], tmp_path, [4.0, 16.0, 20.0])
    assert [(each.reached, each.runs, each.furthest) for each in found] == [(2, 2, 16.0), (1, 2, 16.0), (0, 2, 16.0)]
    assert found[0].gold.value == pytest.approx((2 + 5 + 2 + 2) / 4)
    assert found[0].gold.layers == ("seeds", "prompts") and found[0].win_rate.value == 1.0
    assert found[1].gold.value == 5.0 and found[1].gold.layers == ("prompts",)
    assert math.isnan(found[2].gold.value)
    assert math.isnan(at_kl(rows[2:], tmp_path, [1.0])[0].furthest)


def test_the_csv_and_the_report_say_who_got_there(tmp_path, rows):
    write_sealed(tmp_path / "comparison.json", {"name": "x", "match_kl": [4.0, 16.0, 20.0]})
    write_report(tmp_path, write_results(tmp_path))
    lines = {(row["method"], row["statistic"]): row for row in csv.DictReader((tmp_path / "aggregate.csv").open())}
    assert lines["ppo", "gold_at_kl_4"]["value"] == "2.75" and lines["ppo", "gold_at_kl_4"]["seeds"] == "2"
    assert lines["ppo", "win_rate"]["low"] == "0" and lines["ppo", "win_rate"]["high"] == "1"  # not beyond
    assert lines["ppo", "gold_at_kl_16"]["seeds"] == "1" and ("ppo", "gold_at_kl_20") not in lines
    assert ("sft", "gold_at_kl_4") not in lines
    page = (tmp_path / "report.html").read_text()
    assert "At the same KL" in page and "gold at 4 nats" in page
    assert "(1 of 2 seeds)" in page and "never (KL 16.0)" in page
    write_aggregate(rows, tmp_path)
    assert "at_kl" not in (tmp_path / "aggregate.csv").read_text()


def test_a_suite_names_the_kls():
    text = 'tasks = ["reviews"]\nalgorithms = ["ppo"]\n[match]\nkl = '
    assert parse_suite(text + "[2, 5.5]", "s.toml").match_kl == (2, 5.5)
    with pytest.raises(UserError, match="line 4"):
        parse_suite(text + "[-1]", "s.toml")


def test_seeds_of_several_tasks_count_once(tmp_path):
    rows = [
        result("ppo", seed, 0.5 + seed, 9.0, [1.0, 0.0], task=task, sft_gold=0.0, sft_gold_sd=2.0)
        for task in ("reviews", "translation")
        for seed in (0, 1, 2)
    ]
    (score,) = [line for line in facts(rows, tmp_path) if (line["task"], line["statistic"]) == ("all", "score")]
    assert score["seeds"] == 3 and score["value"] == pytest.approx(0.75)
