"""RLOO, GRPO and Dr. GRPO: by hand, and what reduces to what."""

import pytest
import torch

from lm_envs.algos.engine.batching import Before
from tests.algos import batches

PLAIN = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9}


def prepared(name, traj, **settings):
    agent = batches.learner(name, **PLAIN, **settings)
    with torch.no_grad():
        return agent, agent.prepare(traj, Before(agent.policy, traj))


def gradient(name, traj, monkeypatch, **settings):
    agent, found = batches.learner(name, **PLAIN, **settings), []
    monkeypatch.setattr(agent.optimizer, "step", lambda: found.append(batches.gradients(agent.policy)))
    agent.update(traj)
    return torch.cat([g.flatten() for _, g in sorted(found[0].items())])


def returns_of(traj):
    return torch.where(traj.mask, traj.reward, 0.0).sum(dim=1)


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
def test_rloo_is_reinforce_with_the_leave_one_out_baseline(kind, monkeypatch):
    traj = batches.text_batch(kind)
    ends = []
    for name in ("rloo", "reinforce"):
        agent = batches.learner(name, kind)
        agent.update(traj)
        ends.append(batches.weights(agent.policy))
    assert batches.same(*ends)
    other = batches.learner("reinforce", kind, baseline="batch_mean")  # negative control
    other.update(traj)
    assert not batches.same(ends[0], batches.weights(other.policy))


def test_rloos_advantage_by_hand():
    traj = batches.text_batch(episodes=8)
    _, fixed = prepared("rloo", traj)
    by_four = returns_of(traj).reshape(2, 4)
    expected = (by_four - (by_four.sum(1, keepdim=True) - by_four) / 3).reshape(-1, 1)
    torch.testing.assert_close(fixed["advantage"], expected * traj.mask)


def test_grpos_advantage_by_hand():
    traj = batches.text_batch(episodes=8)
    _, fixed = prepared("grpo", traj, kl_loss=None)
    by_four = returns_of(traj).reshape(2, 4)
    expected = (by_four - by_four.mean(1, keepdim=True)) / by_four.std(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(fixed["advantage"], expected.reshape(-1, 1) * traj.mask, rtol=1e-6, atol=1e-6)
    _, plain = prepared("dr-grpo", traj)
    torch.testing.assert_close(plain["advantage"], (by_four - by_four.mean(1, keepdim=True)).reshape(-1, 1) * traj.mask)


def test_equal_returns_teach_nothing():
    traj = batches.text_batch()
    traj.reward = torch.zeros_like(traj.reward)
    for name in ("rloo", "grpo", "dr-grpo"):
        agent = batches.learner(name, kl_loss=None)
        start = batches.weights(agent.policy)
        agent.update(traj)
        assert batches.same(start, batches.weights(agent.policy)), name


def test_grpos_loss_by_hand():
    traj = batches.text_batch()
    agent, fixed = prepared("grpo", traj, kl_coef=0.3)
    loss, _ = agent.loss(traj, agent.policy.evaluate(traj), fixed)
    logprob = agent.policy.evaluate(traj).logprob.detach()
    total = 0.0
    for i in range(len(traj)):
        log_ratio = (traj.ref_logprob[i] - logprob[i])[traj.mask[i]]
        total += float((-fixed["advantage"][i][traj.mask[i]] + 0.3 * (log_ratio.exp() - 1 - log_ratio)).mean())
    assert loss.item() == pytest.approx(total / len(traj))


def test_without_std_and_length_the_first_step_is_reinforces_direction(monkeypatch):
    """Dr. GRPO's mean counts the episode itself: (K-1)/K of leave-one-out, the same direction. GRPO's is another."""
    traj = batches.text_batch()
    exact = gradient("reinforce", traj, monkeypatch)
    torch.testing.assert_close(gradient("dr-grpo", traj, monkeypatch), 0.75 * exact, rtol=1e-9, atol=1e-12)
    cosine = torch.cosine_similarity(gradient("grpo", traj, monkeypatch, kl_loss=None), exact, dim=0)
    assert 0.3 < cosine < 0.99


def test_dr_grpo_drops_the_std_and_the_length():
    traj = batches.text_batch()
    grpo, dr = (prepared(name, traj, kl_loss=None)[0] for name in ("grpo", "dr-grpo"))
    returns, group = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.tensor([0, 0, 1, 1])
    assert dr.advantage(returns, group).tolist() == [-1, 1, -10, 10]
    torch.testing.assert_close(grpo.advantage(returns, group), torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    lengths = traj.lengths.double()
    with torch.no_grad():
        weights = [agent.prepare(traj, Before(agent.policy, traj))["weight"] for agent in (grpo, dr)]
    torch.testing.assert_close(weights, [1 / lengths, torch.ones_like(lengths)])


def test_metrics_are_means_over_tokens_whatever_the_micro_batch():
    traj = batches.text_batch()
    whole, parts = (
        batches.learner("grpo", micro_batch=size, epochs=2, minibatches=1, learning_rate=1e-2).update(traj)
        for size in (None, 3)
    )
    for name in ("ratio", "approx_kl", "clip_fraction", "entropy", "policy_loss", "loss"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-9, abs=1e-12), name
    assert whole["clip_fraction"] > 0


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "rloo"])
def test_a_prompt_with_one_episode_is_refused(name):
    traj = batches.text_batch(episodes=8)
    traj.group = torch.arange(8)
    with pytest.raises(ValueError, match="group_size"):
        prepared(name, traj)
