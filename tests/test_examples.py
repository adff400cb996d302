"""The example of an algorithm of one's own: short, and it learns on control and on text."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lm_envs.algos.policies.mlp import MLPPolicy
from lm_envs.algos.registry import load, make_agent
from lm_envs.env.rollout import collect
from tests.algos import batches

FILE = Path(__file__).resolve().parent.parent / "examples" / "awr.py"


@pytest.fixture
def awr(monkeypatch):
    spec = importlib.util.spec_from_file_location("example_awr", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "example_awr", module)
    spec.loader.exec_module(module)
    return module


def test_it_is_one_file_under_70_lines_and_a_text_names_it(awr):
    assert len(FILE.read_text().splitlines()) < 70
    assert load("example_awr:AWR") is awr.AWR and load(f"{FILE}:AWR").name == "awr"


def test_its_weights_by_hand(awr):
    traj, policy = batches.control_batch()
    agent = make_agent("example_awr:AWR", policy, beta=0.5, gamma=1.0)
    before = policy.evaluate(traj)
    with torch.no_grad():
        fixed = agent.prepare(traj, before)
    advantage = awr.gae(traj.reward, before.value, traj.mask, 1.0)
    expected = (advantage / 0.5).exp().clamp(max=20)
    torch.testing.assert_close(fixed["weight"][traj.mask], expected.detach()[traj.mask])
    assert (fixed["weight"] <= 20).all() and (fixed["weight"][traj.mask] < 20).any()


def episode_return(policy, env_id):
    traj = collect(batches.control_env(8, env_id), policy, episodes=32, seed=7)
    return float(torch.where(traj.mask, traj.reward, 0.0).sum(1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "iterations", "gain"), [("CartPole-v1", 8, 20.0), ("lm_envs/Cat-v0", 12, 20.0)])
def test_it_learns_on_control(awr, env_id, iterations, gain):
    agent = awr.train(env_id, iterations)
    start = episode_return(MLPPolicy(batches.control_env(1, env_id)), env_id)
    assert episode_return(agent.policy, env_id) > start + gain


@pytest.mark.slow
def test_it_learns_on_reviews(awr, capsys):
    awr.train("lm_envs/Reviews-v0", 10, episodes=64)
    returns = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    # It rises by about 0.38 here.
    assert sum(returns[-3:]) / 3 > sum(returns[:3]) / 3 + 0.25
