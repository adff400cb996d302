"""The same agents on control: CartPole and the cat. Smoke tests here; the figures that are promised are slow tests."""

import pytest
import torch

from lm_envs.algos.engine.settings_control import ROWS, control_settings
from lm_envs.algos.policies.mlp import MLPPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.benchmarks.run import problems
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.env.cat import CatEnv, expected_return, value_iteration
from lm_envs.env.rollout import collect
from lm_envs.trajectories import Trajectories
from tests.algos import batches
from tests.marks import slow_unless

CONTROL = ("ppo", "ppo-klpen", "a2c", "reinforce", "rloo", "trpo", "grpo", "dr-grpo", "expert-iteration")


def trained(env_id, name, seed, budget, env_options=None, **overrides):
    """An agent after at most `budget` env steps, with the committed settings."""
    env = batches.control_env(ROWS, env_id, **(env_options or {}))
    settings = control_settings(env_id, name) | {"seed": seed} | overrides
    agent = make_agent(name, MLPPolicy(env, seed=seed), **settings)
    while agent.iterations_done < agent.config.iterations and agent.steps_done < budget:
        agent.iteration(env)
    return agent


def cartpole_return(agent, episodes=100):
    traj = collect(batches.control_env(20), agent.policy, episodes=episodes, seed=12345)
    return float(traj.lengths.double().mean())


def cat_share(agent, slip):
    """Exact discounted return of the stochastic policy within 100 steps, as a share of the unlimited optimum."""
    env = CatEnv(slip=slip)
    cells = torch.arange(env.observation_space.n).unsqueeze(1)
    every = torch.ones(len(cells), dtype=torch.bool)
    traj = Trajectories(
        actions=torch.zeros_like(cells), mask=every.unsqueeze(1), terminated=every, truncated=~every, obs=cells
    )
    with torch.no_grad():
        policy = agent.policy.evaluate(traj).log_probs()[:, 0].double().softmax(dim=1).numpy()
    _, optimal = value_iteration(env)
    return expected_return(policy, env) / expected_return(optimal, env, limit=None)


@pytest.mark.parametrize("name", slow_unless({"ppo", "reinforce", "expert-iteration"}.__contains__, CONTROL))
def test_the_committed_settings_run_everywhere(name):
    for env_id in ("CartPole-v1", "lm_envs/Cat-v0"):
        agent = trained(env_id, name, 0, budget=1)
        assert agent.iterations_done == 1 and agent.steps_done > 0
        metrics = agent.iteration(batches.control_env(ROWS, env_id))[1]
        assert metrics.get("logprob_gap_max", 0.0) < 1e-4


LEARNERS = ["ppo", "ppo-klpen", "a2c", "reinforce", "rloo", "trpo", "grpo", "dr-grpo"]


@pytest.mark.parametrize("name", slow_unless({"ppo", "reinforce"}.__contains__, LEARNERS))
def test_a_little_training_helps_on_cartpole(name):
    budget = 4000
    changes = {"reinforce": {"episodes": 8, "learning_rate": 0.01}, "a2c": {"learning_rate": 3e-3}}.get(name, {})
    agent = trained("CartPole-v1", name, 0, budget, **changes)
    untrained = make_agent(name, MLPPolicy(batches.control_env(), seed=0))
    assert cartpole_return(agent, 20) > cartpole_return(untrained, 20) + 15


def test_sft_clones_behaviour_from_control_trajectories():
    data = collect(batches.control_env(), MLPPolicy(batches.control_env()), episodes=10, seed=1)
    data.actions = (data.obs[..., 2] + data.obs[..., 3] > 0).long()  # a teacher that steps under the falling pole
    student = make_agent("sft", MLPPolicy(batches.control_env(), seed=7), data=data, episodes=5, learning_rate=1e-2)
    first = student.iteration()[1]["nll"]
    for _ in range(30):
        last = student.iteration()[1]["nll"]
    assert first > 0.6 and last < 0.2
    assert cartpole_return(student, 20) > 100


def test_the_measures_tell_bad_from_good():
    """Negative control: an untrained policy is far from what the slow tests ask for."""
    cat = make_agent("ppo", MLPPolicy(batches.control_env(1, "lm_envs/Cat-v0")))
    assert cat_share(cat, 0.0) < 0.5
    assert cartpole_return(make_agent("ppo", MLPPolicy(batches.control_env())), 20) < 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_solves_cartpole_within_100k_steps(seed):
    agent = trained("CartPole-v1", "ppo", seed, 100_000 - 1024)
    assert agent.steps_done <= 100_000
    assert cartpole_return(agent) >= 475


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["a2c", "reinforce"])
def test_a2c_and_reinforce_reach_400_on_cartpole_within_300k_steps(name, seed):
    most = 128 if name == "a2c" else 8 * 500  # what one more iteration can take
    agent = trained("CartPole-v1", name, seed, 300_000 - most + 1)
    assert agent.steps_done <= 300_000
    assert cartpole_return(agent) >= 400


@pytest.mark.slow
@pytest.mark.parametrize("slip", [0.0, 0.2])
@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce"])
def test_the_cat_gets_95_percent_of_the_optimum(name, slip):
    agent = trained("lm_envs/Cat-v0", name, 0, 300_000, {"slip": slip})
    assert cat_share(agent, slip) >= 0.95


def test_the_result_is_of_other_episodes_than_the_curve_and_of_others_for_each_seed(monkeypatch):
    seeds, whole = [], problems.collect

    def collect(*given, episodes, seed):
        seeds.append(seed)
        return whole(*given, episodes=2, seed=seed)

    monkeypatch.setattr(problems, "collect", collect)
    for seed in (0, 4):
        problem = problems.open_problem(RunSpec("CartPole-v1", "reinforce", seed, Plan()))
        problem.validate(), problem.evaluate()
    assert seeds[0] == seeds[2] and len(set(seeds)) == 3  # the curves of both are of the same episodes
