"""What every method is charged, counted by hand where each response has six tokens."""

from __future__ import annotations

import json

import pytest

from lm_envs.algos.engine import cost
from lm_envs.algos.registry import make_agent
from lm_envs.benchmarks.run.names import trainable
from lm_envs.benchmarks.run.one_run import execute
from lm_envs.benchmarks.run.results import collect_results, write_csv
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests import tiny
from tests.algos import batches

TASK = "tests.benchmarks.distinct_task:fixed"
PLAN = Plan(test_prompts=10, validation_prompts=2)
# Ten test responses of 6 tokens are charged to everybody.
TEST = {"tokens_generated": 60, "episodes": 10, "reward_calls": 0, "scored_tokens": 0, "trained_tokens": 0}
TEST |= {"comparisons": 0, "given_tokens": 0, "given_episodes": 0}


def read(*responses: int) -> dict[str, int]:
    """So many responses of 6 tokens are read, after their prompts of 5: those of the reward, then of the reference."""
    return {"scored_tokens": 11 * sum(responses)}


# The reward model has seen 4 pairs of 3 + 2 tokens.
REWARD = {"comparisons": 4, "given_episodes": 8, "given_tokens": 20}
# Two iterations of 8 episodes of 6 tokens, and the test.
SAMPLED = TEST | {"tokens_generated": 96 + 60, "episodes": 16 + 10, "reward_calls": 16} | REWARD | read(16, 16)
ONCE = SAMPLED | {"trained_tokens": 96}
FIVE = TEST | {"comparisons": 5, "given_episodes": 10, "given_tokens": 60}  # 5 pairs of 6 + 6 tokens
THREE = {"comparisons": 3, "given_episodes": 6, "given_tokens": 15}
PASSES = {"epochs": 3, "minibatches": 2}
ROUNDS = {"rounds": 2, "annotations": 6, "held_out": 3, "rm_steps": 2, "rm_batch": 2, "epochs": 1}
# Each of two rounds samples 3 pairs to train on and 3 to measure with: 24 responses of 6 tokens.
ITERATED = TEST | {
    "tokens_generated": 96 + 144 + 60,
    "episodes": 16 + 24 + 10,
    "reward_calls": 16,
    "scored_tokens": 11 * (16 + 16),
    "trained_tokens": 96,
}
EXPECTED = [
    ("sft", {}, TEST),
    ("best-of-4", {}, TEST | {"tokens_generated": 240, "episodes": 40, "reward_calls": 40} | REWARD | read(40)),
    ("reinforce", {}, ONCE),
    # ... and one batch of 5 demonstrations of 3 tokens for each of 2 steps
    ("reinforce", {"alpha": 0.1, "demonstrations": 5}, SAMPLED | {"trained_tokens": 96 + 2 * 15}),
    ("rloo", {}, ONCE),
    ("trpo", {}, ONCE),
    ("grpo", {}, ONCE),
    ("dr-grpo", {}, ONCE),
    ("dapo", {}, ONCE),
    ("gspo", {}, ONCE),
    ("cispo", {}, ONCE),
    ("sapo", {}, ONCE),
    ("reinforce-plus-plus", {}, ONCE),
    ("reinforce-plus-plus-baseline", {}, ONCE),
    # the greedy response to each of a batch's prompts, of which one comes up twice
    (
        "remax",
        {},
        ONCE | read(31, 16) | {"tokens_generated": 156 + 15 * 6, "episodes": 26 + 15, "reward_calls": 16 + 15},
    ),
    # 64 samples of the reference for each of 4 prompts
    (
        "vbon",
        {},
        ONCE | read(272, 16) | {"tokens_generated": 156 + 256 * 6, "episodes": 26 + 256, "reward_calls": 16 + 256},
    ),
    # two samples of the anchor for each response, of which one is learned from
    (
        "bond",
        {},
        SAMPLED
        | read(48, 16)
        | {"trained_tokens": 2 * 96, "tokens_generated": 156 + 32 * 6, "episodes": 26 + 32, "reward_calls": 16 + 32},
    ),
    ("a2c", {}, ONCE),
    ("ppo", PASSES, SAMPLED | {"trained_tokens": 3 * 96}),
    # its critic is a model of its own, which reads all that was sampled
    ("ppo", PASSES | {"value_from": "reward_model"}, SAMPLED | {"trained_tokens": 3 * 96} | read(16, 16, 16)),
    ("ppo-klpen", PASSES, SAMPLED | {"trained_tokens": 3 * 96}),
    ("ppo-ptx", PASSES | {"demonstrations": 5}, SAMPLED | {"trained_tokens": 3 * 96 + 2 * 3 * 2 * 15}),
    # 2 of 8 are kept, for 2 passes
    ("expert-iteration", {"group_size": 4, "epochs": 2}, SAMPLED | {"trained_tokens": 2 * 2 * 2 * 6}),
    ("quark", {"learn_episodes": 4, "minibatches": 1}, SAMPLED | {"trained_tokens": 2 * 4 * 6}),
    # the best and the worst of each of 2 groups
    ("online-dpo", {"group_size": 4}, SAMPLED | {"trained_tokens": 2 * 4 * 6}),
    # a sample of the reference for each response
    (
        "xpo",
        {},
        SAMPLED
        | read(32, 16)
        | {"trained_tokens": 2 * 96, "tokens_generated": 156 + 16 * 6, "episodes": 26 + 16, "reward_calls": 16 + 16},
    ),
    ("dpo", {"pairs": 5, "episodes": 3}, FIVE | {"trained_tokens": 2 * 3 * 12}),
    # the task comes with 4 pairs, of 5 tokens each
    ("dpo", {"pairs": 3, "episodes": 3}, TEST | THREE | {"trained_tokens": 2 * 15}),
    ("binary-feedme", {"pairs": 5, "episodes": 4}, FIVE | {"trained_tokens": 2 * 4 * 6}),
    ("reward-conditioning", {"pairs": 5, "episodes": 4}, FIVE | {"trained_tokens": 2 * 4 * 6}),
    ("iterated-rlhf", ROUNDS, ITERATED | {"comparisons": 6}),
    ("iterated-rlhf", ROUNDS | {"rm_start": "task"}, ITERATED | REWARD | {"comparisons": 4 + 6}),
]


