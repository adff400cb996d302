"""Probes by themselves: optima by brute force, the score by hand, what each plants, and methods broken on purpose."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.algos.registry import Unsuited
from lm_envs.benchmarks.probes import base
from lm_envs.benchmarks.probes.base import Case, ask, plain, run, settings
from lm_envs.benchmarks.probes.registry import PROBES, load
from lm_envs.tasks.enumerable import TableReward

BROKEN = Path(__file__).with_name("broken.py")


def every_text(case: Case, x: int):
    """Walk through all whole texts after a prompt: the number of each, and its log-probability under the reference."""
    eos, stack = case.tokens, [(0, 0, 0.0)]
    while stack:
        number, length, log_p = stack.pop()
        if length == case.horizon:
            yield number, log_p
            continue
        logits = np.zeros(case.tokens + 1) if case.logits is None else case.logits[x, number]
        allowed = [*range(case.tokens), *([eos] if case.ends else [])]
        total = math.log(sum(math.exp(logits[a]) for a in allowed))
        for a in allowed:
            if a == eos:
                yield number, log_p + logits[a] - total
            else:
                stack.append((case.tokens * number + 1 + a, length + 1, log_p + logits[a] - total))


@pytest.mark.parametrize("name", PROBES)
def test_the_optimum_is_that_of_brute_force(name):
    probe = load(name)
    case, beta = probe.case(float(probe.values[-2]), 3), 0.0
    beta, starts, optima = case.kl_coef, [], []
    taught = case.rewards if case.taught is None else case.taught(1.0)
    for x in range(len(case.rewards)):
        found = list(every_text(case, x))
        assert math.fsum(math.exp(log_p) for _, log_p in found) == pytest.approx(1)
        starts.append(math.fsum(math.exp(log_p) * case.rewards[x, i] for i, log_p in found))
        tilted = np.array([log_p + taught[x, i] / beta for i, log_p in found])
        log_total = tilted.max() + math.log(np.exp(tilted - tilted.max()).sum())
        best = np.exp(tilted - log_total)
        kl = float((best * (tilted - log_total - np.array([log_p for _, log_p in found]))).sum())
        optima.append(float((best * case.rewards[x, [i for i, _ in found]]).sum()) - beta * kl)
    question = ask(case)
    assert question.start == pytest.approx(np.mean(starts), abs=1e-12 * abs(question.optimum) + 1e-12)
    assert question.optimum == pytest.approx(np.mean(optima), rel=1e-9)


def two_texts() -> Case:
    """Texts of one token, "a" and "b", of which "b" is worth 1; the first reward is that of the empty text."""
    return Case(np.array([[0.0, 0.0, 1.0]]), 2, 1, kl_coef=0.5)


def test_the_score_by_hand():
    question, beta = ask(two_texts()), 0.5
    assert question.start == 0.5
    assert question.optimum == pytest.approx(beta * math.log((1 + math.exp(1 / beta)) / 2))

    def scored(p):
        table = torch.tensor([[[1 - p, p, 0.0]]], dtype=torch.float64).clamp(min=1e-300).log()
        return question.score(TabularPolicy(question.exact, table))

    value = 0.75 - beta * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert scored(0.75) == pytest.approx(((value - 0.5) / (question.optimum - 0.5), value))
    assert scored(0.5)[0] == 0 and scored(0.1)[0] == 0
    assert scored(1 / (1 + math.exp(-1 / beta)))[0] == pytest.approx(1)


def test_an_optimum_that_is_no_better_than_the_start_is_refused():
    case = replace(two_texts(), taught=lambda spent: np.array([[0.0, 1.0, 0.0]]))
    with pytest.raises(ValueError, match="must be better than its start"):
        ask(case)


def test_texts_of_one_length_unless_they_may_end():
    assert ask(two_texts()).task.min_new_tokens == 1
    assert ask(replace(two_texts(), ends=True)).task.min_new_tokens == 0


def test_rewards_of_training_change_and_are_noisy_with_a_seed():
    probe = load("change")
    case = probe.case(0.3, 0)
    reward = base._Taught(case, ask(case).task, 0)
    assert (reward.table != case.rewards).any()
    reward.move(0.29)
    assert (reward.table != case.rewards).any()
    reward.move(0.3)
    assert (reward.table == case.rewards).all()

    case = load("noise").case(2.0, 0)
    task = ask(case).task
    given = {"prompts": ["a"] * 4000, "completion_ids": [[0, 0, 0]] * 4000}
    first, again, other = (base._Taught(case, task, seed)(**given) for seed in (0, 0, 1))
    exact = TableReward.__call__(base._Taught(case, task, 0), **given)
    assert (first == again).all() and (first != other).all()
    assert (first - exact).std() == pytest.approx(2, rel=0.05) and abs((first - exact).mean()) < 0.1


def sampled(name, value, iteration=0):
    """The logits a policy samples from, those it has, and the policy, with a probe's fault planted."""
    case = load(name).case(value, 0)
    policy = TabularPolicy(ask(case).exact, value_scale=3.0)
    case.before(policy, iteration)
    now = policy.logits.detach()
    return (now if policy.sampler is None else policy.sampler(now)), now, policy


