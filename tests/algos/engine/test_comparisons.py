"""DPO, online DPO, Binary FeedME, K-wise rankings and simulated annotators."""

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lm_envs.algos import registry
from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.comparisons import PreferenceConfig, annotated_pairs, preferences, ranks_of, winners
from lm_envs.algos.online_dpo import extremes
from lm_envs.algos.ops.losses import dpo_loss, masked_mean, nll, plackett_luce_loss
from lm_envs.tasks import load
from lm_envs.tasks.reviews import FOLDER
from lm_envs.training import bradley_terry_loss
from tests import tiny
from tests.algos import batches


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


# Losses


def test_plackett_luce_by_hand():
    scores, rank = rows([1.0, 3.0, 2.0]), torch.tensor([[2, 0, 1]])
    e = math.exp
    expected = -(3 - math.log(e(3) + e(2) + e(1))) - (2 - math.log(e(2) + e(1)))
    assert plackett_luce_loss(scores, rank).item() == pytest.approx(expected)
    both = plackett_luce_loss(rows([1.0, 3.0, 2.0], [0.5, -1.0, 99.0]), torch.tensor([[2, 0, 1], [0, 1, -1]]))
    assert both.item() == pytest.approx((expected + math.log(1 + e(-1.5))) / 2)


def test_of_two_texts_plackett_luce_is_bradley_terry():
    scores = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    rank = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    torch.testing.assert_close(
        plackett_luce_loss(scores, rank), bradley_terry_loss(scores, rank), rtol=1e-12, atol=1e-12
    )


def test_plackett_luce_is_a_distribution_over_rankings():
    scores = rows([0.3, -1.0, 2.0])
    ranks = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    total = sum(math.exp(-plackett_luce_loss(scores, torch.tensor([rank])).item()) for rank in ranks)
    assert total == pytest.approx(1)


def test_plackett_luces_gradient_ignores_absent_texts():
    scores = rows([1.0, 2.0, float("nan")]).requires_grad_()
    plackett_luce_loss(scores, torch.tensor([[0, 1, -1]])).backward()
    assert scores.grad[0, 2] == 0 and not scores.grad.isnan().any()


def test_dpo_by_hand():
    found = dpo_loss(rows([0.5, -1.0]), torch.tensor([[0, 1]]), 0.4)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-0.4 * 1.5)))
    turned = dpo_loss(rows([0.5, -1.0]), torch.tensor([[1, 0]]), 0.4)
    assert turned.item() == pytest.approx(math.log(1 + math.exp(0.4 * 1.5)))


def test_rankings_of_k_weigh_one_over_k_choose_2():
    """DETAILS 10: a prompt counts once, whatever its K."""
    pair, triple = rows([1.0, 0.0, 0.0]), rows([1.0, 0.0, 0.0])
    both = bradley_terry_loss(torch.cat([pair, triple]), torch.tensor([[0, 1, -1], [0, 1, 2]]))
    one, zero = math.log(1 + math.exp(-1)), math.log(2)
    assert both.item() == pytest.approx((one + (2 * one + zero) / 3) / 2)


# Reward modelling


def test_reward_modelling_from_whole_rankings():
    agent = batches.learner("reward-modelling", ranking="plackett-luce", iterations=40, learning_rate=1e-2)
    with torch.no_grad():
        agent.policy.model.score.weight.zero_()
    first = agent.iteration()[1]
    sizes = torch.bincount(agent.data.data.group)
    expected = sum(math.lgamma(int(k) + 1) for k in sizes) / len(sizes)  # log K! of an indifferent model
    assert first["ranking_loss"] == pytest.approx(expected)
    learn(agent)
    assert agent.iteration()[1]["accuracy"] == 1


def test_plackett_luce_refuses_ties():
    tied = preferences([[[1, 2, 3], [1, 2, 4], [1, 2, 5]]], [[0, 1, 1]], 2, 3)
    with pytest.raises(ValueError, match="group 0 two texts share a rank"):
        registry.make_agent("reward-modelling", batches.reward_policy(), data=tied, ranking="plackett-luce")
    registry.make_agent("reward-modelling", batches.reward_policy(), data=tied)


# DPO


def test_dpo_starts_at_log_2_and_orders_its_pairs():
    agent = batches.learner("dpo", iterations=40, learning_rate=1e-2)
    first = agent.iteration()[1]
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == pytest.approx(0, abs=1e-9)
    learn(agent)
    last = agent.iteration()[1]
    assert last["accuracy"] > 0.9 and last["dpo_loss"] < 0.5 and last["margin"] > 0


