"""The KL coefficient: whatever sets it, ``config.json`` and the results record what was charged."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import gymnasium
import pytest
import torch

import lm_envs
from lm_envs.algos.ops.losses import k3
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.compare import compare
from lm_envs.benchmarks.run.one_run import execute
from lm_envs.benchmarks.run.problems import open_problem
from lm_envs.benchmarks.run.suites import Plan, RunSpec, Suite, TaskSettings
from lm_envs.env.vector import TextVectorEnv
from tests.algos import batches
from tests.benchmarks import fake_task

PLAN = Plan(iterations=2, test_prompts=2, validation_prompts=2, checkpoint_every=2)
SMALL = {"episodes": 8, "learning_rate": 1e-2}


def train(tmp_path, algorithm: str, env: dict, settings: dict):
    """What a run wrote into ``config.json`` and its result, the trajectories it learned from, and its agent."""
    seen = []

    def opener(spec):
        problem = open_problem(spec)
        whole = problem.agent.iteration

        def iteration(env):
            traj, metrics = whole(env)
            seen.append((traj, metrics))
            return traj, metrics

        problem.agent.iteration = iteration
        opener.agent = problem.agent
        return problem

    spec = RunSpec(fake_task.NAME, algorithm, 0, PLAN, env, {}, {**SMALL, **settings})
    result = execute(spec, tmp_path, opener=opener)
    return json.loads((tmp_path / spec.folder / "config.json").read_text()), result, seen, opener.agent


def charged(traj) -> float:
    """By how much a nat of log-ratio lowers the return: (score - return) over log-ratio, which must be one number."""
    ratio = (traj.logprob - traj.ref_logprob).where(traj.mask, 0.0).sum(1)
    paid = traj.score - traj.reward.where(traj.mask, 0.0).sum(1)
    coef = float(paid @ ratio / (ratio @ ratio))
    torch.testing.assert_close(paid, coef * ratio, rtol=0, atol=1e-9)
    return coef


GROUPS = {"group_size": 4, "minibatches": 1}
DOORS = {
    "the task's default": ("reinforce", {}, {}, 0.05),
    "the env's option": ("reinforce", {"kl_coef": 0.3}, {}, 0.3),
    "the algorithm's setting": ("reinforce", {}, {"kl_coef": 0.7}, 0.7),
    "both, the same": ("reinforce", {"kl_coef": 0.7}, {"kl_coef": 0.7}, 0.7),
    "zero is a setting": ("reinforce", {"kl_coef": 0.0}, {}, 0.0),
    "published": ("grpo", {}, {**GROUPS, "kl_loss": None}, 0.04),
    "the env's option before the published one": ("grpo", {"kl_coef": 0.3}, {**GROUPS, "kl_loss": None}, 0.3),
    "the setting before the published one": ("grpo", {}, {**GROUPS, "kl_loss": None, "kl_coef": 0.2}, 0.2),
    "a child has not its parent's": ("dr-grpo", {}, GROUPS, 0.05),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_is_recorded_is_what_the_reward_was_charged(tmp_path, door):
    algorithm, env, settings, expected = DOORS[door]
    config, result, seen, _ = train(tmp_path, algorithm, env, settings)
    assert (config["env"]["kl_coef"], config["env"]["kl_in_reward"]) == (expected, True)
    assert result["kl_coef"] == expected
    # In the first iteration the policy is the reference and every penalty is 0: the second tells.
    assert charged(seen[1][0]) == pytest.approx(expected, abs=1e-6)
    assert seen[1][1]["kl_coef"] == expected


@pytest.mark.parametrize(("env", "settings", "expected"), [({}, {}, 0.04), ({"kl_coef": 0.3}, {}, 0.3)])
def test_a_penalty_in_the_loss_is_recorded_as_one(tmp_path, env, settings, expected):
    config, _, seen, agent = train(tmp_path, "grpo", env, {**GROUPS, **settings})
    assert (config["env"]["kl_coef"], config["env"]["kl_in_reward"]) == (expected, False)
    traj = seen[1][0]
    assert charged(traj) == pytest.approx(0, abs=1e-9)
    now = agent.policy.evaluate(traj)
    expected_loss = (expected * k3(now.logprob, traj.ref_logprob, traj.mask)).float()
    torch.testing.assert_close(agent.kl_penalty(traj, now).float(), expected_loss)
    assert float(expected_loss.detach().sum()) > 0


def test_a_steered_coefficient_is_recorded_where_it_starts_and_line_by_line(tmp_path):
    steered = {"kl_coef": 0.2, "kl_target": 5.0, "kl_horizon": 16.0}
    config, result, seen, _ = train(tmp_path, "reinforce", {}, steered)
    assert config["env"]["kl_coef"] == result["kl_coef"] == 0.2
    expected = 0.2 * math.exp(-0.2 / 16 - 1)  # far below the target
    assert seen[1][1]["kl_coef"] == pytest.approx(expected)
    assert charged(seen[1][0]) == pytest.approx(expected, abs=1e-6)


def test_nothing_is_recorded_where_nothing_is_charged(tmp_path):
    spec = RunSpec(fake_task.NAME, "best-of-2", 0, PLAN)
    result = execute(spec, tmp_path)
    config = json.loads((tmp_path / spec.folder / "config.json").read_text())
    assert config["env"]["kl_coef"] is None is result["kl_coef"]


def suite(**overrides) -> Suite:
    task = TaskSettings(fake_task.NAME, env={"kl_coef": 0.3})
    return Suite("test", (task,), ("reinforce", "dr-grpo"), plan=PLAN, overrides=overrides)


def test_settings_that_disagree_are_refused_before_any_work(tmp_path):
    broken = suite(reinforce={**SMALL, "kl_coef": 0.2})
    broken = replace(broken, tasks=(replace(broken.tasks[0], options={"broken": True}),))  # loading would fail later
    with pytest.raises(UserError, match=r"kl_coef is 0\.3 in the environment's options and 0\.2 in the settings of"):
        compare(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_agent_and_an_env_that_disagree_are_refused_before_sampling():
    env = batches.text_env(kl_coef=0.3)
    agent = batches.learner("reinforce", env=env, kl_coef=0.2)
    with pytest.raises(ValueError, match=r"reinforce: kl_coef is 0\.2 and 0\.3"):
        agent.iteration(env)
    assert agent.episodes_done == 0
    lm_envs.set_kl_coef(env, 0.2)  # the user's, too
    assert agent.iteration(env)[1]["kl_coef"] == 0.2
    lm_envs.set_kl_coef(env, 0.4)
    with pytest.raises(ValueError, match="set it in one place"):
        agent.iteration(env)


def test_an_agents_own_setting_does_not_bind_the_next_agent_on_the_env():
    env = batches.text_env()
    assert batches.learner("reinforce", env=env, kl_coef=0.7).iteration(env)[1]["kl_coef"] == 0.7
    assert batches.learner("grpo", env=env).iteration(env)[1]["kl_coef"] == 0.04
    assert env.mdp.charged_kl_coef == 0
    assert batches.learner("reinforce", env=env).iteration(env)[1]["kl_coef"] == 0.1 == env.mdp.charged_kl_coef


def test_every_member_of_a_sync_vector_env_is_charged_alike():
    members = [lambda: gymnasium.make("lm_envs/Reviews-v0", task=batches.text_task(), group_size=4) for _ in range(2)]
    env = gymnasium.vector.SyncVectorEnv(members)
    agent = batches.learner("reinforce", env=TextVectorEnv(batches.text_task(), 2, group_size=4), kl_coef=0.7)
    agent.settle_kl_coef(env)
    assert [member.unwrapped.kl_coef for member in env.envs] == [0.7, 0.7]


def test_the_column_is_there_where_methods_differ(tmp_path):
    small = {"reinforce": SMALL, "dr-grpo": {**SMALL, **GROUPS}}
    compare(suite(**small), tmp_path / "same")
    assert "kl_coef" not in (tmp_path / "same" / "results.csv").read_text()
    differ = suite(**{"reinforce": {**SMALL, "kl_coef": 0.2}, "dr-grpo": small["dr-grpo"]})
    differ = replace(differ, tasks=(replace(differ.tasks[0], env={}),))
    compare(differ, tmp_path / "differ")
    rows = list(csv.DictReader((tmp_path / "differ" / "results.csv").open()))
    assert [row["kl_coef"] for row in rows] == ["0.2", "0.05"]
