"""Q critics, and value functions that start as the reward model (DETAILS 9)."""

import copy

import pytest
import torch

from lm_envs.algos import registry
from lm_envs.algos.engine.batching import Before
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.policies.critics import RewardCritic, value_from_reward_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.model.tokens import right_pad
from lm_envs.reward.learned import LearnedReward, raw_scores
from tests import tiny
from tests.algos import batches


def with_random_q(agent):
    with torch.no_grad():
        agent.policy.q_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return agent


# Q


def test_the_value_is_the_mean_of_q_under_the_policy():
    agent, traj = with_random_q(batches.learner("a2c", critic="q")), batches.text_batch()
    found = agent.policy.evaluate(traj)
    mean = (found.log_probs().exp() * found.q_values()).sum(-1)
    torch.testing.assert_close(found.value[:, :-1], torch.where(traj.mask, mean, 0.0))
    assert (found.value[:, -1] == 0).all()
    with pytest.raises(RuntimeError, match="no Q critic"):
        batches.learner("a2c").policy.evaluate(traj).q_values()


@pytest.mark.parametrize("critic", ["v", "q"])
def test_values_that_a_rollout_keeps_are_those_of_a_second_reading(critic):
    """What sampling knows is not computed again; the Q critic's value is not among it, and is."""
    env = batches.text_env()
    agent = batches.learner("a2c", env=env, critic=critic, episodes=8)
    with torch.no_grad():
        for head in filter(None, (agent.policy.q_head, agent.policy.value_head)):
            head.weight.normal_(generator=torch.Generator().manual_seed(1))
    traj = agent.sample(env)
    with torch.no_grad():
        expected = agent.policy.evaluate(traj).value
        found = expected if traj.value is None else traj.value
    assert expected.abs().max() > 0.1 and (traj.value is None) == (critic == "q")
    torch.testing.assert_close(found, expected)


