"""TRPO: conjugate gradients and Fisher products by hand, the KL limit, and that it is RLOO with another step."""

import pytest
import torch

from lm_envs.algos import trpo
from lm_envs.algos.engine.batching import Before
from lm_envs.algos.ops.conjugate_gradients import conjugate_gradients
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load
from tests.algos import batches

SETTINGS = {"episodes": 64, "group_size": 8, "damping": 1e-12}


def test_conjugate_gradients_by_hand():
    """``[[2, 1], [1, 3]] x = [1, 2]`` has the solution [0.2, 0.6]; a step goes along b."""
    matrix, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([1.0, 2.0]).double()
    once = conjugate_gradients(lambda v: matrix @ v, b, 1)
    torch.testing.assert_close(once, b * 5 / 18)  # b.b / b.Ab
    torch.testing.assert_close(conjugate_gradients(lambda v: matrix @ v, b, 2), torch.tensor([0.2, 0.6]).double())
    assert conjugate_gradients(lambda v: matrix @ v, b, 9).isfinite().all()


def one_state(**settings):
    """A policy of one state (a prompt, a token), away from uniform, and a batch of it."""
    task = load(tokens=2, horizon=1, prompts=1)
    env = TextVectorEnv(task, 8, group_size=8, kl_coef=0.0)
    exact = Exact(env.mdp)
    policy = TabularPolicy(exact, torch.tensor([[[0.2, 0.3, 0.5]]]).double().log())
    agent = make_agent("trpo", policy, **SETTINGS | settings)
    return agent, rollout(env, policy, episodes=64), exact


def test_a_product_with_the_fisher_matrix_by_hand():
    """The Fisher matrix of a softmax is ``diag(p) - p p'`` in each state."""
    agent, traj, _ = one_state()
    with torch.no_grad():
        agent.prepare(traj, Before(agent.policy, traj))
        p = torch.tensor([0.2, 0.3, 0.5]).double()
        v = torch.tensor([1.0, -2.0, 0.5]).double()
        agent.policy.logits.add_(1e-6 * v)
    found = agent._gap_gradient([agent.policy.logits]) / 1e-6
    torch.testing.assert_close(found, p * v - p * (p @ v), rtol=1e-4, atol=1e-8)


def test_its_step_by_hand():
    """The natural gradient of a softmax: the sum of the advantages of an action's samples, over its probability. Its
    length is what the KL limit asks for."""
    agent, traj, _ = one_state(old_kl_limit=1e-6)
    with torch.no_grad():
        advantage = agent.prepare(traj, Before(agent.policy, traj))["advantage"][:, 0]
    p, before = torch.tensor([0.2, 0.3, 0.5]).double(), agent.policy.logits.detach().clone()
    direction = torch.stack([advantage[traj.actions[:, 0] == a].sum() for a in range(3)]) / p
    metrics = agent.update(traj)
    step = (agent.policy.logits.detach() - before)[0]
    step, direction = step - p @ step, direction - p @ direction  # a softmax does not see a constant
    torch.testing.assert_close(step / step.norm(), direction / direction.norm(), rtol=1e-4, atol=1e-4)
    expected = 1e-6 * metrics["step_share"] ** 2  # to second order
    assert metrics["old_kl"] == pytest.approx(expected, rel=0.01) and metrics["step_share"] in (1.0, 0.5)


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
def test_a_batch_moves_the_policy_as_far_as_it_may_and_no_further(kind):
    traj = batches.text_batch(kind)
    for limit in (1e-3, 1e-2):
        agent = batches.learner("trpo", kind, old_kl_limit=limit)
        old = agent.policy.evaluate(traj)
        old_full = old.log_probs().detach() if kind == "mdp" else None
        metrics = agent.update(traj)
        assert 0.05 * limit < metrics["old_kl"] <= limit and metrics["updates"] == 1
        now = agent.policy.evaluate(traj)
        if kind == "mdp":
            kl = (old_full.exp() * (old_full - now.log_probs().detach())).sum(dim=2)[traj.mask].mean()
        else:
            gap = (now.logprob - old.logprob).detach()
            kl = (gap.exp() - 1 - gap).mean()
        assert float(kl) == pytest.approx(metrics["old_kl"], rel=1e-6)


