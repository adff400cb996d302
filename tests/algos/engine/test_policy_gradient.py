"""Where the KL penalty stands: in the reward or, by each estimator, in the loss."""

import math

import pytest
import torch

from lm_envs.algos import registry
from lm_envs.algos.engine.agent import learn
from lm_envs.algos.ops import losses
from tests.algos import batches

KINDS = ("k1", "k2", "k3", "k3_ratio", "full")
GRADIENT = ("reinforce", "a2c", "ppo")


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_kl_estimates_by_hand():
    one = torch.ones(1, 1, dtype=torch.bool)
    a, b = rows([0.5]).log(), rows([0.25]).log()
    log_2 = math.log(2)
    assert float(losses.kl_estimate("k1", a, b, one)) == pytest.approx(log_2)
    assert float(losses.kl_estimate("k2", a, b, one)) == pytest.approx(log_2**2 / 2)
    assert float(losses.kl_estimate("k3", a, b, one)) == pytest.approx(0.5 - 1 + log_2)
    p, q = rows([[0.5, 0.5]]).log(), rows([[0.25, 0.75]]).log()
    assert float(losses.kl_estimate("full", p, q, one)) == pytest.approx(0.5 * log_2 + 0.5 * math.log(0.5 / 0.75))
    with pytest.raises(ValueError, match="k4.*k1, k2, k3, k3_ratio, full"):
        losses.kl_estimate("k4", a, b, one)
    with pytest.raises(ValueError, match=r"\(B, T, V\)"):
        losses.kl_estimate("full", a, b, one)


def expected_gradient(kind):
    """Of an estimator in the loss, over four actions by enumeration, and the gradients of both directions of KL."""
    logits = rows([0.3, -1.0, 0.8, 0.1]).requires_grad_()
    q = rows([1.0, 0.2, -0.5, 0.4]).log_softmax(dim=1)
    log_p, every = logits.log_softmax(dim=1), torch.ones(1, 4, dtype=torch.bool)
    p = log_p.exp().detach()
    if kind == "full":
        loss = losses.kl_estimate(kind, log_p.unsqueeze(1), q.unsqueeze(1), every[:, :1]).sum()
    else:
        loss = (p * losses.kl_estimate(kind, log_p, q, every)).sum()
    reverse = (log_p.exp() * (log_p - q)).sum()
    forward = (q.exp() * (q - log_p)).sum()
    return [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, reverse, forward)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_estimators_expected_gradient_is_what_its_docstring_says(kind):
    found, reverse, forward = expected_gradient(kind)
    expected = {"k1": torch.zeros_like(reverse), "k3": forward}.get(kind, reverse)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(reverse, forward, rtol=1e-2)