def test_the_stale_sampler_is_refreshed_when_it_is_due():
    case = load("staleness").case(2.0, 0)
    policy = TabularPolicy(ask(case).exact)
    seen = []
    for iteration in range(4):
        case.before(policy, iteration)
        seen.append(float(policy.sampler(torch.full((1, 2), float(iteration)))[0, 0]))
    assert seen == [0, 0, 2, 2]


def test_the_sampler_is_off_by_the_number_given():
    found, now, _ = sampled("mismatch", 2.0)
    assert float((found - now).std()) == pytest.approx(2, rel=0.1)
    assert (sampled("mismatch", 2.0, iteration=5)[0] == found).all()  # the same fault all the time
    assert (sampled("mismatch", 0.0)[0] == now).all()


def test_the_first_values_are_off_by_the_number_given():
    _, _, policy = sampled("critic", 3.0)
    value = policy.value_scale * policy.value
    assert value.abs().tolist() == pytest.approx([3.0] * len(value)) and 0.2 < float((value > 0).double().mean()) < 0.8
    assert not sampled("critic", 3.0, iteration=1)[2].value.any()


def test_a_case_sets_what_an_algorithm_has():
    case = plain(0, settings={"flip": 0.1, "epochs": 7}, needs="flip")
    assert settings("dpo", case)["flip"] == 0.1 and settings("dpo", case)["beta"] == base.KL_COEF
    with pytest.raises(Unsuited, match="rloo has no setting 'flip'"):
        settings("rloo", case)
    found = settings(f"{BROKEN}:NoBaseline", plain(0, settings={"flip": 0.1}))
    assert "flip" not in found and found["group_size"] == 8 and found["learning_rate"] == 0.3


def scores(name: str, value: float, algorithms, seed: int = 0):
    question = ask(load(name).case(value, seed))
    return [run(question, algorithm, seed)[0] for algorithm in algorithms]


def test_one_probe_finds_a_missing_baseline():
    """Smoke: a whole run of a good method, and of one broken on purpose."""
    good, broken = scores("shift", 10.0, ["rloo", f"{BROKEN}:NoBaseline"])
    assert good > 0.95 and broken < 0.3


@pytest.mark.parametrize("algorithm", ["rloo", "remax", "dapo", "vbon"])
def test_what_is_sampled_beside_the_batches_counts(monkeypatch, algorithm):
    """ReMax scores greedy responses, DAPO draws again, and vBoN asks the reference; within one budget."""
    scored = []
    monkeypatch.setattr(base, "EPISODES", 1024)
    plain_call = base._Taught.__call__
    monkeypatch.setattr(
        base._Taught, "__call__", lambda self, **a: scored.append(len(a["prompts"])) or plain_call(self, **a)
    )
    run(ask(plain(0)), algorithm, 0)
    assert 1024 <= sum(scored) < 1024 + 4 * base.BATCH and (algorithm != "rloo" or sum(scored) == 1024)


@pytest.mark.slow
@pytest.mark.parametrize(("broken", "where"), [("NoBaseline", "shift"), ("ClampedKL", "kl"), ("TokenMean", "length")])
def test_a_broken_method_falls_in_the_probe_that_is_about_it(broken, where):
    """The mean loss over a sweep against RLOO; every other probe sees less than two thirds of it."""
    lost = {}
    for name in PROBES:
        if name != "preferences":
            found = np.array([scores(name, float(v), ["rloo", f"{BROKEN}:{broken}"]) for v in load(name).values])
            lost[name] = float(-np.diff(found, axis=1).mean())
    own = lost.pop(where)
    assert own > 0.15 and max(lost.values()) < own * 2 / 3, (own, lost)
