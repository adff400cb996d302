"""Reward tokens, and what learns with them: Quark and reward conditioning."""

import pytest
import torch

from lm_envs.algos.engine.agent import learn
from lm_envs.algos.policies.reward_tokens import ExtendedEmbedding, prepend, without_tokens
from lm_envs.algos.quark import Quark, quantiles
from lm_envs.algos.reward_conditioning import BETTER, signed
from lm_envs.env.rollout import collect, rollout
from tests import tiny
from tests.algos import batches

V = len(tiny.WORDS)


def conditioned_policy(kind="mdp", token=1):
    env = batches.text_env(kind)
    policy = batches.text_policy(env, kind)
    policy.add_reward_tokens(2)
    with torch.no_grad():
        extra = policy.model.get_input_embeddings().extra
        extra.copy_(torch.randn(extra.shape, generator=torch.Generator().manual_seed(3)))
    if token is not None:
        policy.condition_on(token)
    return env, policy


def test_prepend_by_hand():
    prompt = torch.tensor([[-1, -1, 5], [7, 8, 9]])
    assert prepend(prompt, 10).tolist() == [[-1, -1, 10, 5], [10, 7, 8, 9]]
    both = prepend(prompt, torch.tensor([10, 11]))
    assert both.tolist() == [[-1, -1, 10, 5], [11, 7, 8, 9]]
    assert without_tokens(both, 10).tolist() == [[-1, -1, -1, 5], [-1, 7, 8, 9]]


def test_the_embedding_keeps_its_first_rows_and_its_tie():
    model = tiny.gpt2()
    base = model.get_input_embeddings()
    model.set_input_embeddings(ExtendedEmbedding(base, 2))
    ids = torch.tensor([[1, V, V + 1]])
    found = model.get_input_embeddings()(ids)
    torch.testing.assert_close(found[0, 0], base.weight[1])
    assert 0.3 < (found[0, 1] - base.weight.mean(0)).std() / base.weight.std() < 3  # rows like the others
    assert (found[0, 1] - found[0, 2]).abs().max() > 0.1 * base.weight.std()
    wide = torch.nn.Embedding(50, 400)
    with torch.no_grad():
        wide.weight.copy_(torch.randn(50, 400) * torch.linspace(0.1, 5, 400) + 7)
    extra, table = ExtendedEmbedding(wide, 3).extra, wide.weight
    away = (extra - table.mean(dim=0)) / table.std(dim=0)  # a normal draw in units of each column
    assert away.mean().item() == pytest.approx(0, abs=0.12) and away.std().item() == pytest.approx(1, abs=0.1)
    assert model.get_output_embeddings().weight is base.weight  # GPT-2 ties them
    assert model(ids).logits.shape[-1] == V  # it can be read and not written


def test_each_row_gets_its_own_gradient():
    embedding = ExtendedEmbedding(torch.nn.Embedding(4, 3), 2)
    embedding(torch.tensor([1, 5])).sum().backward()
    assert embedding.extra.grad.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert embedding.base.weight.grad[1].tolist() == [1, 1, 1] and embedding.base.weight.grad[0].sum() == 0


def test_until_it_is_asked_the_policy_is_as_it_was():
    traj = batches.text_batch()
    plain = batches.text_policy(batches.text_env()).evaluate(traj)
    found = conditioned_policy(token=None)[1].evaluate(traj)
    assert torch.equal(found.logprob, plain.logprob) and torch.equal(found.value, plain.value)


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
def test_sampling_stored_and_evaluated_logprob_are_of_one_distribution(kind):
    """Law 7 and law 2 with a token before the prompt: both paths, and a token given in the prompt."""
    env, policy = conditioned_policy(kind)
    bulk = rollout(env, policy, episodes=24, seed=3)
    step = collect(env, policy, episodes=24, seed=3)
    assert torch.equal(bulk.response, step.response)
    torch.testing.assert_close(bulk.logprob, step.logprob)
    now = policy.evaluate(bulk)
    torch.testing.assert_close(now.logprob.detach(), bulk.logprob)
    explicit = bulk.select(slice(None))
    explicit.prompt = prepend(bulk.prompt, V + 1)
    torch.testing.assert_close(policy.evaluate(explicit).logprob, now.logprob)
    explicit.prompt = prepend(bulk.prompt, V)  # negative control: another token is another policy
    assert (policy.evaluate(explicit).logprob - now.logprob).abs().max() > 1e-3


def test_the_envs_vocabulary_and_reference_are_untouched():
    env, policy = conditioned_policy()
    traj = rollout(env, policy, episodes=64, seed=0)
    assert int(traj.response.max()) < V and env.single_action_space.n == V
    assert traj.prompt.shape[1] == env.mdp.prompt_length and int(traj.prompt.max()) < V
    assert policy.evaluate(traj).log_probs().shape[-1] == V


def test_the_token_is_saved_with_the_weights():
    _, policy = conditioned_policy(token=0)
    assert int(policy.state_dict()["condition"]) == 0
    assert "condition" not in batches.text_policy(batches.text_env()).state_dict()


# Quark


def test_quantiles_by_hand():
    assert quantiles(torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0, 0.0]), 3).tolist() == [2, 0, 1, 1, 2, 0]
    assert quantiles(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2).tolist() == [0, 0, 1, 1]
    assert quantiles(torch.arange(7.0), 3).bincount().tolist() == [3, 2, 2]


