"""vBoN: its reward by hand, what it is charged for, and that it rests at the distribution of best-of-n."""

import math

import numpy as np
import pytest
import torch

from lm_envs.algos.engine.agent import learn
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.algos.rloo import RLOO
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load as enumerable
from tests.algos import batches


def test_its_reward_by_hand(monkeypatch):
    """Three reference samples and the response itself: F is a quarter of those at or below it."""
    agent, traj, seen = batches.learner("vbon", n=3), batches.text_batch(), []
    held = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    monkeypatch.setattr(type(agent), "_reference_scores", lambda self, prompts: held.repeat(len(prompts), 1))
    monkeypatch.setattr(RLOO, "update", lambda self, rows: seen.append(rows.reward) or {})
    traj.score = torch.tensor([-1.0, 0.5, 1.0, 9.0] * 4, dtype=torch.float64)
    agent.update(traj)
    last, rows = traj.lengths - 1, torch.arange(len(traj))
    gain = [math.log(((f + w) ** 3 - f**3) / w) for f, w in ((0, 0.25), (0.25, 0.25), (0.25, 0.5), (0.75, 0.25))]
    moved = seen[0] - traj.reward
    torch.testing.assert_close(moved[rows, last], torch.tensor(gain * 4, dtype=torch.float64) - traj.score)
    moved[rows, last] = 0
    assert not moved.any()


def test_large_n_and_low_scores_do_not_underflow(monkeypatch):
    agent, traj, seen = batches.learner("vbon", n=1000), batches.text_batch(), []
    held = torch.zeros(4096, dtype=torch.float64)
    monkeypatch.setattr(type(agent), "_reference_scores", lambda self, prompts: held.repeat(len(prompts), 1))
    monkeypatch.setattr(RLOO, "update", lambda self, rows: seen.append(rows.reward) or {})
    traj.score = torch.full((16,), -1.0, dtype=torch.float64)
    gain = agent.update(traj)["log_gain"]
    assert gain == pytest.approx(999 * math.log(1 / 4097)) and seen[0].isfinite().all()


def test_the_references_samples_are_paid_once():
    env = batches.text_env()
    agent = batches.learner("vbon", env=env, reference_samples=5)
    agent.iteration(env)
    prompts = len(agent._scores)
    assert agent.samples_done == agent.reward_calls == 16 + 5 * prompts and prompts > 1
    learn(agent, env, 3)
    assert agent.samples_done == 4 * 16 + 5 * len(agent._scores) and agent.episodes_done == 64
    together = agent._reference_scores(np.array(sorted(agent._scores)))
    assert [scores.tolist() for scores in together] == [
        agent._scores[index].tolist() for index in sorted(agent._scores)
    ]
    assert len({tuple(scores.tolist()) for scores in together}) == len(together)
    restored = batches.learner("vbon", env=env, reference_samples=5)
    restored.restore(*agent.checkpoint())
    assert all(torch.equal(restored._scores[index], scores) for index, scores in agent._scores.items())


def test_it_needs_text():
    traj, _ = batches.control_batch()
    with pytest.raises(ValueError, match="vbon learns from text"):
        batches.learner("vbon").update(traj)


def test_it_rests_at_best_of_n():
    task = enumerable(tokens=2, horizon=2, prompts=1)
    env = TextVectorEnv(task, 64, group_size=16)
    exact, n = Exact(env.mdp), 4
    policy = TabularPolicy(exact, exact.table(task.start))
    settings = {"anneal": True, "max_grad_norm": 1e6, "learning_rate": 0.1, "episodes": 256, "group_size": 16}
    agent = make_agent("vbon", policy, task, n=n, iterations=40, reference_samples=4096, **settings)
    best = exact.best_of_n(exact.log_ref, n)
    start = float(exact.kl(exact.log_ref, best))
    learn(agent, env)
    assert env.mdp.kl_coef == 1.0  # not the task's
    with torch.no_grad():
        assert float(exact.kl(policy, best)) < 0.03 * start and start > 0.3
