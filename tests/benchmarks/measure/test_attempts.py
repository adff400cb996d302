"""pass@k: the estimator by hand and by all subsets, and the measurement of a policy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.measure import attempts
from lm_envs.benchmarks.measure.attempts import measure_attempts, pass_at_k
from lm_envs.benchmarks.measure.samples import evaluation_env
from tests import tiny


def test_the_estimator_is_the_mean_over_all_subsets():
    for n, k in ((5, 1), (5, 3), (4, 4), (6, 2)):
        for c in range(n + 1):
            outcomes = [i < c for i in range(n)]
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, np.array([c]), k)[0] == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(200, np.array([0, 1, 200]), 100).tolist() == pytest.approx([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="k from 1 to 4, not 5"):
        pass_at_k(4, np.array([1]), 5)


def test_a_policys_attempts_are_counted_per_prompt(monkeypatch):
    def judge(completions, **columns):
        return [float(text.split()[:1] == ["b"]) for text in completions]

    task = replace(tiny.task(judge=judge), attempts=6)
    policy = LMPolicy.for_mdp(evaluation_env(task, "test").mdp, task.reference)
    found = measure_attempts(task, policy, "test", None, 0, {})
    assert list(found) == ["pass@1", "pass@2", "pass@4", "pass@6", "pass@1_se", "pass@2_se", "pass@4_se", "pass@6_se"]
    env = evaluation_env(task, "test", group_size=6)
    traj = attempts.rollout(env, policy, episodes=12, seed=attempts._SEED)
    solved = [int(attempts.judged(env.mdp, traj)[1][i : i + 6].sum()) for i in (0, 6)]
    assert traj.prompt_index.tolist() == [0] * 6 + [1] * 6 and 0 < sum(solved) < 12
    assert found["pass@1"] == pytest.approx(sum(solved) / 12)
    assert found["pass@6"] == pytest.approx(np.mean([c > 0 for c in solved]))
    monkeypatch.setattr(attempts, "rows_at_once", lambda parameters: 6)  # a prompt at a time
    assert measure_attempts(task, policy, "test", None, 0, {}) == found
    assert len(measure_attempts(task, policy, "test", 1, 0, {})) == 8
    assert measure_attempts(replace(task, attempts=0), policy, "test", None, 0, {}) == {}
    assert measure_attempts(task, object(), "test", None, 0, {}) == {}