@pytest.mark.parametrize(("name", "settings", "expected"), EXPECTED, ids=lambda x: x if isinstance(x, str) else "")
def test_each_method_is_charged_for_what_it_takes(tmp_path, name, settings, expected):
    trained = {"iterations": 2, "episodes": 8, **settings} if name in trainable() else {}
    found = execute(RunSpec(TASK, name, 0, PLAN, overrides=trained), tmp_path)
    assert {column: found[column] for column in expected} == expected
    assert set(cost.COLUMNS) == set(expected)
    write_csv(collect_results(tmp_path), tmp_path / "results.csv")
    names, values = (line.split(",") for line in (tmp_path / "results.csv").read_text().splitlines())
    assert {column: int(values[names.index(column)]) for column in expected} == expected
    if trained:
        last = json.loads(next(tmp_path.glob("*/*/*/metrics.jsonl")).read_text().splitlines()[-1])
        assert last["trained_tokens"] == expected["trained_tokens"]
        assert last["tokens"] == expected["tokens_generated"] - 60


def test_no_method_is_left_out():
    assert {name for name, _, _ in EXPECTED} == {"sft", "best-of-4", *trainable()} - {"distillation"}  # wants a folder


def test_a_ranking_counts_its_pairs():
    data = batches.ranked(groups=3)  # of two, three and four texts
    assert cost.of_preferences(data)["comparisons"] == 1 + 3 + 6
    assert make_agent("dpo", batches.text_policy(batches.text_env()), data=data).given["given_episodes"] == 9


def test_a_written_reward_has_seen_no_comparisons():
    task = tiny.task(pairs=[([1], [2, 0], [3, 0])])
    assert not cost.of_reward(task)


def test_a_killed_run_goes_on_counting(tmp_path):
    agents = [make_agent("ppo", batches.text_policy(batches.text_env()), epochs=2, **batches.SMALL) for _ in range(2)]
    for _ in range(2):
        agents[0].iteration(batches.text_env())
    agents[1].restore(*agents[0].checkpoint())
    assert agents[1].trained_tokens == agents[0].trained_tokens == 2 * agents[0].tokens_done
    tensors, counters = agents[0].checkpoint()
    del counters["trained_tokens"]
    with pytest.raises(ValueError, match="no 'trained_tokens': another version"):
        agents[1].restore(tensors, counters)
