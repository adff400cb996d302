"""What the numbers of a result mean, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.measure.samples import (
    corpus_score,
    distinct_2,
    evaluation_env,
    measure,
    measure_greedy,
    sample_policy,
    sample_reference,
    standard_error,
    summarise,
    wins,
)
from lm_envs.model.decoding import greedy
from lm_envs.reward.base import Clip, WeightedSum
from lm_envs.reward.metrics import Rouge, SentenceBLEU, SentenceChrF
from lm_envs.tasks.translation import CorpusBLEU
from tests import tiny
from tests.benchmarks.fake_task import gold, load


@pytest.fixture(scope="module")
def env():
    return evaluation_env(load(), "test")


@pytest.fixture(scope="module")
def reference(env):
    return LMPolicy.for_mdp(env.mdp, env.mdp.task.reference)


def test_every_prompt_is_answered_once_in_order(env, reference):
    found = sample_policy(env, reference, None, seed=0)
    assert found.prompt == env.mdp.codec.decode(env.mdp.prompts, [[]] * len(env.mdp.prompts))[0]
    assert len(set(found.prompt)) == len(env.mdp.prompts) == 21
    assert sample_policy(env, reference, 5, seed=0).response == found.response[:5]


def test_scores_are_those_of_reward_and_judge(env, reference):
    found = sample_policy(env, reference, 10, seed=0)
    np.testing.assert_allclose(found.gold, gold(found.prompt, found.response))
    np.testing.assert_allclose(found.proxy, [t.split().count("b") - t.split().count("c") for t in found.response])
    words = [len(t.split()) for t in found.response]
    stopped = np.array(found.finish_reason) == "stop"
    np.testing.assert_array_equal(found.length, np.array(words) + stopped)
    np.testing.assert_allclose(found.kl, 0, atol=1e-4)


def test_the_sides_of_a_comparison_are_independent_samples_and_both_repeat(env, reference):
    policy, other = sample_policy(env, reference, None, 0), sample_reference(env, reference, None)
    assert policy.prompt == other.prompt and policy.response != other.response
    assert sample_policy(env, reference, None, 0).response == policy.response
    assert sample_policy(env, reference, None, 1).response != policy.response


def test_wins_count_ties_half_and_unknown_scores_as_unknown():
    outcome = wins(np.array([2.0, 1.0, 0.0, np.nan]), np.array([1.0, 1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(outcome, [1.0, 0.5, 0.0, np.nan])
    with pytest.raises(ValueError, match="same prompts"):
        wins(np.zeros(3), np.zeros(4))


def test_standard_error_by_hand_and_against_repetition():
    assert standard_error(np.array([0.0, 1.0, 1.0, 0.5])) == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    assert math.isnan(standard_error(np.array([1.0])))
    rng = np.random.default_rng(0)
    samples = rng.choice([0, 0.5, 1], p=[0.2, 0.5, 0.3], size=(4000, 50))
    estimated = np.mean([standard_error(row) for row in samples])
    assert estimated == pytest.approx(samples.mean(axis=1).std(), rel=0.05)
    binomial = math.sqrt(0.55 * 0.45 / 50)
    assert estimated < 0.8 * binomial  # the formula that forgets the ties


def test_distinct_2_by_hand():
    assert distinct_2([[1, 2, 1, 2], [1, 2]]) == 2 / 4
    assert math.isnan(distinct_2([[1], []]))


def test_kl_of_a_changed_policy_is_the_sample_mean_of_the_log_ratio(env, reference):
    task = load()
    model = type(task.reference)(task.reference.config)
    model.load_state_dict(task.reference.state_dict())
    with torch.no_grad():
        model.transformer.wte.weight[2, :8] += 0.5  # a layer norm takes what is added to all
    policy = LMPolicy.for_mdp(env.mdp, model.eval())
    found = sample_policy(env, policy, None, 0)
    tokens = [torch.tensor([prompt + ids]) for prompt, ids in zip(env.mdp.prompts, found.tokens, strict=True)]
    expected, under_reference = [], []
    for row, ids in enumerate(tokens):
        if found.finish_reason[row] == "stop":
            ids = torch.cat([ids, torch.tensor([[0]])], dim=1)
        ratio = 0.0
        for net, sign in ((model, 1), (task.reference, -1)):
            with torch.no_grad():
                log_p = net(ids).logits.log_softmax(-1)[0, 1:-1]
            ratio += sign * float(log_p.gather(1, ids[0, 2:, None]).sum())
        under_reference.append(float(log_p.gather(1, ids[0, 2:, None]).sum()))
        expected.append(ratio)
    np.testing.assert_allclose(found.kl, expected, atol=1e-4)
    assert np.mean(expected) > 0.1
    result = summarise(found, found, policy)
    assert result["perplexity"] == pytest.approx(math.exp(-sum(under_reference) / found.length.sum()), rel=1e-4)
    assert result["kl"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert result["win_rate"] == 0.5 and result["win_rate_se"] == 0 and not result["kl_is_bound"]
    assert result["inference_reward_calls"] == 0
    assert result["inference_tokens"] == found.length.sum()


def test_positive_rates_are_shares_above_the_tasks_thresholds(env, reference):
    found = sample_policy(env, reference, None, 0)
    cut = float(np.sort(found.proxy)[-3])
    result = summarise(found, found, reference, {"reward_threshold": cut})
    assert result["proxy_positive"] == (found.proxy > cut).sum() / len(found.proxy) < 3 / len(found.proxy)
    assert math.isnan(result["gold_positive"])
    result = summarise(found, found, reference, {"judge_threshold": found.gold.min() - 1})
    assert result["gold_positive"] == 1 and math.isnan(result["proxy_positive"])


def test_best_of_n_pays_for_all_its_samples(env, reference):
    best = BestOfN(reference, env.mdp, 4)
    found = sample_policy(env, best, None, 0)
    plain = sample_policy(env, reference, None, 0)
    assert (found.proxy >= plain.proxy).all() and (found.proxy > plain.proxy).any()
    result = summarise(found, plain, best)
    assert result["sft_gold"] == pytest.approx(plain.gold.mean()) != pytest.approx(found.gold.mean())
    assert (
        result["sft_gold_sd"] == pytest.approx(np.std(plain.gold, ddof=1)) != pytest.approx(np.std(found.gold, ddof=1))
    )
    assert result["sft_distinct_2"] == distinct_2(plain.tokens) != result["distinct_2"]
    assert result["inference_reward_calls"] == 4 * 21
    assert 3 * 21 < result["inference_tokens"] <= 4 * 21 * 6
    assert result["inference_tokens"] > 2 * found.length.sum()
    assert result["kl_bound"] == pytest.approx(math.log(4) - 3 / 4) and not result["kl_is_bound"]
    assert 0.1 < result["kl"] < result["kl_bound"]  # scores are whole numbers, so there are ties
    many = summarise(found, plain, BestOfN(reference, env.mdp, 1000))
    assert many["kl_is_bound"] and many["kl"] == many["kl_bound"]


def test_the_kl_of_best_of_n_of_a_changed_policy_is_from_the_reference(env, reference):
    """What best-of-n moves away from its base policy, and what that has moved already."""
    model = type(reference.model)(reference.model.config)
    model.load_state_dict(reference.model.state_dict())
    with torch.no_grad():
        model.transformer.wte.weight[2, :8] += 0.5  # a layer norm takes what is added to all
    best = BestOfN(LMPolicy.for_mdp(env.mdp, model.eval()), env.mdp, 4)
    found = sample_policy(env, best, None, 0)
    assert abs(found.kl.mean()) > 0.1
    result, moved = summarise(found, found, best), best.measured_kl()
    assert result["kl"] == pytest.approx(moved.mean() + found.kl.mean())
    assert result["kl_se"] == pytest.approx(math.hypot(standard_error(moved), standard_error(found.kl)))
    assert math.isnan(result["kl_bound"])  # it is on the KL from the base policy


def test_without_a_judge_gold_is_unknown_and_not_replaced(reference):
    env = evaluation_env(load(judge=False), "test")
    found = sample_policy(env, reference, None, 0)
    result = summarise(found, found, reference)
    assert all(math.isnan(result[name]) for name in ("gold", "win_rate", "win_rate_se"))
    assert not math.isnan(result["proxy"])


def test_the_score_of_the_corpus_is_by_the_first_metric_there_is():
    pytest.importorskip("sacrebleu")
    texts, references = ["a b c d", "a b x d e", "z"], ["a b c d", ["a b c d e", "y"], None]
    bleu, rouge = SentenceBLEU(), Rouge("rouge1", column="other")
    expected = bleu.corpus(texts[:2], references[:2])
    inside = WeightedSum([(1.0, tiny.count_b_minus_c), (0.5, Clip(bleu, 0, 1)), (1.0, rouge)])
    assert corpus_score([None, inside], texts, {"reference": references}) == pytest.approx(expected)
    assert 20 < expected < 90
    other = corpus_score([rouge, inside], texts, {"reference": references, "other": ["a", "a", "a"]})
    assert other == pytest.approx(100 * (2 / 5 + 2 / 6) / 3)
    for rewards, columns in (
        ([tiny.count_b_minus_c], {"reference": references}),
        ([bleu], {}),
        ([bleu], {"reference": [None] * 3}),
    ):
        assert math.isnan(corpus_score(rewards, texts, columns))


def test_greedy_texts_are_those_of_sft_and_of_the_policy():
    pytest.importorskip("sacrebleu")
    columns = {"train": {"reference": [["a"]] * 5}, "test": {"reference": [["b b c"], ["b c a"]]}}
    mdp = evaluation_env(tiny.task(corpus_metric=CorpusBLEU(), columns=columns), "test").mdp
    other = tiny.gpt2(seed=1)
    found = measure_greedy(mdp, LMPolicy.for_mdp(mdp, other), None)
    texts = []
    for model in (mdp.reference, other):
        responses = greedy(model, mdp.prompts, mdp.eos_token_ids, max_new_tokens=6)
        texts.append(mdp.codec.decode(mdp.prompts, responses)[1])
    assert [(row["sft"], row["response"]) for row in found["greedy"]] == list(zip(*texts, strict=True))
    assert [row["prompt"] for row in found["greedy"]] == ["e", "f b a"] and texts[0] != texts[1]


def test_the_score_of_the_corpus_is_in_the_result():
    pytest.importorskip("sacrebleu")
    columns = {"train": {"reference": ["a"] * 5}, "test": {"reference": ["b b c", "b c a"]}}
    env = evaluation_env(tiny.task(judge=SentenceBLEU(), columns=columns), "test")
    policy = LMPolicy.for_mdp(env.mdp, env.mdp.task.reference)
    found = sample_policy(env, policy, None, seed=0)
    result = summarise(found, found, policy)
    assert result["corpus"] == SentenceBLEU().corpus(found.response, columns["test"]["reference"])
    assert found.gold.tolist() == SentenceBLEU()(found.response, reference=columns["test"]["reference"])
    assert "corpus" not in summarise(*[sample_policy(evaluation_env(tiny.task(), "test"), policy, None, 0)] * 2, policy)


def test_the_judges_metric_scores_the_corpus_before_the_rewards():
    pytest.importorskip("sacrebleu")
    columns = {"train": {"reference": ["a"] * 5}, "test": {"reference": ["b b c", "b c a"]}}
    task = tiny.task(judge=SentenceChrF(), reward=SentenceBLEU(), columns=columns)
    env = evaluation_env(task, "test")
    found = sample_policy(env, LMPolicy.for_mdp(env.mdp, task.reference), None, seed=0)
    scores = [metric.corpus(found.response, columns["test"]["reference"]) for metric in (task.judge, task.reward)]
    assert found.corpus == scores[0] != scores[1]


def test_the_start_has_a_standard_error_of_its_own():
    """The start, whose responses differ in their gold, beside a model that always says the same."""
    start = tiny.task(judge=lambda prompts, completions, **columns: [len(text) + 0.0 for text in completions])
    constant = tiny.gpt2(seed=3)
    with torch.no_grad():
        constant.lm_head.weight.zero_()
        constant.transformer.wte.weight.zero_()
    env = evaluation_env(start, "test")
    texts = sample_reference(env, LMPolicy.for_mdp(env.mdp, start.start), None)
    found = measure(constant, start, split="test")
    assert found["start_gold"] == pytest.approx(texts.gold.mean())
    assert found["start_gold_se"] == pytest.approx(texts.gold.std(ddof=1) / len(texts.gold) ** 0.5)
    assert found["start_gold_se"] != found["gold_se"]
