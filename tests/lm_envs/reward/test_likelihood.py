"""Likelihoods and hidden states of texts: against one forward a text, with long, empty and single-token ones."""

from __future__ import annotations

import numpy as np
import torch

from lm_envs.reward.likelihood import Likelihood
from tests import tiny

MODEL, TOKENIZER = tiny.gpt2(context=8), tiny.tokenizer()
LIKELIHOOD = Likelihood(MODEL, TOKENIZER)


def expected(before: list[int], ids: list[int]) -> float:
    logits = MODEL(torch.tensor([before + ids])).logits[0].log_softmax(dim=-1)
    return float(np.mean([logits[len(before) + t - 1, token].item() for t, token in enumerate(ids)]))


def test_means_are_those_of_one_forward():
    texts, contexts = ["b c", "d", "e f g h"], ["a", "a b c", "i"]
    found = LIKELIHOOD.mean(texts, contexts)
    wanted = [expected([1], [2, 3]), expected([1, 2, 3], [4]), expected([9], [5, 6, 7, 8])]
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    alone = LIKELIHOOD.mean(["a b c", "d", "", "e f"])
    np.testing.assert_allclose(alone, [expected([1], [2, 3]), np.nan, np.nan, expected([5], [6])], atol=1e-9)
    assert np.isnan(LIKELIHOOD.mean([""])).all()


def test_what_does_not_fit_loses_the_start_of_the_context():
    found = LIKELIHOOD.mean(["b c"], ["a b c d e f g h i"])
    np.testing.assert_allclose(found, [expected([4, 5, 6, 7, 8, 9], [2, 3])], atol=1e-9)


def test_hidden_states_are_means_over_tokens():
    found = LIKELIHOOD.hidden(["a b", "", "c d e"])
    for i, ids in ((0, [1, 2]), (2, [3, 4, 5])):
        states = MODEL.base_model(torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(found[i], states.mean(dim=0), atol=1e-9)
    assert not found[1].any()


def test_hidden_states_after_a_context_and_a_layer():
    for layer in (0, 1, -1):
        found = LIKELIHOOD.hidden(["b c", "", "e", "b c d e f g h i j"], ["a", "a b", "a b c d e f g h i", ""], layer)
        # The last context loses its start, and the last text its end: eight tokens fit.
        for i, before, ids in ((0, [1], [2, 3]), (2, [3, 4, 5, 6, 7, 8, 9], [5]), (3, [], [2, 3, 4, 5, 6, 7, 8, 9])):
            out = MODEL.base_model(torch.tensor([before + ids]), output_hidden_states=True)
            states = out.hidden_states[layer][0, len(before) :]
            np.testing.assert_allclose(found[i], states.mean(dim=0), atol=1e-9)
        assert not found[1].any()
    assert not np.allclose(LIKELIHOOD.hidden(["b"], ["a"]), LIKELIHOOD.hidden(["b"], ["c"]))