def spied(monkeypatch, agent, *trajs):
    """What the engine is given to learn from."""
    seen = []
    plain = Quark.__mro__[1].update
    monkeypatch.setattr(Quark.__mro__[1], "update", lambda self, t: seen.append(t) or plain(self, t))
    for traj in trajs:
        agent.update(traj)
    return seen


def test_each_episode_is_learned_with_the_token_of_its_quantile(monkeypatch):
    traj = batches.text_batch()
    agent = batches.learner("quark", quantiles=4)
    (drawn,) = spied(monkeypatch, agent, traj)
    token = drawn.prompt[drawn.prompt >= V] - V
    assert len(token) == len(drawn) == 16 and token.bincount().tolist() == [4, 4, 4, 4]
    means = [float(drawn.score[token == k].mean()) for k in range(4)]
    assert means == sorted(means) and means[0] < means[-1]
    assert int(agent.policy.condition) == 3


def test_the_pool_grows_and_forgets_the_oldest(monkeypatch):
    first, second = batches.text_batch(), batches.text_batch(seed=1)
    whole = batches.learner("quark")
    spied(monkeypatch, whole, first, second)
    assert torch.equal(whole._pool.score, torch.cat([first.score, second.score]))
    short = batches.learner("quark", pool=20)
    drawn = spied(monkeypatch, short, first, second)
    assert torch.equal(short._pool.score, torch.cat([first.score, second.score])[-20:])
    assert len(drawn[-1]) == 16  # as many as were sampled


def test_alpacafarms_form_learns_from_the_best_quantile_alone(monkeypatch):
    traj = batches.text_batch()
    agent = batches.learner("quark", quantiles=4, best_only=True)
    (drawn,) = spied(monkeypatch, agent, traj)
    assert (drawn.prompt[drawn.prompt >= V] == V + 3).all()
    assert sorted(drawn.score.tolist()) == sorted(traj.score.tolist())[-4:]


def test_quarks_loss_by_hand():
    traj = batches.text_batch()
    agent = batches.learner("quark", kl_coef=0.4, entropy_coef=0.2)
    agent.update(traj)
    drawn = agent._pool.select(slice(8))
    plain, drawn.prompt = drawn.prompt, prepend(drawn.prompt, V + 2)
    now = agent.policy.evaluate(drawn)
    loss, _ = agent.loss(drawn, now, {})
    unconditioned = drawn.select(slice(None))
    unconditioned.prompt = plain
    log_q = agent.reference.evaluate(unconditioned).log_probs()
    log_p = now.log_probs()
    kl, entropy = (log_p.exp() * (log_p - log_q)).sum(-1), -(log_p.exp() * log_p).sum(-1)
    expected = (-now.logprob + 0.4 * kl - 0.2 * entropy)[drawn.mask].mean()
    torch.testing.assert_close(loss, expected)


def test_quark_samples_without_a_token_first_and_puts_the_penalty_in_the_loss():
    env = batches.text_env()
    agent = batches.learner("quark", env=env)
    agent.reference = None
    traj, metrics = agent.iteration(env)
    assert agent.reference is not None and env.mdp.charged_kl_coef == 0 and metrics["kl_coef"] == 0.05
    plain = rollout(env, batches.text_policy(env), episodes=16, seed=0)
    assert torch.equal(traj.response, plain.response)
    assert metrics["token_kl"] > 0


def test_the_best_token_is_better_than_the_worst():
    env = batches.text_env()
    agent = batches.learner("quark", env=env, episodes=32, iterations=24, learning_rate=2e-2)
    learn(agent, env)
    score = []
    for token in (0, agent.config.quantiles - 1):
        agent.policy.condition_on(token)
        score.append(float(rollout(env, agent.policy, episodes=256, seed=9).score.mean()))
    assert score[1] > score[0] + 0.5


def test_quark_is_for_text():
    with pytest.raises(ValueError, match="language-model policies"):
        batches.make_agent("quark", batches.control_batch()[1])


# Binary reward conditioning


def test_signs_by_hand():
    data = batches.ranked()
    rows = signed(data, V)
    token = rows.prompt[rows.prompt >= V] - V
    assert token.tolist() == [int(rank == 0) for rank in data.rank.tolist()]
    assert rows.rank is None and torch.equal(rows.response, data.response)


def test_reward_conditioning_tells_good_from_bad_and_samples_on_good():
    agent = batches.learner("reward-conditioning", episodes=18, iterations=60, learning_rate=1e-2)
    traj, _ = agent.iteration()
    assert int(agent.policy.condition) == BETTER
    learn(agent)
    data = agent.data
    good = data.prompt[data.prompt >= V] == V + 1
    right = agent.policy.evaluate(data).logprob.sum(1)
    other = data.select(slice(None))
    other.prompt = torch.where(data.prompt >= V, 2 * V + 1 - data.prompt, data.prompt)
    wrong = agent.policy.evaluate(other).logprob.sum(1)
    assert (right - wrong)[good].mean() > 1 and (right - wrong)[~good].mean() > 1
    env = batches.text_env()
    traj = rollout(env, agent.policy, episodes=8, seed=0)
    assert bool(traj.logprob.isfinite().all())
