"""Best-of-n picks what the reward likes, is the base policy at n = 1, and its frequencies follow the formula."""

import math

import numpy as np
import pytest
import torch

from lm_envs.algos.best_of_n import BestOfN, kl_bound
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
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


def test_n_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        make(0)