def test_advantage_and_target_of_a_q_critic_by_hand():
    agent = with_random_q(batches.learner("a2c", critic="q", lam=0.6, whiten_advantage=False))
    traj = batches.text_batch()
    before = Before(agent.policy, traj)
    with torch.no_grad():
        fixed = agent.prepare(traj, before)
    now = agent.policy.evaluate(traj)
    q = now.q_values().gather(-1, traj.actions.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(fixed["advantage"], torch.where(traj.mask, q - now.value[:, :-1], 0.0))
    # The lambda-return of (s, a), written without V(s): r + (1 - lambda) V' + lambda G'.
    for i in range(len(traj)):
        future, length = 0.0, int(traj.lengths[i])
        for t in reversed(range(length)):
            following = now.value[i, t + 1].item() if t + 1 < length else 0.0
            future = traj.reward[i, t].item() + (1 - 0.6) * following + 0.6 * (future if t + 1 < length else 0.0)
            assert fixed["target"][i, t].item() == pytest.approx(future, abs=1e-9)


def test_the_q_of_the_action_taken_alone_learns():
    agent, traj = with_random_q(batches.learner("a2c", critic="q", value_coef=1.0)), batches.text_batch()
    with torch.no_grad():
        fixed = agent.prepare(traj, Before(agent.policy, traj))
    now = agent.policy.evaluate(traj)
    q = now.q_values()
    q.retain_grad()
    now.q = lambda: q
    agent.loss(traj, now, fixed)[0].backward()
    taken = torch.zeros_like(q, dtype=torch.bool).scatter(-1, traj.actions.unsqueeze(-1), True)
    taken &= traj.mask.unsqueeze(-1)
    assert (q.grad[~taken] == 0).all() and (q.grad[taken] != 0).all()


@pytest.mark.parametrize("kind", ["v", "q"])
def test_with_an_exact_critic_the_expected_gradient_is_exact(kind):
    """One state, four actions, by enumeration: A = Q - E Q, and A = r - V, have the gradient of the mean reward."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1]).double().requires_grad_()
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    p = logits.softmax(0)
    exact = torch.autograd.grad((p * reward).sum(), logits, retain_graph=True)[0]
    advantage = reward - (p.detach() * reward).sum()
    if kind == "v":
        value = torch.tensor([[(p * reward).sum().item(), 0.0]] * 4).double()
        advantage = adv.gae(reward[:, None], value, torch.ones(4, 1).bool())[:, 0]
    found = torch.autograd.grad((p.detach() * advantage * logits.log_softmax(0)).sum(), logits)[0]
    torch.testing.assert_close(found, exact)


@pytest.mark.slow
def test_a_q_critic_learns_on_text_and_on_control():
    env = batches.text_env()
    agent = batches.learner("a2c", env=env, critic="q", iterations=20, episodes=64, learning_rate=1e-2, value_coef=1.0)
    found = [agent.iteration(env)[1] for _ in range(20)]
    assert found[-1]["score"] > found[0]["score"] + 0.5
    settings = dict(critic="q", iterations=40, learning_rate=2e-2, value_coef=3.0)
    agent, batch = batches.learner("a2c", **settings), batches.text_batch()
    losses = [agent.update(batch)["value_loss"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    traj, policy = batches.control_batch()
    policy = copy.deepcopy(policy)
    before = policy.evaluate(traj)
    settings = settings | {"episodes": 6, "gamma": 0.9, "max_grad_norm": 1e9}
    agent = registry.make_agent("a2c", policy, **settings)
    torch.testing.assert_close(policy.evaluate(traj).value, before.value)  # all actions start alike
    losses = [agent.update(traj)["value_loss"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_truncated_rows_bootstrap_from_the_mean_of_q():
    traj, policy = batches.control_batch()
    traj.terminated, traj.truncated = ~torch.ones(len(traj), dtype=torch.bool), torch.ones(len(traj), dtype=torch.bool)
    policy.use_q_critic()
    with torch.no_grad():
        policy.critic[-1].bias.copy_(torch.tensor([1.0, -3.0]))
        found = policy.evaluate(traj).value.gather(1, traj.lengths[:, None]).squeeze(1)
        features = policy._features(traj.final_obs)
        expected = (policy.actor(features).softmax(-1) * policy.critic(features)).sum(-1)
    torch.testing.assert_close(found, expected)


def test_no_q_on_the_bandit_face():
    with pytest.raises(ValueError, match="an MDP env"):
        batches.learner("a2c", "bandit", critic="q")


# From the reward model


def test_a_value_head_starts_at_zero():
    env = batches.text_env()
    policy = LMPolicy.for_mdp(env.mdp, tiny.gpt2(seed=1).requires_grad_(True))
    assert (policy.evaluate(batches.text_batch()).value == 0).all()
    policy.use_q_critic()
    found = policy.evaluate(batches.text_batch())
    assert (found.value == 0).all() and (found.q_values() == 0).all()


def test_the_value_starts_as_the_reward_models_score_of_what_stands_before_the_token():
    agent, traj = batches.learner("ppo", value_from="reward_model"), batches.text_batch()
    value = agent.policy.evaluate(traj).value.detach()
    model = batches.reward_policy().model
    for i in range(len(traj)):
        prompt = traj.prompt[i][traj.prompt[i] >= 0].tolist()
        response = traj.response[i][traj.response[i] >= 0].tolist()
        prefixes = right_pad([prompt + response[:t] for t in range(len(response))])
        expected = (raw_scores(model, prefixes) - 0.3) / 2.0
        torch.testing.assert_close(value[i, : len(response)], expected.detach())
        assert (value[i, len(response) :] == 0).all()


@pytest.mark.parametrize("kind", ["single", "independent"])
@pytest.mark.parametrize("output", ["log_odds", "logit", "probability"])
def test_the_values_label_and_output_are_the_rewards(output, kind):
    """With three labels, the critic reads the first one. Before each token it gives the reward of the text so far."""
    model = batches.reward_policy().model
    model.config.num_labels = model.num_labels = 3
    model.score = torch.nn.Linear(16, 3, bias=False).double()
    model.config.problem_type = "multi_label_classification" if kind == "independent" else None
    reward = LearnedReward(model, tiny.tokenizer(), normalise=(0.3, 2.0), label=0, output=output)
    found = RewardCritic(reward)(torch.tensor([[-1, 5, 2]]), torch.tensor([[3, 1, 0]]))
    expected = [(x - 0.3) / 2.0 for x in reward.raw([[5, 2], [5, 2, 3], [5, 2, 3, 1]])]
    assert found[0].tolist() == pytest.approx(expected)


def test_it_learns_and_leaves_the_reward_model_alone():
    traj, policy = batches.text_batch(), batches.text_policy(batches.text_env())
    task = batches.learned_task()
    frozen = batches.weights(task.reward.model)
    agent = registry.make_agent("ppo", policy, task, value_from="reward_model", value_clip=None, **batches.SMALL)
    assert isinstance(policy.critic, RewardCritic)
    start, first = batches.weights(policy.critic), agent.update(traj)["value_loss"]
    for _ in range(5):
        last = agent.update(traj)["value_loss"]
    assert last < first and not batches.same(start, batches.weights(policy.critic))
    assert batches.same(frozen, batches.weights(task.reward.model))


def test_what_can_not_start_from_the_reward_model_is_refused():
    env = batches.text_env()
    with pytest.raises(ValueError, match="needs a task whose reward"):
        registry.make_agent("ppo", batches.text_policy(env), tiny.task(), value_from="reward_model")
    with pytest.raises(ValueError, match="needs the task"):
        load = registry.load("ppo")
        load(batches.text_policy(env), load.Config(value_from="reward_model"))
    with pytest.raises(ValueError, match="language-model"):
        registry.make_agent("ppo", batches.control_batch()[1], tiny.task(), value_from="reward_model")
    other = tiny.tokenizer()
    other.add_tokens(["another"])
    task = tiny.task(reward=LearnedReward(batches.reward_policy().model, other))
    with pytest.raises(ValueError, match="share a tokenizer"):
        value_from_reward_model(batches.text_policy(env), task)