def test_dpos_gradient_by_hand():
    """-beta * sigmoid(-beta * margin) * (grad log pi(y_w) - grad log pi(y_l)), Rafailov et al. 2023, section 4."""
    data = preferences([[[1, 2, 3, 0], [1, 2, 4]]], [[0, 1]], 2, 6)
    policy = batches.text_policy(batches.text_env())
    agent = registry.make_agent("dpo", policy, data=data, beta=0.3)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)
    batch = next(agent.batches())
    batch = batch.select(slice(2))
    loss, _ = agent.loss(batch, policy.evaluate(batch), {})
    loss.backward()
    found = batches.gradients(policy)
    policy.zero_grad()
    logprob = torch.where(batch.mask, policy.evaluate(batch).logprob, 0.0).sum(1)
    ratio = (logprob - torch.where(batch.mask, batch.ref_logprob, 0.0).sum(1)).detach()
    better = int(batch.rank.argmin())
    margin = 0.3 * (ratio[better] - ratio[1 - better])
    (-0.3 * torch.sigmoid(-margin) * (logprob[better] - logprob[1 - better])).backward()
    for name, gradient in batches.gradients(policy).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)
    assert abs(float(margin)) > 1e-3


def test_dpos_reference_is_the_start_even_after_a_checkpoint():
    agent = batches.learner("dpo", learning_rate=1e-2)
    start = agent.data.data.ref_logprob.clone()
    learn(agent, iterations=3)
    assert torch.equal(agent.data.data.ref_logprob, start)
    moved = batches.text_policy(batches.text_env(), seed=5)
    twin = registry.make_agent("dpo", moved, data=batches.ranked(), **{"episodes": 6})
    twin.restore(*agent.checkpoint())
    assert torch.equal(twin.data.data.ref_logprob, start)


def test_the_optimum_of_dpo_is_the_closed_form():
    """With the preference probabilities of a reward as weights, the minimum over two responses is
    pi ~ ref * exp(r / beta) (Rafailov et al. 2023, eq. 4)."""
    beta, reward, ref = 0.5, rows(0.8, -0.3), rows(0.4, 0.6).log()
    p = torch.sigmoid(reward[0] - reward[1])
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        ratio = (logits.log_softmax(0) - ref)[None]
        first, second = (dpo_loss(ratio, torch.tensor([rank]), beta) for rank in ([0, 1], [1, 0]))
        loss = p * first.double() + (1 - p) * second.double()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (ref + reward / beta).softmax(0)
    torch.testing.assert_close(logits.softmax(0).detach(), expected, rtol=1e-4, atol=1e-5)


# Online DPO


def test_extremes_by_hand():
    value, group = torch.tensor([1.0, 5.0, 2.0, 7.0, 7.0, 0.0]), torch.tensor([1, 0, 1, 1, 0, 0])
    best, worst = extremes(value, group)
    assert best.tolist() == [4, 3] and worst.tolist() == [5, 0]


def test_online_dpo_learns_from_the_best_and_the_worst(monkeypatch):
    agent, traj = batches.learner("online-dpo"), batches.text_batch()
    seen = []
    plain = type(agent).__mro__[1].update
    monkeypatch.setattr(type(agent).__mro__[1], "update", lambda self, t: seen.append(t) or plain(self, t))
    metrics = agent.update(traj)
    by_group = traj.score.reshape(4, 4)
    pairs = seen[0].score.reshape(-1, 2)
    differ = by_group.amax(1) > by_group.amin(1)
    assert torch.equal(pairs[:, 0], by_group.amax(1)[differ]) and torch.equal(pairs[:, 1], by_group.amin(1)[differ])
    assert seen[0].rank.reshape(-1, 2).tolist() == [[0, 1]] * len(pairs)
    assert metrics["score_gap"] == pytest.approx(float((by_group.amax(1) - by_group.amin(1)).mean()))


def test_online_dpo_starts_at_log_2_where_the_policy_is_the_reference():
    env = batches.text_env()
    policy = batches.LMPolicy.for_mdp(env.mdp, tiny.gpt2(seed=0).requires_grad_(True))
    agent = registry.make_agent("online-dpo", policy, **batches.SMALL)
    assert agent.iteration(env)[1]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_equal_scores_teach_online_dpo_nothing():
    agent, traj = batches.learner("online-dpo"), batches.text_batch()
    traj.score = torch.zeros_like(traj.score)
    start = batches.weights(agent.policy)
    assert agent.update(traj)["updates"] == 0 and agent.iterations_done == 1
    assert batches.same(start, batches.weights(agent.policy))
    traj.ref_logprob = None
    with pytest.raises(ValueError, match="ref_logprob"):
        agent.update(traj)


