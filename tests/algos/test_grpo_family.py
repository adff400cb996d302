"""GRPO's relatives and ReMax: by hand, what reduces to what, and means that do not depend on how a batch is cut."""

import pytest
import torch

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.ops.advantages import overlong_penalty
from lm_envs.algos.registry import make_agent, make_config
from tests.algos import batches

OFF = {"clip_high": None, "informative": False, "draws": 1, "overlong": 0.0}
MEANS = ["response", "token", "sum"]


def prepared(name, traj, **settings):
    agent = batches.learner(name, **settings)
    with torch.no_grad():
        return agent, agent.prepare(traj, Before(agent.policy, traj))


def ends(name, traj, **settings):
    agent = batches.learner(name, epochs=2, minibatches=2, learning_rate=1e-2, **settings)
    agent.update(traj)
    return batches.weights(agent.policy)


def steps(name, traj, count, monkeypatch, **settings):
    """The gradients of a pass, without a step between them."""
    agent, found = batches.learner(name, epochs=1, minibatches=count, max_grad_norm=1e9, **settings), []
    monkeypatch.setattr(agent.optimizer, "step", lambda: found.append(batches.gradients(agent.policy)))
    agent.update(traj)
    return found


@pytest.mark.parametrize("name, mean", [(name, mean) for name in ("dapo", "ppo") for mean in MEANS])
def test_the_mean_over_a_batch_does_not_depend_on_its_minibatches(name, mean, monkeypatch):
    traj, off = batches.text_batch(), OFF if name == "dapo" else {}
    (whole,) = steps(name, traj, 1, monkeypatch, loss_mean=mean, **off)
    parts = steps(name, traj, 3, monkeypatch, loss_mean=mean, micro_batch=4, **off)  # 6, 5 and 5 rows
    for key, gradient in whole.items():
        torch.testing.assert_close(sum(part[key] for part in parts) / 3, gradient, rtol=1e-9, atol=1e-12)


def test_a_mean_over_each_minibatch_depends_on_them(monkeypatch):
    """Negative control, and PPO's default."""
    traj = batches.text_batch()
    (whole,) = steps("ppo", traj, 1, monkeypatch)
    parts = steps("ppo", traj, 3, monkeypatch)
    assert any(not torch.allclose(sum(p[key] for p in parts) / 3, whole[key], rtol=1e-4) for key in whole)


def test_ppos_token_mean_of_one_minibatch_is_its_default(monkeypatch):
    traj = batches.text_batch()
    (token,), (plain,) = (steps("ppo", traj, 1, monkeypatch, loss_mean=mean) for mean in ("token", "minibatch"))
    for key, gradient in plain.items():
        torch.testing.assert_close(token[key], gradient, rtol=1e-9, atol=1e-12)


def test_dapo_without_its_parts_is_grpo_with_the_token_mean():
    traj = batches.text_batch()
    assert batches.same(ends("dapo", traj, **OFF), ends("grpo", traj, kl_loss=None, loss_mean="token"))
    for part in ({"clip_high": 0.001}, {"overlong": 1.0}, {"loss_mean": "response"}):
        assert not batches.same(ends("dapo", traj, **OFF), ends("dapo", traj, **OFF | part)), part


def test_the_penalty_of_long_responses_by_hand():
    found = overlong_penalty(torch.tensor([1, 16, 18, 20]), 20, 0.2)  # a fifth of 20: 16 to 20
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, -0.5, -1.0]))
    traj = batches.text_batch()
    agent = batches.learner("rloo", overlong=2.0, overlong_share=0.5)
    more = (agent.rewards(traj, Before(agent.policy, traj)) - traj.reward)[traj.mask]
    ends_here = torch.arange(traj.mask.shape[1]) == traj.lengths[:, None] - 1
    assert (more[~ends_here[traj.mask]] == 0).all()
    expected = [-2 * max(0, length - 3) / 3 for length in traj.lengths.tolist()]  # of at most six tokens
    assert more[ends_here[traj.mask]].tolist() == pytest.approx(expected) and min(expected) == -2
    control, policy = batches.control_batch()
    with pytest.raises(ValueError, match="overlong penalizes long responses"):
        make_agent("ppo", policy, overlong=1.0, episodes=6).update(control)


def test_gspo_on_a_bandit_env_is_grpo_with_its_clip():
    traj, clip = batches.text_batch("bandit"), {"clip": 0.1, "clip_high": 0.2}
    plain = batches.learner("grpo", "bandit", kl_loss=None, epochs=3, learning_rate=1e-2, **clip)
    plain.update(traj)
    for by_token in (False, True):
        agent = batches.learner("gspo", "bandit", epochs=3, learning_rate=1e-2, by_token=by_token, **clip)
        agent.update(traj)
        for key, weight in batches.weights(plain.policy).items():
            torch.testing.assert_close(batches.weights(agent.policy)[key], weight, rtol=1e-6, atol=1e-8)


def test_gspos_tokens_have_the_rewards_that_follow_them():
    traj = batches.text_batch(episodes=8)
    _, fixed = prepared("gspo", traj, by_token=True)
    reward = torch.where(traj.mask, traj.reward, 0.0)
    returns = reward.sum(dim=1).reshape(2, 4)
    to_go = reward.flip(1).cumsum(1).flip(1)
    mean, std = (x.repeat_interleave(4)[:, None] for x in (returns.mean(1), returns.std(1, unbiased=False)))
    torch.testing.assert_close(fixed["advantage"], (to_go - mean) / std * traj.mask, rtol=1e-6, atol=1e-6)
    assert torch.equal(fixed["advantage"][:, 0], prepared("gspo", traj)[1]["advantage"][:, 0])


