"""J-BOND: its weights by hand, the anchor, what it is charged for, and that it goes to best-of-2 of a fixed anchor."""

import math

import pytest
import torch

from lm_envs.algos import bond
from lm_envs.algos.engine.agent import Agent, learn
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load
from tests.algos import batches
from tests.marks import slow_unless


def learner(**settings):
    env = batches.text_env()
    agent = batches.learner("bond", env=env, **settings)
    agent.mdp = env.mdp
    return agent


def test_its_weights_by_hand(monkeypatch):
    """Rows below both samples, above one, and above both; a policy that has left its anchor."""
    agent, traj, seen = learner(forward_weight=0.25, anchor_kl_coef=2.0), batches.text_batch(), []
    with torch.no_grad():
        anchored = agent.policy.evaluate(traj).logprob.sum(dim=1)
        for p in agent._parameters.values():
            p.add_(0.03)
        drift = agent.policy.evaluate(traj).logprob.sum(dim=1) - anchored
    other = traj.response.flip(0).repeat_interleave(2, dim=0)
    other[1::2] = traj.response[0]
    traj.score = torch.tensor([0.0, 2.0, 5.0, 1.0] * 4).double()
    first = torch.tensor([1.0, 3.0]).double().repeat(16)  # of the two samples of each row
    monkeypatch.setattr(agent, "_answer", lambda rows: other)
    monkeypatch.setattr(agent.mdp, "score", lambda index, response: first[:, None].numpy())
    monkeypatch.setattr(Agent, "update", lambda self, rows: seen.append(rows) or {})
    metrics = agent.update(traj)
    (joined,) = seen
    value = 0.75 * -math.log(16) * (traj.score < 1) - (0.75 + 2) * drift
    by_four = value.reshape(4, 4)
    advantage = (by_four - (by_four.sum(1, keepdim=True) - by_four) / 3).reshape(-1)
    torch.testing.assert_close(joined.reward[:16, 0], 2 * advantage)
    assert joined.reward[16:, 0].tolist() == [0.5] * 16  # twice the forward weight
    assert torch.equal(joined.response[16:], other[1::2])  # the better of two
    assert metrics["below_both"] == 0.25 and metrics["anchor_kl"] == pytest.approx(float(drift.mean()))


def test_the_reward_is_the_log_of_a_share_at_the_median():
    """``-log 16`` with probability 1/4, both samples above, is ``log 1/2``."""
    assert bond.BELOW / 4 == pytest.approx(math.log(1 / 2))


def test_the_anchor_follows_the_policy_and_is_restored():
    env, agent = batches.text_env(), learner(anchor_rate=0.25)
    before = batches.weights(agent.policy)
    agent.iteration(env)
    after = batches.weights(agent.policy)
    for name, anchor in agent._anchor.items():
        torch.testing.assert_close(anchor, 0.75 * before[name] + 0.25 * after[name])
    twin = learner(anchor_rate=0.25)
    twin.restore(*agent.checkpoint())
    assert batches.same(twin._anchor, agent._anchor) and twin._anchor is not agent._anchor
    with agent._as_anchor():
        assert all(torch.equal(p, agent._anchor[name]) for name, p in agent._parameters.items())
    assert batches.same(batches.weights(agent.policy), after)


def test_the_anchor_of_a_coarse_policy_is_fine():
    """A step of 2 % of 1/256 of a weight is lost in bfloat16."""
    env = batches.text_env()
    agent = make_agent("bond", batches.text_policy(env).to(torch.bfloat16), **batches.SMALL)
    before = {name: p.detach().float() for name, p in agent._parameters.items()}
    agent.iteration(env)
    for name, p in agent._parameters.items():
        torch.testing.assert_close(agent._anchor[name], before[name].lerp(p.detach().float(), 0.02), rtol=0, atol=1e-7)
    assert any((agent._anchor[name] != anchor).any() for name, anchor in before.items())


def test_samples_of_the_anchor_are_fresh_and_charged():
    env, agent = batches.text_env(), learner()
    traj, _ = agent.iteration(env)
    assert agent.episodes_done == 16 and agent.samples_done == agent.reward_calls == 48
    first = agent._answer(traj)
    agent.episodes_done += 16
    assert len(first) == 32 and not torch.equal(first, agent._answer(traj))


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
def test_both_envs_are_one(kind):
    ends = []
    for each in ("mdp", kind):
        env = batches.text_env(each)
        agent = batches.learner("bond", each, env=env)
        learn(agent, env, 2)
        ends.append(batches.weights(agent.policy))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-6, atol=1e-8)


def test_what_it_needs():
    traj, _ = batches.control_batch()
    with pytest.raises(ValueError, match="bond learns from text and a score"):
        learner().update(traj)
    agent = learner()
    agent.mdp = None
    with pytest.raises(ValueError, match="set .mdp"):
        agent.update(batches.text_batch())
    with pytest.raises(ValueError, match="at least 2"):
        learner(group_size=1)


def small(**settings):
    task = load(tokens=2, horizon=2, prompts=1)
    env = TextVectorEnv(task, 64, group_size=16)
    exact = Exact(env.mdp)
    policy = TabularPolicy(exact, exact.table(task.start))
    own = {"max_grad_norm": 1e6, "learning_rate": 0.2, "episodes": 128, "group_size": 16, "iterations": 16}
    agent = make_agent("bond", policy, task, **own | settings)
    learn(agent, env)
    return exact, policy


@pytest.mark.parametrize("weight, share", slow_unless((0.5, 0.3).__eq__, [(1.0, 0.1), (0.5, 0.3)]))
def test_with_a_fixed_anchor_it_goes_to_best_of_two(weight, share):
    """Imitation alone rests there; the other direction near it, for its reward has the right mean at the median only.
    What the policy starts from is far."""
    exact, policy = small(forward_weight=weight, anchor_rate=0.0, anchor_kl_coef=0.0)
    best = exact.best_of_n(exact.log_ref, 2)
    with torch.no_grad():
        assert float(exact.kl(policy, best)) < share * float(exact.kl(exact.log_ref, best))


@pytest.mark.slow
def test_a_moving_anchor_goes_further():
    score = []
    for rate in (0.0, 0.5):
        exact, policy = small(anchor_rate=rate, anchor_kl_coef=0.0)
        score.append(float(exact.reward(policy.log_probs().detach())))
    assert score[1] > score[0] + 0.2