# Binary FeedME


def test_feedme_imitates_winners_alone():
    agent = batches.learner("binary-feedme")
    data = batches.ranked()
    assert len(agent.data) == len(torch.unique(data.group))
    assert torch.equal(agent.data.response, data.response[data.rank == 0]) and agent.data.rank is None
    batch = next(agent.batches())
    loss, _ = agent.loss(batch, agent.policy.evaluate(batch), {})
    torch.testing.assert_close(loss, masked_mean(nll(agent.policy.evaluate(batch).logprob, batch.mask), batch.mask))


# Simulated annotators


def test_annotated_pairs_follow_the_judge():
    task = tiny.task()
    data = annotated_pairs(task, 400, 0.0, seed=1)
    assert data.group.tolist() == [i // 2 for i in range(800)]
    assert (data.rank.reshape(-1, 2).sum(1) == 1).all()
    assert torch.equal(data.prompt[0::2], data.prompt[1::2])
    words = task.tokenizer.batch_decode([row[row >= 0].tolist() for row in data.response], skip_special_tokens=True)
    gold = torch.tensor(tiny.count_b_minus_c(words, words)).reshape(-1, 2)
    margin = gold[:, 0] - gold[:, 1]
    first = data.rank.reshape(-1, 2)[:, 0] == 0
    expected = torch.sigmoid(margin)
    error = (first.double().mean() - expected.mean()).abs()
    assert error < 4 * float((expected * (1 - expected)).mean() / len(first)) ** 0.5
    right = (first == (margin > 0))[margin != 0].double().mean()
    turned = annotated_pairs(task, 400, 1.0, seed=1)  # every choice is recorded the wrong way round
    assert right > 0.6 and torch.equal(turned.rank, 1 - data.rank)
    assert torch.equal(annotated_pairs(task, 400, 0.0, seed=1).rank, data.rank)


def test_annotators_choose_between_the_pairs_that_a_task_comes_with():
    pairs = [(1, [2, 2, 0], [3, 0]), (0, [3, 3, 3, 3, 3, 3], [2, 0]), (4, [2, 0], [3, 0])]
    task = tiny.task(pairs=pairs)  # token 2 is "b", worth 1, and 3 is "c", worth -1
    data = annotated_pairs(task, 2, 0.0, seed=1)
    assert [row[row >= 0].tolist() for row in data.prompt] == [[2, 3], [2, 3], [1], [1]]
    assert [row[row >= 0].tolist() for row in data.response] == [[2, 2, 0], [3, 0], [3, 3, 3, 3, 3, 3], [2, 0]]
    assert data.group.tolist() == [0, 0, 1, 1] and data.rank.tolist() == [0, 1, 1, 0]
    assert annotated_pairs(task, 2, 1.0, seed=1).rank.tolist() == [1, 0, 0, 1]
    more = annotated_pairs(task, 4, 0.0, seed=1)  # sampled, as for a task that comes with fewer
    assert torch.equal(more.response, annotated_pairs(tiny.task(), 4, 0.0, seed=1).response)


def test_reviews_default_annotations_are_those_its_reward_model_learned_from():
    preferred = load_file(FOLDER / "data.safetensors")["preferred"].astype(bool)
    task = load("reviews")
    assert torch.equal(annotated_pairs(task, 8192, 0.25, seed=0).rank, ranks_of(preferred))
    assert torch.equal(annotated_pairs(task, 100, 0.25, seed=0).rank, ranks_of(preferred[:100]))
    other = annotated_pairs(task, 8192, 0.25, seed=1)
    assert (other.rank != ranks_of(preferred)).any() and PreferenceConfig().flip == 0.25


def test_ranks_and_winners_by_hand():
    assert ranks_of(np.array([True, False])).tolist() == [0, 1, 1, 0]
    data = preferences([[[1, 2, 3], [1, 2, 4]], [[1, 2, 5], [1, 2, 6]]], [[0, 1], [1, 0]], 2, 3)
    assert winners(data).response.tolist() == [[3], [6]]


def test_preference_methods_make_their_own_data_from_a_task():
    for name in ("dpo", "binary-feedme", "reward-conditioning"):
        policy = batches.text_policy(batches.text_env())
        agent = registry.make_agent(name, policy, batches.text_task(), pairs=12, episodes=4)
        agent.iteration()
