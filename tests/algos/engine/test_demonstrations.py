"""Demonstrations beside samples: DETAILS 20."""

import pytest
import torch

from lm_envs.algos import registry
from lm_envs.algos.ops.losses import masked_mean, nll, sequence_mean
from lm_envs.trajectories import demonstrations
from tests import tiny
from tests.algos import batches

PLAIN = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9}


def gradient(agent, traj, monkeypatch):
    found = []
    monkeypatch.setattr(agent.optimizer, "step", lambda: found.append(batches.gradients(agent.policy)))
    metrics = agent.update(traj)
    return found[0], metrics


@pytest.mark.parametrize(
    ("name", "plain", "knob", "mean"),
    [("reinforce", "reinforce", "alpha", sequence_mean), ("ppo-ptx", "ppo", "ptx_coef", masked_mean)],
)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_gradient_is_the_sum_of_both(name, plain, knob, mean, micro_batch, monkeypatch):
    traj = batches.text_batch()
    agent = batches.learner(name, micro_batch=micro_batch, demonstrations=8, **{knob: 0.7}, **PLAIN)
    found, metrics = gradient(agent, traj, monkeypatch)
    alone, _ = gradient(batches.learner(plain, **PLAIN), traj, monkeypatch)
    data = agent.mixture(0)[1]
    agent.policy.zero_grad()
    likelihood = mean(nll(agent.policy.evaluate(data).logprob, data.mask), data.mask)
    likelihood.backward()
    imitation = batches.gradients(agent.policy)
    assert metrics["demonstration_nll"] == pytest.approx(likelihood.item())
    for key in found:
        expected = alone[key] + 0.7 * imitation.get(key, torch.zeros_like(alone[key]))
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-10)
    assert max(float(g.abs().max()) for g in imitation.values()) > 1e-2  # negative control: it is no small thing


def test_a_weight_of_zero_is_the_plain_algorithm_and_needs_no_data():
    traj, env = batches.text_batch(), batches.text_env()
    ends = []
    for name, settings in (("ppo", {}), ("ppo-ptx", {"ptx_coef": 0.0})):
        agent = registry.make_agent(name, batches.text_policy(env), **batches.SMALL, **settings)
        agent.update(traj)
        ends.append(batches.weights(agent.policy))
    assert batches.same(*ends)
    with pytest.raises(ValueError, match="ppo-ptx learns from demonstrations"):
        registry.make_agent("ppo-ptx", batches.text_policy(env))
    with pytest.raises(ValueError, match="weight is 0"):
        registry.make_agent("reinforce", batches.text_policy(env), data=demonstrations(batches.texts(), 2, 6))
    with pytest.raises(ValueError, match="reinforce needs demonstrations, which task 'tiny' does not have"):
        registry.make_agent("reinforce", batches.text_policy(env), tiny.task(), alpha=0.1)


def test_every_adam_step_sees_other_demonstrations_until_all_were_seen():
    agent = batches.learner("ppo-ptx", demonstrations=4)
    first = [tuple(row.tolist()) for number in range(3) for row in agent.mixture(number)[1].obs]
    assert len(set(first)) == len(agent.demonstrations) == 12
    again = agent.mixture(1)[1]
    assert torch.equal(again.obs, agent.mixture(1)[1].obs)  # a function of the number alone


def test_demonstrations_come_from_the_task():
    task = tiny.task(demonstrations=batches.texts())
    env = batches.text_env()
    agent = registry.make_agent("ppo-ptx", batches.text_policy(env), task)
    assert len(agent.demonstrations) == sum(len(text) > task.prompt_length for text in task.demonstrations)


def test_the_likelihood_term_alone_imitates():
    data = demonstrations(batches.texts(), 2, 6)
    env = batches.text_env()
    settings = batches.SMALL | {"iterations": 20, "learning_rate": 1e-2, "kl_coef": 0.0, "demonstrations": 12}
    agent = registry.make_agent("reinforce", batches.text_policy(env), data=data, alpha=100.0, **settings)
    first = agent.iteration(env)[1]["demonstration_nll"]
    for _ in range(19):
        last = agent.iteration(env)[1]["demonstration_nll"]
    assert last < 0.7 * first


def test_law_1_padding_of_demonstrations_is_not_learned_from(monkeypatch):
    traj = batches.text_batch()
    ends = []
    for fill in (0, 5):
        agent = batches.learner("reinforce", alpha=1.0, **PLAIN)
        data = agent.demonstrations
        data.actions = torch.where(data.mask, data.actions, fill)
        ends.append(gradient(agent, traj, monkeypatch)[0])
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
