"""Rows that an agent leaves out of a sampled batch are charged, never sampled again, and replaced on demand."""

import json

import pytest
import torch

from lm_envs.algos.engine.agent import learn
from lm_envs.algos.ops.advantages import differing
from lm_envs.algos.registry import load, make_agent, make_config
from tests.algos import batches


def spied(agent):
    """Every batch that is sampled and every one that is learned from."""
    sampled, learned = [], []
    sample, update = agent.sample, agent.update
    agent.sample = lambda env: sampled.append(sample(env)) or sampled[-1]
    agent.update = lambda traj: learned.append(traj) or update(traj)
    return sampled, learned


def filtering(name="grpo", env=None, group_size=2, **settings):
    """Two responses a prompt, whose scores, small whole numbers, are often equal."""
    env = env or batches.text_env(group_size=group_size)
    return batches.learner(name, env=env, group_size=group_size, informative=True, **settings), env


def keeping(rows_of, name="reinforce", **settings):
    class Keeping(load(name)):
        def select(self, traj):
            return rows_of(traj)

    env = batches.text_env()
    return Keeping(batches.text_policy(env), Keeping.Config(episodes=16, group_size=4, **settings)), env


def test_groups_that_differ_by_hand():
    x = torch.tensor([0.1 + 0.2, 1.0, 0.3, 2.0, 0.3, 5.0, 0.3])
    group = torch.tensor([7, 4, 3, 4, 3, 9, 3])
    assert differing(x, group).tolist() == [False, True, False, True, False, False, False]
    assert differing(torch.tensor([1.0, 1.0, 2.0])).all() and not differing(torch.ones(3)).any()


@pytest.mark.parametrize("draws", [1, 4])
def test_what_is_dropped_is_charged_and_never_sampled_again(draws):
    agent, env = filtering(draws=draws)
    sampled, learned = spied(agent)
    metrics = [agent.iteration(env)[1] for _ in range(2)]
    sizes = [len(traj) for traj in sampled]
    assert agent.episodes_done == agent.samples_done == agent.reward_calls == sum(sizes) > sum(map(len, learned)) > 0
    assert agent.tokens_done == agent.steps_done == sum(int(traj.response_lengths.sum()) for traj in sampled)
    groups = torch.cat([traj.group for traj in sampled])
    assert groups.tolist() == [i // 2 for i in range(len(groups))]
    for traj in learned:
        assert differing(traj.score, traj.group).all()
    assert metrics[0]["dropped"] == pytest.approx(1 - len(learned[0]) / (sum(sizes[: metrics[0]["draws"]])))
    if draws == 1:
        assert sizes == [16, 16] and [m["draws"] for m in metrics] == [1, 1]
    else:  # each draw samples what is missing
        left = 16
        for traj in sampled[: metrics[0]["draws"]]:
            assert len(traj) == left
            left -= int(differing(traj.score, traj.group).sum())
        assert left == 0 and len(learned[0]) == 16 and metrics[0]["draws"] > 1


def test_the_batch_and_its_metrics_are_those_of_everything_sampled():
    agent, env = filtering(draws=4)
    sampled, _ = spied(agent)
    traj, metrics = agent.iteration(env)
    scores = torch.cat([part.score for part in sampled])
    assert torch.equal(traj.score, scores) and len(sampled) > 1
    assert metrics["score"] == pytest.approx(float(scores.mean()))


def test_rows_keep_their_prompts_and_weights():
    agent, env = filtering(draws=4)
    sampled, learned = spied(agent)
    agent.iteration(env)
    kept = [traj.select(differing(traj.score, traj.group)) for traj in sampled]
    for field in ("prompt_index", "group", "sampled_by", "score"):
        assert torch.equal(getattr(learned[0], field), torch.cat([getattr(traj, field) for traj in kept])), field


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_resumed_run_drops_and_draws_the_same(name):
    (agent, env), (twin, twin_env) = filtering(name, draws=3), filtering(name, draws=3)
    learn(agent, env, 2)
    tensors, counters = agent.checkpoint()
    twin.restore(tensors, json.loads(json.dumps(counters)))
    learn(agent, env, 2)
    learn(twin, twin_env, 2)
    assert agent.checkpoint()[1] == twin.checkpoint()[1] and agent.episodes_done > 4 * 16
    assert batches.same(batches.weights(agent.policy), batches.weights(twin.policy))


def test_the_micro_batch_size_does_not_matter():
    ends = []
    for size in (None, 3):
        agent, env = filtering(draws=3, micro_batch=size, minibatches=1, learning_rate=1e-2)
        agent.iteration(env)
        ends.append(batches.weights(agent.policy))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=0, atol=1e-6)


def test_of_nothing_nothing_is_learned():
    agent, env = keeping(lambda traj: torch.zeros(len(traj), dtype=torch.bool), draws=2)
    before = batches.weights(agent.policy)
    _, metrics = agent.iteration(env)
    assert metrics["dropped"] == 1 and metrics["draws"] == 2 and metrics["updates"] == 0
    assert batches.same(before, batches.weights(agent.policy))
    assert (agent.iterations_done, agent.episodes_done, agent.reward_calls) == (1, 32, 32)


@pytest.mark.parametrize("kind", ["mask", "indices"])
def test_a_selection_of_ones_own(kind):
    mask = torch.arange(16) % 8 < 4
    agent, env = keeping(lambda traj: mask if kind == "mask" else mask.nonzero().squeeze(1))
    _, learned = spied(agent)
    traj, metrics = agent.iteration(env)
    assert metrics["dropped"] == 0.5 and torch.equal(learned[0].group, traj.group[mask])
    whole, env = keeping(lambda traj: None)
    assert "dropped" not in whole.iteration(env)[1]


def test_steps_of_control_are_drawn_again_too():
    class Longer(load("ppo")):
        def select(self, traj):
            return torch.arange(len(traj)) == 0

    env = batches.control_env(rows=4)
    settings = make_config("ppo", steps=32, episodes=None, draws=3)
    agent = Longer(batches.MLPPolicy(env), settings)
    traj, metrics = agent.iteration(env)
    assert metrics["draws"] == 3 and agent.steps_done == 96 and metrics["dropped"] == pytest.approx(1 - 3 / len(traj))
    agent = make_agent("rloo", batches.MLPPolicy(env), episodes=4, group_size=2, informative=True)
    assert agent.iteration(env)[1]["dropped"] in (0, 1)  # one group


@pytest.mark.parametrize("name", ["grpo", "ppo", "reinforce"])
def test_a_group_of_one_cannot_be_informative(name):
    with pytest.raises(ValueError, match="informative.*group_size >= 2"):
        make_config(name, informative=True, group_size=1)
