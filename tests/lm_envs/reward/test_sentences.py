"""A reward per sentence: where sentences end, with which token, and what each is scored with."""

from __future__ import annotations

import numpy as np
import pytest

from lm_envs.reward.base import call_reward
from lm_envs.reward.sentences import PerSentence, sentences


class Letters:
    """A tokenizer with a token per letter; 0 is special."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(map(chr, filter(None, ids)))


class Trimmed(Letters):
    """One that drops a space at the beginning."""

    def decode(self, ids, skip_special_tokens):
        return super().decode(ids, skip_special_tokens).removeprefix(" ")


def given(*texts, stop="stop"):
    ids = [[*map(ord, text), *([0] if stop == "stop" else [])] for text in texts]
    reasons = [stop] * len(texts)
    return {"prompts": ["p"] * len(texts), "completions": list(texts), "completion_ids": ids, "finish_reasons": reasons}


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def parts(text):
    return [text[start:end] for start, end in sentences(text)]


def test_sentences():
    assert parts('It is 3.5 m. "Is it?" (Yes!) No') == ["It is 3.5 m.", '"Is it?"', "(Yes!)", "No"]
    assert parts("One\n\n- Two... \n") == ["One", "- Two..."] and parts(" \n") == []


@pytest.mark.parametrize("tokenizer", [Letters, Trimmed])
def test_a_sentence_pays_with_its_last_letter(tokenizer):
    reward = PerSentence(length, tokenizer())
    paid = call_reward(reward, **given(" Ab. Cde. F", "", stop="length"))
    assert {i: value for i, value in enumerate(paid[0].tolist()) if value} == {3: 3, 8: 4, 10: 1}
    assert not paid[1].any() and reward.dense and reward.__name__ == "length"


def test_the_sum_at_the_end_and_the_first_sentences_only():
    end = PerSentence(length, Letters(), "n", dense=False, most=2)
    assert call_reward(end, **given("Ab. Cde. F", "G")).tolist() == [7, 1] and end.__name__ == "n" and not end.dense


def test_what_a_sentence_is_scored_with():
    seen = []

    def watch(**columns):
        seen.append(columns)
        return [None, 1.0, 2.0]

    found = call_reward(
        PerSentence(watch, Letters(), dense=False), **given("A. B.", "C", stop="length"), topic=["x", "y"]
    )
    assert found.tolist() == [1.0, 2.0]  # None pays nothing
    assert seen[0] == {
        "prompts": ["p"] * 3,
        "completions": ["A.", "B.", "C"],
        "completion_ids": [list(map(ord, "A.")), list(map(ord, " B.")), [ord("C")]],
        "finish_reasons": ["stop", "length", "length"],
        "earlier": [[], ["A."], []],
        "topic": ["x", "x", "y"],
    }


def test_a_reward_per_token_is_refused():
    with pytest.raises(ValueError, match="'dense' pays per token: one that scores sentences gives one number each"):
        call_reward(PerSentence(lambda completion_ids, **c: [np.ones(2)], Letters(), "dense"), **given("A."))