def test_a_step_that_is_too_long_is_halved(monkeypatch):
    """With a quarter of the Fisher matrix the step is twice too long, its KL about four times the limit."""
    agent, traj = batches.learner("trpo", damping=1e-12, old_kl_limit=1e-3), batches.text_batch()
    whole = agent._gap_gradient
    monkeypatch.setattr(agent, "_gap_gradient", lambda parameters: whole(parameters) / 4)
    metrics = agent.update(traj)
    assert metrics["step_share"] <= 0.5 and 1e-4 < metrics["old_kl"] <= 1e-3


def test_a_step_that_makes_the_surrogate_worse_is_not_taken(monkeypatch):
    agent, traj = batches.learner("trpo", backtracks=3), batches.text_batch()
    before = batches.weights(agent.policy)
    monkeypatch.setattr(trpo, "conjugate_gradients", lambda product, b, steps: -b)  # uphill
    metrics = agent.update(traj)
    assert metrics["step_share"] == metrics["old_kl"] == 0 and batches.same(batches.weights(agent.policy), before)


def test_its_gradient_is_rloos_and_the_matrix_turns_the_step():
    """Where the Fisher matrix is drowned by damping the step is along the gradient; else it is not."""
    traj = batches.text_batch()

    def moved(name, **settings):
        agent = batches.learner(name, **settings)
        before = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
        agent.update(traj)
        return torch.cat([p.detach().flatten() for p in agent.policy.parameters()]) - before, agent

    plain, agent = moved("rloo", max_grad_norm=1e9)
    held = agent._parameters.values()
    gradient = -torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in held])
    for damping, along in ((1e6, True), (1e-3, False)):
        step, _ = moved("trpo", damping=damping, max_grad_norm=1e9, old_kl_limit=1e-4)
        cosine = float(torch.cosine_similarity(step, gradient.to(step.dtype), dim=0))
        assert (cosine > 0.999) == along and cosine > 0, (damping, cosine)


def test_micro_batches_change_nothing():
    traj, ends = batches.text_batch(), []
    for size in (None, 5):
        agent = batches.learner("trpo", micro_batch=size)
        agent.update(traj)
        ends.append(batches.weights(agent.policy))
    for key, weight in ends[0].items():
        torch.testing.assert_close(ends[1][key], weight, rtol=1e-4, atol=1e-6)


def test_equal_returns_move_nothing():
    agent, traj, _ = one_state()
    traj.reward = torch.ones_like(traj.reward)
    before = batches.weights(agent.policy)
    assert agent.update(traj)["old_kl"] == 0 and batches.same(batches.weights(agent.policy), before)


def test_what_it_cannot_do_is_refused(monkeypatch):
    policy = batches.text_policy(batches.text_env())
    with pytest.raises(ValueError, match="torch.bfloat16 rounds away: use ppo"):
        make_agent("trpo", policy.to(torch.bfloat16), **batches.SMALL)
    monkeypatch.setattr(trpo, "LARGEST", 10)
    with pytest.raises(ValueError, match="trpo holds whole distributions.*sample fewer episodes, or use ppo-klpen"):
        batches.learner("trpo").update(batches.text_batch())


def test_it_comes_near_the_optimum_of_a_small_draw():
    env = TextVectorEnv(load(tokens=2, horizon=3, prompts=2), 16, group_size=8)
    exact = Exact(env.mdp)
    policy = TabularPolicy(exact)
    agent = make_agent("trpo", policy, episodes=256, group_size=8, damping=1e-4, old_kl_limit=0.03)
    for _ in range(20):
        agent.iteration(env)
    assert exact.regret(policy) < 0.05
