"""The parts of a reward that is a sum: their means in training, in results, and on many processes."""

import json

import numpy as np
import pytest

from lm_envs.algos.registry import make_agent
from lm_envs.benchmarks.run.one_run import execute
from lm_envs.benchmarks.run.results import collect_results, write_csv
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.env.vector import TextVectorEnv
from lm_envs.processes import group
from lm_envs.reward.base import Clip, Standardise, WeightedSum, call_reward, forget_parts, part_means
from lm_envs.reward.building import build_reward
from lm_envs.reward.lengths import tokens, unfinished
from lm_envs.reward.specs import parse_reward
from tests import tiny
from tests.algos import batches
from tests.many import on_many

BATCH = {
    "prompts": ["p"] * 3,
    "completions": ["a", "bb", "ccc"],
    "completion_ids": [[1, 0], [1, 1, 0], [1, 1, 1]],
    "finish_reasons": ["stop", "stop", "length"],
}


def letters(completions):
    return [float(len(text)) for text in completions]


def some(completions):
    return [None if text == "a" else 10.0 for text in completions]


def each(completion_ids):
    return [[1.0] * len(ids) for ids in completion_ids]


each.dense = True


def test_means_by_hand():
    """Without weights, where a part applies; of a dense part per response; through what wraps the sum."""
    whole = WeightedSum([(2.0, letters), (-1.0, some), (3.0, letters)])
    for reward in (whole, Clip(whole, -100, 100), Standardise(whole, 1.0, 2.0)):
        forget_parts(reward)
        call_reward(reward, **BATCH)
        call_reward(reward, **{name: values[:1] for name, values in BATCH.items()})
        means = {"part_letters": (1 + 2 + 3 + 1) / 4, "part_some": 10.0, "part_letters (2)": 7 / 4}
        assert part_means(reward) == means == part_means(reward)
    dense = WeightedSum([(1.0, each), (1.0, letters)])
    call_reward(dense, **BATCH)
    assert part_means(dense) == {"part_each": 8 / 3, "part_letters": 2.0}
    forget_parts(dense)
    assert part_means(dense) == part_means(letters) == {}


def test_lengths_by_hand_and_on_the_command_line():
    assert tokens(**BATCH) == [2, 3, 3] and unfinished(**BATCH) == [0, 0, 1]
    reward = build_reward(parse_reward("lm_envs.reward.lengths:tokens*-0.5 + lm_envs.reward.lengths:unfinished*2"))
    assert call_reward(reward, **BATCH).tolist() == [-1.0, -1.5, 0.5]


def test_a_batch_reports_the_parts_of_its_own_rewards():
    task = tiny.task(reward=WeightedSum([(1.0, tokens), (5.0, unfinished)]))
    env = TextVectorEnv(task, 8, group_size=4)
    call_reward(task.reward, **BATCH)  # somebody else's samples
    agent = make_agent("rloo", batches.text_policy(env), **batches.SMALL)
    traj, metrics = agent.iteration(env)
    assert metrics["part_tokens"] == pytest.approx(float(traj.response_lengths.double().mean()))
    assert metrics["part_tokens"] + 5 * metrics["part_unfinished"] == pytest.approx(metrics["score"])


def test_many_processes_report_those_of_all():
    def run():
        whole = WeightedSum([(1.0, letters), (1.0, tokens)])
        rows = slice(group.rank(), group.rank() + 1)
        call_reward(whole, **{name: values[rows] for name, values in BATCH.items()})
        return part_means(whole)

    assert on_many(3, run) == [{"part_letters": 2.0, "part_tokens": pytest.approx(8 / 3)}] * 3


def test_results_and_metrics_have_them(tmp_path):
    options = {"reward": ["lm_envs.reward.lengths:tokens*-0.01", "lm_envs.reward.lengths:unfinished"]}
    folder = tmp_path / "policy"
    tiny.gpt2().float().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcdabcd"))
    options |= {"policy": str(folder), "prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 4}
    plan = Plan(iterations=1, test_prompts=2, validation_prompts=2)
    run = RunSpec("custom", "rloo", 0, plan, options=options, overrides={"episodes": 8})
    result = execute(run, tmp_path / "out")
    assert 1 <= result["part_tokens"] <= 4 and 0 <= result["part_unfinished"] <= 1
    write_csv(collect_results(tmp_path / "out"), tmp_path / "results.csv")
    header, values = (line.split(",") for line in (tmp_path / "results.csv").read_text().splitlines())
    assert float(values[header.index("part_tokens")]) == pytest.approx(result["part_tokens"], rel=1e-5)
    lines = [json.loads(line) for line in next((tmp_path / "out").glob("*/*/*/metrics.jsonl")).read_text().splitlines()]
    assert "part_tokens" in lines[-1] and np.isfinite(lines[-1]["part_unfinished"])
