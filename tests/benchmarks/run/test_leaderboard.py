"""leaderboard.json against results written by hand, and the page that shows it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from lm_envs.benchmarks.report.html import write_report
from lm_envs.benchmarks.run.compare import write_results
from lm_envs.benchmarks.run.storage import write_sealed
from tests.benchmarks.run.test_results import result, write
from tests.house import CHECKOUT


@pytest.fixture
def held(tmp_path) -> dict:
    golds = {"sft": [0.0, 0.1, 0.0, 0.1], "ppo": [0.9, 1.0, 0.9, 1.0], "rloo": [1.0, 0.9, 1.0, 0.95]}
    rows = [
        result(name, seed, gold, 3.0 + seed, [1.0, 0.0, 1.0], golds=[gold] * 3, prompts=3, regret=1 - gold)
        for name, found in golds.items()
        for seed, gold in enumerate(found)
    ]
    write(tmp_path, rows)
    write_sealed(tmp_path / "comparison.json", {"name": "mine", "description": "About it"})
    write_report(tmp_path, write_results(tmp_path))
    return json.loads((tmp_path / "leaderboard.json").read_text())


def test_methods_are_in_order_with_intervals(held):
    (task,) = held["tasks"]
    assert (held["suite"], held["description"], task["task"], task["prompts"]) == ("mine", "About it", "reviews", 3)
    best, second, last = task["methods"]
    assert [row["method"] for row in task["methods"]] == ["rloo", "ppo", "sft"]
    assert [row["not_told_from_the_best"] for row in task["methods"]] == [True, True, False]
    assert best["seeds"] == [0, 1, 2, 3] and best["kl"] == pytest.approx(4.5)
    value, low, high = best["gold"]
    spread = np.std([1.0, 0.9, 1.0, 0.95], ddof=1) / 2
    ends = value - 3.182 * spread, value + 3.182 * spread  # Student's t, 3 degrees of freedom
    assert value == pytest.approx(0.9625) and (low, high) == pytest.approx(ends, rel=1e-3)
    assert best["win_rate"][0] == pytest.approx(2 / 3) and 0 <= best["win_rate"][1] < best["win_rate"][2] <= 1
    assert best["score"][0] == pytest.approx(0.9625) and last["score"][0] == pytest.approx(0.05)
    assert second["tokens_generated"] == 12345


def test_the_page_shows_what_is_committed(held, tmp_path):
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1] + '/docs/site'); import hooks\n"
        "hooks.ROOT = pathlib.Path(sys.argv[2]); print(hooks.leaderboard())"
    )
    folder = tmp_path / "benchmarks" / "results" / "leaderboard"
    folder.mkdir(parents=True)
    (folder / "mine.json").write_text(json.dumps(held | {"versions": {"torch": "2"}}))
    pytest.importorskip("mkdocs")
    said = subprocess.run(
        [sys.executable, "-c", program, str(CHECKOUT), str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "## mine: reviews" in said and "About it. 3 test prompts. torch 2." in said
    assert "| **rloo** | 4 | 0.96" in said and "| sft | 4 | 0.050 [" in said and "| 12,345 |" in said
