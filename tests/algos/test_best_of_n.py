"""Best-of-n picks what the reward likes, is the base policy at n = 1, and its frequencies follow the formula."""

import math

import numpy as np
import pytest
import torch

from lm_envs.algos import best_of_n
from lm_envs.algos.best_of_n import BestOfN, kl_bound, kl_of_scores
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load as enumerable
from tests import tiny


def make(n, **changes):
    env = TextVectorEnv(tiny.task(**changes), 2, kl_coef=0.0)
    policy = LMPolicy.for_mdp(env.mdp, tiny.gpt2(seed=1))
    return env, policy, BestOfN(policy, env.mdp, n)


def test_best_of_one_is_the_base_policy():
    env, policy, best = make(1)
    assert rollout(env, best, episodes=12).response.tolist() == rollout(env, policy, episodes=12).response.tolist()


def test_it_picks_the_best_of_the_samples_it_drew_and_counts_them():
    env, policy, best = make(5)
    traj = rollout(env, best, episodes=8)
    uniforms = torch.rand(8, 5 * 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts = traj.prompt
    chosen, logprob, _ = best.answer(traj.prompt_index, prompts, uniforms)
    for row in range(8):
        each, each_logprob = policy.respond(prompts[row : row + 1].expand(5, -1), uniforms[row].reshape(5, 6))
        scores = env.mdp.score(np.full(5, traj.prompt_index[row]), each.numpy()).sum(1)
        top = int(np.argmax(scores))
        assert chosen[row].tolist() == each[top].tolist()
        torch.testing.assert_close(logprob[row], each_logprob[top])
    assert best.reward_calls == 2 * 8 * 5 and best.tokens_generated > 2 * 8 * 5


def test_frequencies_follow_the_formula():
    """One token, horizon 1: p_n of every response is known exactly; distinct rewards, so ties play no part."""
    rank = {word: i for i, word in enumerate(["c", "<eos>", "a", "h", "b", "f", "g", "d", "i", "e"])}

    def reward(completions, **_):
        return [float(rank[text.strip() or "<eos>"]) for text in completions]

    env, policy, best = make(3, reward=reward, max_new_tokens=1, prompts={"train": [[1, 2]]})
    probability = torch.softmax(policy.model(input_ids=torch.tensor([[1, 2]])).logits[0, -1], 0).numpy()
    order = np.argsort([rank[word] for word in tiny.WORDS])
    cumulative = np.concatenate([[0.0], np.cumsum(probability[order])])
    expected = np.empty(10)
    expected[order] = np.diff(cumulative**3)
    count = 6000
    seen = rollout(env, best, episodes=count).response[:, 0]
    frequency = np.bincount(seen.numpy(), minlength=10) / count
    assert np.abs(frequency - expected).max() < 4 * 0.5 / math.sqrt(count)
    assert np.abs(probability - expected).max() > 0.1  # so the check can fail
    kl = float(np.sum(expected * np.log(expected / probability)))
    assert 0 < kl <= kl_bound(3) == pytest.approx(math.log(3) - 2 / 3)


def test_n_and_the_temperature_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        make(0)
    env, policy, _ = make(2)
    with pytest.raises(ValueError, match="temperature .* above 0, got 0.0"):
        BestOfN(policy, env.mdp, 2, 0.0)


def test_soft_choices_follow_the_rewards():
    """The first of two samples with rewards r and s is kept with probability 1 / (1 + e^((s - r) / temperature))."""
    env, policy, _ = make(2)
    soft, count = BestOfN(policy, env.mdp, 2, 0.7), 2000
    prompts = torch.as_tensor(env.mdp.prompt(np.zeros(count, dtype=np.int64)))
    for seed in range(20):  # two responses of different rewards
        uniforms = torch.rand(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        each, _ = policy.respond(prompts[:2], uniforms.reshape(2, 6))
        scores = env.mdp.score(np.zeros(2, dtype=np.int64), each.numpy()).sum(axis=1)
        if scores[0] > scores[1]:
            break
    choice = torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    index = torch.zeros(count, dtype=torch.int64)
    found, _, _ = soft.answer(index, prompts, torch.cat([uniforms.expand(count, -1), choice], dim=1))
    share = float((found == each[0]).all(dim=1).double().mean())
    expected = 1 / (1 + math.exp((scores[1] - scores[0]) / 0.7))
    assert share == pytest.approx(expected, abs=4 * 0.5 / count**0.5)


def test_the_measured_kl_by_hand_and_its_limits():
    distinct = np.random.default_rng(0).normal(size=(3, 16 * 16))
    assert kl_of_scores(distinct, 16) == pytest.approx(kl_bound(16), rel=3e-3)
    assert (kl_of_scores(distinct, 16) < kl_bound(16)).all()
    assert kl_of_scores(distinct, 64) == pytest.approx(kl_bound(64), rel=2e-2)  # M = 4 n
    half = np.repeat([[0.0, 1.0]], 8, axis=1)  # best-of-2 takes the upper half three times of four
    assert kl_of_scores(half, 2) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_of_scores(half, 1) == pytest.approx(0) and kl_of_scores(half, 2, 1e9) == pytest.approx(0, abs=1e-9)
    odds = 0.25 + 0.5 / (1 + math.exp(-2.0))  # both the better one, or one of each and it wins
    soft = odds * math.log(2 * odds) + (1 - odds) * math.log(2 * (1 - odds))
    assert kl_of_scores(half, 2, 0.5) == pytest.approx(soft)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_the_measured_kl_is_the_exact_one(temperature):
    mdp = TextVectorEnv(enumerable(tokens=2, horizon=2, prompts=16), 1).mdp
    exact, n = Exact(mdp), 4
    best = BestOfN(LMPolicy.for_mdp(mdp, mdp.reference), mdp, n, temperature)
    found = best.measured_kl()
    expected = float(exact.kl(exact.best_of_n(exact.log_ref, n, temperature)))
    assert len(found) == 16 and best.reward_calls == best.tokens_generated == 0
    assert found.mean() == pytest.approx(expected, rel=0.1) and kl_bound(n) > 1.15 * expected
    assert len(BestOfN(best.policy, mdp, 1000).measured_kl()) == 0  # too many to measure


def test_the_kl_of_a_pretrained_model_is_measured_on_fewer_samples(monkeypatch):
    mdp = TextVectorEnv(enumerable(tokens=2, horizon=2, prompts=16), 1).mdp
    best = BestOfN(LMPolicy.for_mdp(mdp, mdp.reference), mdp, 16)
    whole = best.measured_kl()
    monkeypatch.setattr(best_of_n, "SMALL", 1)
    assert len(whole) == 16 and best.measured_kl() == pytest.approx(whole[:4])  # 256 samples of each
    assert best.measured_kl(prompts=32) == pytest.approx(whole[:2])  # no more than 32 prompts' responses take
