"""Budgets other than iterations: where a run ends, its step size, and that a stopped run ends there too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_envs.benchmarks.errors import Interrupted, UserError
from lm_envs.benchmarks.run.one_run import execute
from lm_envs.benchmarks.run.storage import Records
from lm_envs.benchmarks.run.suite_files import parse_suite
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests.benchmarks.fake_task import NAME

EPISODES = 8


def spec(algorithm: str = "reinforce", **budget: float) -> RunSpec:
    plan = Plan(test_prompts=4, validation_prompts=4, checkpoint_every=2, **budget)  # type: ignore[arg-type]
    overrides = {"episodes": EPISODES, "learning_rate": 1e-2} if algorithm == "reinforce" else {"pairs": 8}
    return RunSpec(NAME, algorithm, 0, plan, overrides=overrides)


def lines(out: Path, run: RunSpec) -> list[dict]:
    return Records(out / run.label / "metrics.jsonl").read()[1:]


@pytest.mark.parametrize(
    ("name", "amount", "column"),
    [("tokens", 150, "tokens"), ("total_tokens", 900, "all"), ("reward_calls", 3 * EPISODES - 1, "reward_calls")],
)
def test_a_run_ends_with_the_iteration_that_reaches_its_budget(tmp_path, name, amount, column):
    run = spec(**{name: amount})
    execute(run, tmp_path)
    found = [{**each, "all": each["tokens"] + each["scored_tokens"]} for each in lines(tmp_path, run)]
    assert found[-1][column] >= amount > found[-2][column]
    before = [0, *(each[column] for each in found[:-1])]
    assert [each["learning_rate"] for each in found] == pytest.approx([1e-2 * (1 - x / amount) for x in before])
    assert "validation_gold" in found[-1] and not list((tmp_path / run.label / "checkpoints").iterdir())
    stop = iter([True])
    again = tmp_path / "again"
    with pytest.raises(Interrupted):
        execute(run, again, should_stop=lambda: next(stop))
    execute(run, again)
    assert [each["kl"] for each in lines(again, run)] == [each["kl"] for each in found]


def test_flops_count_the_trained_parameters_and_tokens(tmp_path):
    run = spec(flops=1e6)
    execute(run, tmp_path)
    weights = json.loads((tmp_path / run.label / "config.json").read_text())["trainable_parameters"]
    found = [6 * weights * each["trained_tokens"] for each in lines(tmp_path, run)]
    assert found[-1] >= 1e6 and all(each < 1e6 for each in found[:-1])


def test_seconds_end_a_run(tmp_path):
    run = spec(seconds=1e-9)
    execute(run, tmp_path)
    assert len(lines(tmp_path, run)) == 1


def test_one_budget_is_taken():
    with pytest.raises(ValueError, match="tokens and seconds"):
        Plan(tokens=5, seconds=1.0)
    text = 'tasks = ["reviews"]\nalgorithms = ["ppo"]\n[budget]\n'
    assert parse_suite(text + "tokens = 5", "s.toml").plan.spending == ("tokens", 5)
    with pytest.raises(UserError, match="line 3: .* takes one of"):
        parse_suite(text + "tokens = 5\nseconds = 1", "s.toml")
