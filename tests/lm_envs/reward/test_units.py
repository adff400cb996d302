"""Rewards in units of samples: hand-computed moments, the same for every kind of reward."""

from __future__ import annotations

import pytest

from lm_envs.reward.base import Standardise, call_reward
from lm_envs.reward.learned import LearnedReward
from lm_envs.reward.units import Samples, in_units_of, moments, standardised
from tests.lm_envs.reward.test_learned import classifier, words


def length(completions):
    return [float(len(text)) for text in completions]


def maths_only(completions, task):
    return [float(len(text)) if kind == "maths" else None for text, kind in zip(completions, task, strict=True)]


def samples(*completions: str, **columns) -> Samples:
    count = len(completions)
    return Samples(["p"] * count, list(completions), [[1]] * count, ["stop"] * count, columns)


def test_a_function_in_units_of_samples():
    reward = in_units_of(length, samples("aa", "aaaa"))
    assert isinstance(reward, Standardise) and (reward.mean, reward.std) == (3.0, 1.0)  # the population's
    assert samples("aaaaa").score(reward).tolist() == [2.0]


def test_samples_that_the_reward_does_not_apply_to_are_left_out():
    made = in_units_of(maths_only, samples("a", "", "ccc", "", task=["maths", "x", "maths", "x"]))
    assert (made.mean, made.std) == (2.0, 1.0)
    with pytest.raises(ValueError, match="'maths_only' applies to none"):
        in_units_of(maths_only, samples("a", "b", task=["x"] * 2))


@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.0, 0.0], [0.3, 0.3 + 1e-8]])
def test_scores_that_are_all_the_same_make_no_units(scores):
    with pytest.raises(ValueError, match="gives all 2 samples of the reference the score .*cannot tell them apart"):
        in_units_of(lambda completions: scores, samples("a", "b"))


def test_a_dense_reward_has_no_units():
    with pytest.raises(ValueError, match="is dense: standardizing it would pay for length"):
        in_units_of(lambda completion_ids: [[1.0] * len(ids) for ids in completion_ids], samples("a", "b"))


def test_a_learned_reward_keeps_its_kind_and_everything_else():
    model, tokenizer = classifier("Bert", labels=3), words()
    reward = LearnedReward(model, tokenizer, batch_size=7, name="mood", label=2, output="logit")
    raw = reward(["a"] * 2, [" b", " c d"])
    other = standardised(reward, 1.0, 2.0)
    assert isinstance(other, LearnedReward) and other.normalise == (1.0, 2.0) and reward.normalise == (0.0, 1.0)
    assert other(["a"] * 2, [" b", " c d"]) == pytest.approx([(x - 1) / 2 for x in raw])
    assert (other.batch_size, other.__name__, other.label, other.output) == (7, "mood", 2, "logit")


def test_units_of_a_reward_that_is_in_units_already():
    """However a reward was scaled before, in units of the same samples it is the same."""
    reward = LearnedReward(classifier("GPT2"), words())
    given = samples(" b", " c d", " a a")
    plain, again = in_units_of(reward, given), in_units_of(standardised(reward, -0.7, 3.0), given)
    assert again.normalise == pytest.approx(plain.normalise, rel=1e-6)
    assert moments(given.score(plain), "it") == pytest.approx((0.0, 1.0), abs=1e-6)
    assert call_reward(again, **given.given).tolist() == pytest.approx(given.score(plain).tolist(), abs=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(float("nan"), 1), (0, 0), (0, float("inf")), (0, -1)])
def test_moments_that_make_no_units(mean, std):
    for reward in (length, LearnedReward(classifier("GPT2"), words())):
        with pytest.raises(ValueError, match="a finite mean and a positive std"):
            standardised(reward, mean, std)