def test_full_is_finite_where_an_action_is_excluded_and_ignores_masked_positions():
    log_p = rows([[0.5, 0.5, 0.0], [float("nan")] * 3]).log().requires_grad_()
    q = rows([[0.25, 0.75, 0.0], [float("nan")] * 3]).log()
    mask = torch.tensor([[True, False]])
    found = losses.kl_estimate("full", log_p, q, mask)
    found.sum().backward()
    assert found[0, 1] == 0 and 0 < found[0, 0].item() < 1
    assert not log_p.grad[0, 0, :2].isnan().any() and (log_p.grad[0, 1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRADIENT)
def test_in_the_loss_the_env_charges_nothing_and_the_loss_charges_all(name, kind):
    env = batches.text_env()
    agent = batches.learner(name, env=env, kl_loss=kind, kl_coef=0.3, epochs=1, minibatches=1)
    traj, metrics = agent.iteration(env)
    assert env.mdp.charged_kl_coef == 0 and metrics["kl_coef"] == 0.3 == env.kl_coef
    torch.testing.assert_close(traj.reward.where(traj.mask, 0.0).sum(1), traj.score)  # negative control below
    now = agent.policy.evaluate(traj)
    penalty = agent.kl_penalty(traj, now)
    if kind == "full":
        reference = agent.reference.evaluate(traj).log_probs()
        expected = 0.3 * (now.log_probs().exp() * (now.log_probs() - reference)).sum(-1)
        expected = torch.where(traj.mask, expected, 0.0)
    else:
        expected = 0.3 * getattr(losses, kind)(now.logprob, traj.ref_logprob, traj.mask)
    torch.testing.assert_close(penalty, expected)
    with torch.no_grad():
        fixed = agent.prepare(traj, now)
    with_penalty = agent.loss(traj, now, fixed)[0]
    agent.config.kl_loss = None
    without = agent.loss(traj, now, fixed)[0]
    mean = losses.sequence_mean if agent.unit == "sequence" else losses.masked_mean
    torch.testing.assert_close(with_penalty - without, mean(expected, traj.mask))


def test_in_the_reward_the_env_charges_it():
    env = batches.text_env()
    agent = batches.learner("reinforce", env=env, kl_coef=0.3)
    traj, _ = agent.iteration(env)
    assert env.mdp.charged_kl_coef == 0.3 == env.kl_coef
    assert not torch.allclose(traj.reward.where(traj.mask, 0.0).sum(1), traj.score)
    assert (agent.kl_penalty(traj, agent.policy.evaluate(traj)) == 0).all()


def test_the_envs_own_coefficient_moves_to_the_loss_and_survives_a_checkpoint():
    env = batches.text_env()
    agent = batches.learner("ppo", env=env, kl_loss="k2")
    assert agent.iteration(env)[1]["kl_coef"] == pytest.approx(0.1)
    assert agent.iteration(env)[1]["kl_coef"] == pytest.approx(0.1)  # not the zero it left in the env
    twin = batches.learner("ppo", env=batches.text_env(), kl_loss="k2")
    twin.restore(*agent.checkpoint())
    assert twin.iteration(batches.text_env())[1]["kl_coef"] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["k2", "full"])
def test_a_heavy_penalty_in_the_loss_holds_the_policy(kind):
    found = {}
    for coef in (0.0, 50.0):
        env = batches.text_env()
        settings = dict(episodes=32, iterations=8, learning_rate=2e-2, kl_coef=coef, kl_loss=kind)
        agent = batches.learner("reinforce", env=env, **settings)
        learn(agent, env)
        found[coef] = agent.iteration(env)[1]["kl"]
    assert found[50.0] < 0.5 * found[0.0]


def test_k2_of_the_whole_sequence_on_the_bandit_face_is_one_number_per_row():
    env = batches.text_env("bandit")
    agent = batches.learner("reinforce", "bandit", env=env, kl_loss="k2", kl_coef=1.0)
    traj, _ = agent.iteration(env)
    now = agent.policy.evaluate(traj)
    torch.testing.assert_close(agent.kl_penalty(traj, now), 0.5 * (now.logprob - traj.ref_logprob) ** 2)


def test_a_penalty_in_the_loss_needs_a_coefficient_a_reference_and_text():
    traj = batches.text_batch()
    with pytest.raises(ValueError, match="set kl_coef"):
        batches.learner("ppo", kl_loss="k3").update(traj)
    with pytest.raises(ValueError, match="needs a reference"):
        batches.learner("ppo", kl_loss="full", kl_coef=0.1).update(traj)
    traj.ref_logprob = None
    with pytest.raises(ValueError, match="ref_logprob"):
        batches.learner("ppo", kl_loss="k3", kl_coef=0.1).update(traj)
    env = batches.control_env()
    agent = registry.make_agent("ppo", batches.MLPPolicy(env), episodes=2, kl_loss="k3")
    with pytest.raises(ValueError, match="needs a reference"):
        agent.iteration(env)
    with pytest.raises(ValueError, match="kl_loss must be "):
        registry.make_config("ppo", kl_loss="k4")
