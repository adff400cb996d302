"""Iterated RLHF: rounds of annotation, reward modelling and PPO."""

import pytest
import torch

from lm_envs import rng
from lm_envs.algos import iterated_rlhf
from lm_envs.algos.engine.agent import learn
from lm_envs.algos.engine.judged_pairs import judge_pairs
from lm_envs.env.rollout import rollout
from lm_envs.reward.learned import LearnedReward
from tests import tiny
from tests.algos import batches


def ran(iterations, **settings):
    env = batches.env_for("iterated-rlhf")
    agent = batches.learner("iterated-rlhf", env=env, iterations=4, **settings)
    found = []
    learn(agent, env, iterations, callback=lambda agent, traj, metrics: found.append((traj, metrics)))
    return agent, env, found


def test_a_reward_model_per_round_on_all_data_so_far():
    agent, env, found = ran(4, rounds=2)
    assert [metrics.get("round") for _, metrics in found] == [0, None, 1, None]
    assert [metrics.get("annotations") for _, metrics in found] == [128, None, 256, None]
    assert len(agent._texts) == len(agent._choices) == 256
    assert env.mdp.task.reward is agent.reward


def test_the_policy_is_paid_by_the_rounds_reward_model():
    agent, env, found = ran(1)
    traj = found[0][0]
    paid = env.mdp.score(traj.prompt_index.numpy(), traj.response.numpy()).sum(1)
    torch.testing.assert_close(traj.score, torch.from_numpy(paid))
    theirs = batches.learned_task().reward
    texts = env.mdp.texts(traj.prompt.numpy(), traj.response.numpy())
    assert not torch.allclose(traj.score, torch.tensor(theirs(*texts)).double(), atol=1e-2)


def test_the_reward_model_learns_what_the_judge_likes():
    agent, _, found = ran(1, annotations=1024, rm_steps=120)
    metrics = found[0][1]
    assert metrics["rm_accuracy"] > 0.85 > 0.75 > metrics["rm_accuracy_before"]  # the task's is untrained
    turned, _, found = ran(1, annotations=1024, rm_steps=120, flip=1.0)  # negative control
    assert found[0][1]["rm_accuracy"] < 0.15


@pytest.mark.slow
def test_the_second_round_compares_what_the_policy_writes_then():
    agent, env, found = ran(3, rounds=2, learning_rate=2e-2, episodes=64, annotations=2048, rm_steps=120)
    before, after = agent._texts[:1024], agent._texts[1024:]
    b = tiny.WORDS.index("b")
    first, second = (sum(text.count(b) for pair in part for text in pair) / 2048 for part in (before, after))
    assert second > first + 0.3
    held = judge_pairs(env.mdp, agent.policy, 10_000, 16, 0)
    assert 0 <= held.accuracy(agent.reward) <= 1
    assert held.samples.prompts[0::2] == held.samples.prompts[1::2]


def test_scores_are_in_units_of_the_starts_samples_in_every_round():
    agent, _, _ = ran(3, rounds=2, held_out=128)
    env = batches.env_for("iterated-rlhf")
    env.mdp.task = env.mdp.task.__class__(**{**env.mdp.task.__dict__, "reward": agent.reward})
    start = rollout(env, batches.text_policy(env), episodes=512, seed=5)
    assert float(start.score.mean()) == pytest.approx(0, abs=0.3)
    assert float(start.score.std()) == pytest.approx(1, abs=0.3)


def test_units_are_those_of_the_first_round():
    agent, env, _ = ran(1, rounds=2)
    first = [list(pair) for pair in agent._units]
    assert len(first) == batches.ROUNDS["held_out"]
    learn(agent, env, 2)
    assert agent.rounds_done == 2 and agent._units == first
    mean, std = agent.reward.normalise
    raw = LearnedReward(agent.reward.model, tiny.tokenizer()).raw([text for pair in first for text in pair])
    assert (mean, std) == pytest.approx((raw.mean(), raw.std()), rel=1e-5)


def test_what_sampling_for_annotators_costs_is_counted():
    agent, _, found = ran(1, rounds=1)
    assert agent.tokens_done > int(found[0][0].response_lengths.sum()) + 2 * (256 + 32)


def test_the_task_is_shared_and_stays_as_it_was():
    task = batches.learned_task()
    env = batches.KINDS["mdp"](task, 8, group_size=4)
    reward, frozen = task.reward, batches.weights(task.reward.model)
    learn(batches.learner("iterated-rlhf", env=env), env, 1)
    assert task.reward is reward and batches.same(frozen, batches.weights(reward.model))


def test_it_needs_a_judge_and_a_learned_reward():
    agent = batches.learner("iterated-rlhf")
    with pytest.raises(ValueError, match="learned reward model to make its own like"):
        agent.iteration(batches.text_env())
    task = tiny.task(reward=LearnedReward(batches.reward_policy().model, tiny.tokenizer()), judge=None)
    with pytest.raises(ValueError, match="needs a judge"):
        agent.iteration(batches.KINDS["mdp"](task, 8, group_size=4))
    with pytest.raises(ValueError, match="text env"):
        agent.iteration(batches.control_env())


def test_a_checkpoint_before_the_first_round_and_one_of_a_checkpoint():
    agent = batches.learner("iterated-rlhf")
    tensors, counters = agent.checkpoint()
    twin = batches.learner("iterated-rlhf")
    twin.restore(tensors, counters)
    assert twin.rounds_done == 0
    agent, _, _ = ran(2)
    twin.restore(*agent.checkpoint())
    again = twin.checkpoint()  # restored, but not yet used
    assert batches.same(again[0], agent.checkpoint()[0]) and again[1] == agent.checkpoint()[1]


def test_each_round_has_annotators_of_its_own(monkeypatch):
    """With the same ones, pair i of every round would be judged, and mistaken, by the same random number."""
    seeds, whole = [], iterated_rlhf.annotate

    def annotate(*gold, flip, seed):
        seeds.append(seed)
        return whole(*gold, flip=flip, seed=seed)

    monkeypatch.setattr(iterated_rlhf, "annotate", annotate)
    ran(4, rounds=2)
    assert len(seeds) == len(set(seeds)) == 2


def test_pairs_of_other_numbers_are_sampled_with_other_random_numbers(monkeypatch):
    used, whole = [], rng.uniform

    def uniform(seed, stream, episode, position=0):
        if stream == rng.TOKEN:
            used.extend(episode.ravel().tolist())
        return whole(seed, stream, episode, position)

    env = batches.env_for("iterated-rlhf")
    monkeypatch.setattr(rng, "uniform", uniform)
    for first, count in ((0, 3), (3, 2), (5, 1)):
        judge_pairs(env.mdp, batches.text_policy(env), first, count, 0)
    assert len(used) == len(set(used)) == 2 * 6
