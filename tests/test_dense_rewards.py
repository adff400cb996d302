"""The example of a reward per token against the same sum at the end; docs quote its figures."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lm_envs.env.mdp import TextMDP
from lm_envs.exact.solver import Exact


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).resolve().parent.parent / "examples" / "dense_rewards.py"
    spec = importlib.util.spec_from_file_location("example_dense_rewards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_forms_pay_the_same_sum(example):
    end, sentences, each = (TextMDP(task) for task in example.tasks().values())
    assert each.dense and sentences.dense and not end.dense
    every = end_responses = Exact(end).responses.numpy()[::37]
    for prompt in range(2):
        index = np.full(len(every), prompt)
        paid = [mdp.score(index, end_responses) for mdp in (end, each, sentences)]
        np.testing.assert_allclose(paid[0].sum(axis=1), paid[1].sum(axis=1), atol=1e-12)
        np.testing.assert_allclose(paid[0].sum(axis=1), paid[2].sum(axis=1), atol=1e-12)
        assert (np.count_nonzero(paid[0], axis=1) <= 1).all() and np.count_nonzero(paid[1][-1]) == 7


def test_a_sentence_pays_with_its_full_stop(example):
    """Tokens 1, 0 | 2, 2, 0 | EOS: three sentences."""
    reward = example.PerSentence(np.array([[1.0, 10.0, 100.0, 1000.0]]), {"x": 0})
    assert [list(paid) for paid in reward(["x", "x"], [[1, 0, 2, 2, 0, 3], [0]])] == [[0, 11, 0, 0, 201, 1000], [1]]


@pytest.mark.slow
def test_paid_at_once_it_is_learned_sooner(example):
    made = example.tasks()
    exact = Exact(TextMDP(made["end"]))
    for lam, least in ((0.0, 3.0), (0.95, 1.3)):
        end, _, each = (example.regret(task, exact, lam, 0, 10_240) for task in made.values())
        assert each < 0.1 and end > least * each
