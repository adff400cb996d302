"""PPO-KLPEN: DETAILS 12."""

import math

import pytest
import torch

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.ops import losses
from lm_envs.algos.ops.advantages import gae, whiten
from lm_envs.algos.ppo_klpen import adapted
from tests.algos import batches


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_penalised_loss_by_hand():
    one = torch.ones(1, 1, dtype=torch.bool)
    logprob = rows([math.log(1.5)]).requires_grad_()
    found = losses.ppo_penalty_loss(logprob, rows([0.0]), rows([2.0]), one, 3.0)
    assert found.item() == pytest.approx(-2 * 1.5 + 3 * (1.5 - 1 - math.log(1.5)))
    found.sum().backward()
    assert logprob.grad.item() == pytest.approx(-2 * 1.5 + 3 * (1.5 - 1))


def test_the_penaltys_expected_gradient_is_that_of_the_kl_from_old_to_new():
    logits = rows([0.3, -1.0, 0.8, 0.1]).requires_grad_()
    old = rows([1.0, 0.2, -0.5, 0.4]).log_softmax(dim=1)
    new, every = logits.log_softmax(dim=1), torch.ones(1, 4, dtype=torch.bool)
    sampled = (old.exp() * losses.ppo_penalty_loss(new, old, torch.zeros_like(old), every, 1.0)).sum()
    exact = (old.exp() * (old - new)).sum()
    assert sampled.item() == pytest.approx(exact.item())
    found, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, exact))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["ppo", "ppo-klpen", "a2c"])
def test_the_values_target_is_the_raw_advantage_plus_the_value(name):
    """DETAILS 7: advantages are whitened after the returns are computed."""
    traj = batches.text_batch()
    agent = batches.learner(name, lam=0.7, whiten_advantage=True)
    before = Before(agent.policy, traj)
    with torch.no_grad():
        fixed = agent.prepare(traj, before)
    raw = gae(traj.reward, before.value, traj.mask, 1.0, 0.7)
    torch.testing.assert_close(fixed["target"], raw + before.value[:, :-1])
    torch.testing.assert_close(fixed["advantage"], whiten(raw, traj.mask))


def test_without_a_weight_it_is_ppo_without_a_clip():
    traj = batches.text_batch()
    ends = {}
    for key, name, settings in (
        ("penalty", "ppo-klpen", {"old_kl_coef": 0.0}),
        ("unclipped", "ppo", {"clip": 1e9}),
        ("clipped", "ppo", {"clip": 0.01}),
        ("heavy", "ppo-klpen", {"old_kl_coef": 100.0}),
    ):
        agent = batches.learner(name, learning_rate=1e-2, **settings)
        agent.update(traj)
        ends[key] = batches.weights(agent.policy)
    for name, weight in ends["penalty"].items():
        torch.testing.assert_close(weight, ends["unclipped"][name], rtol=1e-12, atol=1e-12)
    assert not batches.same(ends["clipped"], ends["unclipped"])
    assert not torch.allclose(ends["heavy"]["value_head.weight"], ends["penalty"]["value_head.weight"], rtol=1e-6)


def test_a_heavier_penalty_moves_the_policy_less():
    traj = batches.text_batch()
    moved = [
        batches.learner("ppo-klpen", learning_rate=1e-2, old_kl_coef=coef).update(traj)["old_kl"]
        for coef in (0.0, 1.0, 30.0)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_the_rule_by_hand():
    assert adapted(1.0, 0.0066, 0.01) == 0.5
    assert adapted(1.0, 0.0067, 0.01) == 1.0
    assert adapted(1.0, 0.0149, 0.01) == 1.0
    assert adapted(1.0, 0.0151, 0.01) == 2.0


def test_the_weight_follows_how_far_the_batch_moved_the_policy():
    traj = batches.text_batch()
    agent = batches.learner("ppo-klpen", learning_rate=1e-2, old_kl_coef=1.0, old_kl_target=0.01)
    metrics = agent.update(traj)
    before = batches.text_policy(batches.text_env()).evaluate(traj).logprob
    after = agent.policy.evaluate(traj).logprob
    expected = losses.masked_mean(losses.k3(before, after, traj.mask), traj.mask).item()
    assert metrics["old_kl"] == pytest.approx(expected)
    assert metrics["old_kl_coef"] == 1.0
    assert agent.old_kl_coef == adapted(1.0, expected, 0.01) != 1.0
    used = agent.old_kl_coef
    assert agent.update(traj)["old_kl_coef"] == used
    fixed = batches.learner("ppo-klpen", learning_rate=1e-2, old_kl_target=None)
    assert "old_kl" not in fixed.update(traj) and fixed.old_kl_coef == 1.0
