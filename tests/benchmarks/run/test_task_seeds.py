"""Several versions of a task's models: which runs there are, what they share, and that intervals count the models."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.aggregate import differences, methods
from lm_envs.benchmarks.run.compare import compare, write_results
from lm_envs.benchmarks.run.problems import open_problem
from lm_envs.benchmarks.run.results import footnotes, run_folder, table
from lm_envs.benchmarks.run.storage import read_json
from lm_envs.benchmarks.run.suite_files import parse_suite
from lm_envs.benchmarks.run.suites import Plan, Suite, TaskSettings
from lm_envs.tasks import load, reviews_build
from tests.benchmarks.fake_task import NAME
from tests.benchmarks.run.test_results import result

PLAN = Plan(iterations=1, test_prompts=8, validation_prompts=8)
SUITE = Suite("s", (TaskSettings(NAME),), ("sft", "reinforce"), (0, 3), PLAN, {"reinforce": {"episodes": 8}})
SMALL = dict(
    seed=5, reviews=300, train_prompts=60, validation_prompts=20, test_prompts=20, max_new_tokens=5, hidden=8, layers=1,
    heads=2, sft_steps=3, sft_batch=8, pairs=12, held_out_pairs=6, rm_hidden=4, rm_layers=1, rm_heads=1, rm_steps=4,
    rm_batch=9,
)  # fmt: skip


def test_runs_of_several_versions():
    runs = replace(SUITE, task_seeds=2).runs()
    labels = [run.label.split("/", 1)[1] for run in runs]
    assert labels[:4] == ["sft/seed-0", "reinforce/seed-0", "sft/seed-3", "reinforce/seed-3"]
    assert labels[4:] == [f"{label}-task-1" for label in labels[:4]]
    assert "task_seed" not in runs[0].to_json() and runs[4].to_json()["task_seed"] == 1
    control = replace(SUITE, tasks=(TaskSettings("CartPole-v1"),), task_seeds=2)
    assert len(control.runs()) == 4  # it has no models
    text = 'tasks = ["reviews"]\nalgorithms = ["ppo"]\ntask_seeds = 3\n'
    assert [run.task_seed for run in parse_suite(text, "s.toml").runs()] == [0, 1, 2]
    with pytest.raises(UserError, match="s.toml, line 3"):
        parse_suite(text.replace("= 3", "= 0"), "s.toml")


@pytest.mark.slow
def test_a_comparison_over_versions(tmp_path):
    suite = replace(SUITE, task_seeds=2)
    rows = compare(suite, tmp_path)
    assert len(rows) == 8 and [row.get("task_seed", 0) for row in rows] == 2 * [0, 0, 1, 1]
    assert all(read_json(tmp_path / run_folder(row) / "result.json") == row for row in rows)
    gold = {run_folder(row).split("/", 1)[1]: row["sft_gold"] for row in rows}
    assert gold["sft/seed-0"] == gold["reinforce/seed-3"] != gold["sft/seed-0-task-1"]  # each has its version's SFT
    with open(tmp_path / "results.csv") as file:
        assert {line["task_seed"] for line in csv.DictReader(file)} == {"", "1"}
    with open(tmp_path / "aggregate.csv") as file:
        counts = {line["statistic"]: line["counts"] for line in csv.DictReader(file)}
    assert counts["gold"] == counts["gold_difference"] == "models and seeds and prompts"
    (note,) = [note for note in footnotes(table(rows)) if note.startswith("The task's models")]
    assert "2 versions" in note
    # resumed, nothing is run again
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert compare(suite, tmp_path, resume=True) == rows == write_results(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    alone = table([row for row in rows if "task_seed" not in row])
    assert any(
        "other models of the task (SFT, reward model): there is one version" in note for note in footnotes(alone)
    )


def test_methods_are_paired_by_version_and_seed():
    rows = []
    for name, gain in (("sft", 0.0), ("ppo", 1.0)):
        for task_seed, level in ((0, 0.0), (1, 50.0), (2, 90.0)):
            for seed in (0, 1):
                golds = (level + gain + seed + np.arange(4.0)).tolist()
                found = result(name, seed, float(np.mean(golds)), 1.0, [1.0] * 4) | {"golds": golds}
                rows.append(found | ({"task_seed": task_seed} if task_seed else {}))
    (by_name,) = methods(rows[:6] + rows[6:][::-1]).values()  # in another order
    (pair,) = differences(by_name)
    assert pair.estimate.value == pytest.approx(-1.0) and pair.estimate.error == pytest.approx(0.0)
    assert pair.estimate.layers == ("models", "seeds", "prompts")


def test_a_task_of_one_version_is_refused():
    run = replace(SUITE, tasks=(TaskSettings("enumerable"),), task_seeds=2).runs()[-1]
    with pytest.raises(UserError, match="'enumerable' has one version of its models"):
        open_problem(run)


@pytest.mark.slow
def test_versions_of_reviews_share_their_prompts_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
    reviews_build.build(tmp_path / "small", **SMALL)
    built = []
    mine = reviews_build.build
    monkeypatch.setattr(reviews_build, "build", lambda *given, **more: (built.append(given[1]), mine(*given, **more)))
    own, first, second = (load("reviews", path=str(tmp_path / "small"), task_seed=seed) for seed in (0, 1, 2))
    assert built == [1, 2]  # the first is in the folder
    assert own.prompts == first.prompts == second.prompts and own.demonstrations == first.demonstrations
    weights = [next(task.reference.parameters()) for task in (own, first, second)]
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))
    assert own.pairs != first.pairs != second.pairs
    load.__globals__["_loaded"].clear()
    again = load("reviews", path=str(tmp_path / "small"), task_seed=1)
    assert built == [1, 2] and torch.equal(next(again.reference.parameters()), weights[1])  # from the cache
