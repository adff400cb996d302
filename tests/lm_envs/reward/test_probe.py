"""A linear probe: by hand in one dimension, the weights behind simulated choices, and its prior."""

from __future__ import annotations

import numpy as np
import pytest

from lm_envs.reward import probe
from lm_envs.reward.likelihood import Likelihood
from lm_envs.reward.probe import LinearProbe, fit_probe
from tests import tiny


def test_one_dimension_by_hand(monkeypatch: pytest.MonkeyPatch):
    """With every difference 2 and three of four annotators for the first, ``sigmoid(2 w) = 3/4``; and with a normal
    prior the gradient ``N (p - y) 2 / s + penalty v`` is 0, where v = s w and s is the standard deviation."""
    difference, share = np.array([[2.0], [-2.0]] * 10), np.array([0.75, 0.25] * 10)
    monkeypatch.setattr(probe, "_PENALTIES", (1e-12,))
    (found,) = fit_probe(difference, share, np.arange(20))
    assert found == pytest.approx(np.log(3) / 2)
    monkeypatch.setattr(probe, "_PENALTIES", (5.0,))
    (found,) = fit_probe(difference, share, np.arange(20))
    scale = difference.std()
    p = 1 / (1 + np.exp(-2 * found))
    assert 20 * (p - 0.75) * 2 / scale + 5.0 * found * scale == pytest.approx(0, abs=1e-6)


def test_it_finds_the_weights_behind_the_choices():
    draw = np.random.default_rng(0)
    wanted = draw.normal(size=6)
    difference = draw.normal(size=(4000, 6)) * [1, 2, 3, 0.1, 1, 1]
    chosen = (draw.random(4000) < 1 / (1 + np.exp(-difference @ wanted))).astype(float)
    found = fit_probe(difference, chosen, np.arange(4000) // 4)
    assert np.corrcoef(difference @ found, difference @ wanted)[0, 1] > 0.999
    np.testing.assert_allclose(found[[0, 1, 2, 4, 5]], wanted[[0, 1, 2, 4, 5]], atol=0.15)


def test_the_prior_is_narrow_where_there_is_nothing_to_learn():
    draw = np.random.default_rng(1)
    difference, coins = draw.normal(size=(200, 50)), draw.integers(0, 2, 200).astype(float)
    assert np.abs(difference @ fit_probe(difference, coins, np.arange(200))).max() < 0.3


def test_pairs_of_a_prompt_are_held_out_together():
    """Features that name the prompt tell nothing of other prompts. Pairs of a prompt that were on both sides of a fold
    would show that they tell the choice."""
    draw = np.random.default_rng(2)
    prompts = np.repeat(np.arange(40), 5)
    difference = draw.normal(size=(40, 60))[prompts]
    chosen = draw.integers(0, 2, 40).astype(float)[prompts]
    together, apart = fit_probe(difference, chosen, prompts), fit_probe(difference, chosen, np.arange(200))
    assert np.abs(difference @ together).max() < 0.5 < 3 < np.abs(difference @ apart).min()


def test_a_reward_is_linear_in_the_state_of_the_response():
    likelihood = Likelihood(tiny.gpt2(context=8), tiny.tokenizer())
    weights = np.arange(likelihood.model.config.hidden_size, dtype=float)
    reward = LinearProbe(likelihood, weights, 1)
    found = reward(prompts=["a b", "a", "c"], completions=["c d", "", "d"], finish_reasons=["stop"] * 3)
    states = likelihood.hidden(["c d", "", "d"], ["a b", "a", "c"], 1)
    assert found == pytest.approx((states @ weights).tolist()) and found[1] == 0


def test_one_prompt_is_refused():
    with pytest.raises(ValueError, match="pairs of two prompts"):
        fit_probe(np.ones((3, 2)), np.ones(3), np.zeros(3, dtype=np.int64))