def test_sapo_starts_as_grpo_and_goes_on_without_a_clip(monkeypatch):
    """One step is GRPO's; the second differs, and no ratio is reported as clipped."""
    traj = batches.text_batch()
    (own,), (plain,) = (steps(name, traj, 1, monkeypatch, kl_loss=None) for name in ("sapo", "grpo"))
    for key, gradient in plain.items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-9, atol=1e-12)
    agent = batches.learner("sapo", epochs=3, learning_rate=3e-2)
    assert "clip_fraction" not in agent.update(traj)
    assert not batches.same(batches.weights(agent.policy), ends("grpo", traj, kl_loss=None))


def test_gspo_counts_clipped_responses():
    agent, traj = batches.learner("gspo", clip=0.05, clip_high=0.1), batches.text_batch()
    old = agent.policy.evaluate(traj).logprob.detach()
    shift = torch.zeros(len(traj), 1).double()
    shift[:2], shift[2:3] = torch.tensor(1.2).log(), torch.tensor(0.9).log()
    moved = agent.moved(old + shift, old, traj.mask)
    expected = float(traj.lengths[:3].sum() / traj.mask.sum())
    assert float(moved["clip_fraction"]) == pytest.approx(expected) and 0 < expected < 1


def test_reinforce_plus_plus_scales_over_the_whole_batch():
    traj = batches.text_batch(episodes=8)
    reward = torch.where(traj.mask, traj.reward, 0.0)
    to_go, real = reward.flip(1).cumsum(1).flip(1), traj.mask
    _, fixed = prepared("reinforce-plus-plus", traj)
    expected = (to_go - to_go[real].mean()) / to_go[real].std(unbiased=False)
    torch.testing.assert_close(fixed["advantage"][real], expected[real], rtol=1e-6, atol=1e-6)
    _, fixed = prepared("reinforce-plus-plus-baseline", traj, kl_loss=None)
    returns = reward.sum(dim=1).reshape(2, 4)
    centred = (returns - returns.mean(1, keepdim=True)).reshape(-1, 1).expand(real.shape)
    expected = (centred - centred[real].mean()) / centred[real].std(unbiased=False)
    torch.testing.assert_close(fixed["advantage"][real], expected[real], rtol=1e-6, atol=1e-6)


def test_groups_of_one_are_refused_where_a_group_is_needed():
    traj = batches.text_batch(episodes=8)
    traj.group = torch.arange(8)
    for name in ("grpo", "dr-grpo", "dapo", "gspo", "sapo", "cispo", "reinforce-plus-plus-baseline"):
        with pytest.raises(ValueError, match="group_size"):
            prepared(name, traj)
    for name in ("reinforce", "rloo", "trpo", "vbon"):
        with pytest.raises(ValueError, match="at least two episodes per prompt"):
            prepared(name, traj)
    for name in ("bond", "online-dpo"):
        with pytest.raises(ValueError, match="group_size.*at least 2"):
            make_config(name, group_size=1)
    for name in ("dapo", "expert-iteration"):
        with pytest.raises(ValueError, match="group_size"):
            make_config(name, group_size=1)
    for name in ("reinforce-plus-plus", "remax"):
        prepared(name, traj)


def greedy_by_hand(policy, prompt, horizon=6, eos=0):
    """A token at a time, from the whole distribution."""
    row = torch.full((1, len(prompt) + horizon), -1)
    row[0, : len(prompt)] = prompt
    for t in range(horizon):
        row[0, len(prompt) + t] = policy.next_logits(row).argmax()
        if row[0, len(prompt) + t] == eos:
            break
    return row[0, len(prompt) :].tolist()


def test_remax_compares_with_the_greedy_response_and_pays_for_it():
    env = batches.text_env(group_size=1)
    agent = batches.learner("remax", env=env, group_size=1)
    traj, _ = agent.iteration(env)
    prompts = len(traj.prompt_index.unique())
    assert 1 < prompts < len(traj) and agent.episodes_done == 16
    assert agent.samples_done == agent.reward_calls == 16 + prompts
    agent = batches.learner("remax", env=env, group_size=1)
    greedy = [greedy_by_hand(agent.policy, prompt) for prompt in traj.prompt]
    assert agent.policy.greedy(traj.prompt).tolist() == greedy
    with torch.no_grad():
        fixed = agent.prepare(traj, Before(agent.policy, traj))
    score = torch.tensor([row.count(2) - row.count(3) for row in greedy]).double()
    to_go = torch.where(traj.mask, traj.reward, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(fixed["advantage"], torch.where(traj.mask, to_go - score[:, None], 0.0))
    distinct = {tuple(p.tolist()): r for p, r in zip(traj.prompt, greedy, strict=True)}
    assert agent.tokens_done == sum(token >= 0 for row in distinct.values() for token in row)


def test_remax_needs_an_env_that_scores():
    agent = batches.learner("remax")
    agent.mdp = None
    with pytest.raises(ValueError, match="set .mdp"):
        agent.update(batches.text_batch())
