"""XPO: its loss by hand, what it reduces to, what it is charged for, and what the bonus does."""

import pytest
import torch

from lm_envs.algos.engine.agent import Agent, learn
from lm_envs.algos.engine.preference_losses import preference_loss
from lm_envs.algos.registry import make_config
from tests.algos import batches


def joined(monkeypatch, **settings):
    """The pairs that it makes of a batch, with its agent and the batch."""
    env = batches.text_env(group_size=1)
    agent, seen = batches.learner("xpo", env=env, group_size=1, **settings), []
    plain = Agent.update
    monkeypatch.setattr(Agent, "update", lambda self, rows: seen.append(rows) or plain(self, rows))
    traj, metrics = agent.iteration(env)
    return agent, traj, seen[0], metrics, env


def test_a_pair_is_a_sample_of_the_policy_and_one_of_the_reference(monkeypatch):
    agent, traj, pairs, metrics, env = joined(monkeypatch)
    own, other = pairs.select(slice(0, None, 2)), pairs.select(slice(1, None, 2))
    score = [
        torch.tensor(env.mdp.score(torch.zeros(len(x)).long().numpy(), x.response.numpy()).sum(1)) for x in (own, other)
    ]
    assert own.rank.tolist() == (score[0] < score[1]).long().tolist() == (1 - other.rank).tolist()
    assert not (score[0] == score[1]).any() and len(own) < 16  # ties are skipped
    kept = torch.stack([(traj.response == row).all(dim=1).any() for row in own.response])
    assert bool(kept.all())
    reference = batches.LMPolicy.for_mdp(env.mdp, env.mdp.reference).evaluate(pairs).logprob
    torch.testing.assert_close(pairs.ref_logprob[pairs.mask], reference.detach()[pairs.mask])
    assert agent.samples_done == agent.reward_calls == 32 and agent.episodes_done == 16
    wins = float((score[0] > score[1]).sum()) + 0.5 * (16 - len(own))
    assert metrics["win_share"] == pytest.approx(wins / 16)


def test_its_loss_by_hand(monkeypatch):
    """The pair loss and the mean log-probability of the reference's samples."""
    agent, _, pairs, _, _ = joined(monkeypatch, optimism=0.25)
    now = agent.policy.evaluate(pairs)
    covered = torch.where(pairs.mask, now.logprob, 0.0).sum(dim=1)[1::2].mean()
    torch.testing.assert_close(
        agent.loss(pairs, now, {})[0], preference_loss(pairs, now, agent.config)[0] + 0.25 * covered
    )
    agent.config.optimism = 0.0  # reduces to DPO on the same pairs
    torch.testing.assert_close(agent.loss(pairs, now, {})[0], preference_loss(pairs, now, agent.config)[0])


def test_micro_batches_keep_pairs_in_order(monkeypatch):
    ends = []
    for size in (None, 4):
        agent, *_ = joined(monkeypatch, optimism=0.25, micro_batch=size)
        ends.append(batches.weights(agent.policy))
    for key, weight in ends[0].items():
        torch.testing.assert_close(ends[1][key], weight, rtol=1e-6, atol=1e-8)


def test_the_bonus_leaves_what_the_reference_covers():
    covered = []
    for optimism in (0.0, 0.5):
        env = batches.text_env(group_size=1)
        agent = batches.learner("xpo", env=env, group_size=1, optimism=optimism, learning_rate=1e-2)
        learn(agent, env, 6)
        covered.append(agent.iteration(env)[1]["covered"])
    assert covered[1] < covered[0] - 0.5


def test_equal_scores_teach_nothing_and_bad_input_is_refused(monkeypatch):
    agent = batches.learner("xpo")
    traj, start = batches.text_batch(), batches.weights(agent.policy)
    monkeypatch.setattr(agent.mdp, "score", lambda index, response: traj.score[:, None].numpy())
    assert agent.update(traj)["updates"] == 0 and batches.same(start, batches.weights(agent.policy))
    agent.mdp = None
    with pytest.raises(ValueError, match="set .mdp"):
        agent.update(traj)
    for loss in ("kto", "simpo", "orpo"):
        with pytest.raises(ValueError, match="xpo learns from pairs"):
            make_config("xpo", loss=loss)
