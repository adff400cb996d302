"""Sampling frequencies (law 3), bootstrapping (law 5), masked positions (law 1), and act agreeing with evaluate."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lm_envs.algos.policies.mlp import MLPPolicy
from lm_envs.trajectories import Trajectories
from tests.algos import batches


class Spaces:
    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action


def policy_on(observation, actions=3, **options):
    policy = MLPPolicy(Spaces(observation, spaces.Discrete(actions)), hidden=(8,), **options).double()
    with torch.no_grad():  # far from uniform
        policy.actor[-1].weight.mul_(100)
    return policy


BOX = spaces.Box(-1, 1, (2, 2))


def test_law_3_frequencies_match_the_logprob():
    policy = policy_on(BOX)
    obs = np.full((20000, 2, 2), 0.3)
    actions, logprob = policy.act(obs, (np.arange(20000) + 0.5) / 20000)  # a fine grid of uniforms: no noise
    for action in range(3):
        chosen = actions == action
        assert chosen.mean() == pytest.approx(np.exp(logprob[chosen][0]), abs=1e-4)
    assert len(set(actions.tolist())) == 3


def test_the_extremes_of_the_uniform_pick_possible_actions():
    policy = policy_on(BOX)
    with torch.no_grad():
        policy.actor[-1].bias.copy_(torch.tensor([-2000.0, 0.0, -2000.0]))
    actions, logprob = policy.act(np.zeros((2, 2, 2)), np.array([0.0, np.nextafter(1.0, 0.0)]))
    assert actions.tolist() == [1, 1] and logprob.tolist() == [0, 0]


def steps(obs, actions, mask, terminated, final):
    return Trajectories(
        actions=torch.tensor(actions),
        mask=torch.tensor(mask),
        terminated=torch.tensor(terminated),
        truncated=~torch.tensor(terminated),
        obs=obs,
        final_obs=final,
    )


def example(fill=0.0):
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(2, 3, 2, 2, generator=generator).double()
    obs[1, 2] = fill
    final = torch.randn(2, 2, 2, generator=generator).double()
    mask = [[True, True, True], [True, True, False]]
    return steps(obs, [[0, 1, 2], [2, 1, 0]], mask, [True, False], final)


def test_act_and_evaluate_agree():
    policy, traj = policy_on(BOX), example()
    found = policy.evaluate(traj)
    log_p = policy.actor(traj.obs.reshape(6, 4)).log_softmax(dim=1).reshape(2, 3, 3)
    torch.testing.assert_close(found.log_probs()[traj.mask], log_p[traj.mask])
    expected = log_p.gather(2, traj.actions.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found.logprob[traj.mask], expected[traj.mask])
    entropy = -(log_p.exp() * log_p).sum(dim=2)
    torch.testing.assert_close(found.entropy[traj.mask], entropy[traj.mask])
    assert found.logprob[1, 2] == found.entropy[1, 2] == found.value[1, 3] == 0


def test_law_5_the_value_at_the_end_is_that_of_final_obs_only_where_cut():
    policy, traj = policy_on(BOX), example()
    value = policy.evaluate(traj).value
    assert value[0, 3] == 0  # terminated
    expected = policy.critic(traj.final_obs[1].reshape(1, 4)).squeeze()
    torch.testing.assert_close(value[1, 2], expected)
    assert expected.abs() > 1e-3
    traj.terminated, traj.truncated = torch.tensor([True, True]), torch.tensor([False, False])
    assert policy.evaluate(traj).value[1, 2] == 0  # negative control: without the cut there is nothing to add


def test_law_1_masked_observations_are_never_read():
    policy = policy_on(BOX)
    results = []
    for fill in (0.0, float("nan")):
        policy.zero_grad()
        found = policy.evaluate(example(fill))
        (found.logprob.sum() + found.entropy.sum() + found.value.sum()).backward()
        results.append((found.value.detach(), batches.gradients(policy)))
    assert torch.equal(results[0][0], results[1][0])
    assert batches.same(results[0][1], results[1][1])


def test_discrete_observations_become_one_hot():
    policy = policy_on(spaces.Discrete(5, start=2))
    actions, _ = policy.act(np.array([2, 6, 2]), np.array([0.5, 0.5, 0.5]))
    assert actions[0] == actions[2]
    assert policy.actor[0].in_features == 5
    assert policy._features(torch.tensor([2, 6])).tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_the_seed_decides_the_weights_and_no_global_generator():
    before = torch.get_rng_state()
    one, again, other = (policy_on(BOX, seed=seed) for seed in (1, 1, 2))
    assert batches.same(batches.weights(one), batches.weights(again))
    assert not batches.same(batches.weights(one), batches.weights(other))
    assert torch.equal(before, torch.get_rng_state())


def test_it_starts_near_uniform():
    env = batches.control_env()
    policy = MLPPolicy(env)
    _, logprob = policy.act(env.reset(seed=0)[0], np.array([0.1, 0.9]))
    assert logprob == pytest.approx(np.log(0.5), abs=0.01)
    weight = policy.actor[0].weight
    torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(4), atol=1e-5, rtol=0)  # orthogonal, gain sqrt(2)
    inner, last = policy.critic[2].weight, policy.critic[-1].weight
    torch.testing.assert_close(inner @ inner.T, 2 * torch.eye(64), atol=1e-4, rtol=0)
    assert last.norm().item() == pytest.approx(1) and policy.actor[-1].weight[0].norm().item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("observation", "action"),
    [(BOX, spaces.Box(-1, 1, (2,))), (BOX, spaces.Discrete(3, start=1)), (spaces.Text(5), spaces.Discrete(2))],
)
def test_spaces_it_can_not_handle_are_refused(observation, action):
    with pytest.raises(ValueError, match="MLPPolicy needs"):
        MLPPolicy(Spaces(observation, action))
