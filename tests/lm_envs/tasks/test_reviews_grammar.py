"""The grammar of the reviews: what it can say, what it never says, and the gold reward by hand."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import tanh

import numpy as np
import pytest

from lm_envs.tasks import reviews_grammar as grammar
from lm_envs.tasks.reviews_grammar import EOS, corpus, gold_reward, grammatical


@pytest.fixture(scope="module")
def reviews():
    return corpus(seed=0, size=3000)


def test_no_review_holds_a_pair_that_the_grammar_can_never_produce(reviews):
    assert [pair for words in reviews for pair in pairwise(words) if pair not in grammatical()] == []


def test_every_pair_of_word_classes_that_is_called_grammatical_occurs(reviews):
    """So the set is not too large either; pairs of single words are too many to see each."""
    classes = {word: name for name, words in grammar.LEXICON.items() for word in words}

    def kinds(pairs):
        return {(classes.get(left, left), classes.get(right, right)) for left, right in pairs}

    heard = kinds(pair for words in reviews for pair in pairwise(words))
    assert kinds(grammatical()) - heard == set()


@pytest.mark.parametrize(
    "pair",
    [("a", "awful"), ("an", "great"), ("film", "film"), ("the", "great"), (".", "."), ("film", EOS), ("dull", "dull")],
)
def test_pairs_that_never_occur(pair):
    assert pair not in grammatical()


def test_reviews_are_of_the_length_they_should_be_and_end_properly(reviews):
    assert {words[-2:] == [".", EOS] for words in reviews} == {True}
    lengths = [len(words) for words in reviews]
    assert grammar.MIN_TOKENS <= min(lengths) and max(lengths) <= grammar.MAX_TOKENS
    assert {word for words in reviews for word in words} == {*grammar.WORDS, EOS}  # every word is used
    assert 100 <= len(grammar.WORDS) <= 250


def test_the_corpus_is_neutral_on_the_whole_and_consistent_within_a_review(reviews):
    signs = [
        [
            (word in grammar.POSITIVE) - (word in grammar.NEGATIVE)
            for word in words
            if word in grammar.POSITIVE | grammar.NEGATIVE
        ]
        for words in reviews
    ]
    balance = np.array([sum(row) for row in signs])
    assert abs(balance.mean()) < 4 * balance.std() / len(balance) ** 0.5
    # A latent sentiment z of variance 0.596: two opinions of a review agree with probability (1 + E z^2) / 2.
    agree = np.mean([left == right for row in signs for left, right in pairwise(row)])
    expected = (1 + np.mean(np.square(grammar.SENTIMENTS))) / 2
    assert agree == pytest.approx(expected, abs=0.03)


def test_sentiment_decides_the_opinions():
    numbers = np.linspace(0.01, 0.99, 500)
    np.random.default_rng(0).shuffle(numbers)
    for sentiment, absent in ((1.0, grammar.NEGATIVE), (-1.0, grammar.POSITIVE)):
        for start in range(50):
            assert not absent.intersection(grammar.review(numbers[start:].tolist(), sentiment))


def test_a_review_is_a_function_of_seed_and_number():
    assert corpus(0, 20) == [*corpus(0, 12), *corpus(0, 8, first=12)]
    assert corpus(0, 20) != corpus(1, 20)
    assert len(Counter(map(tuple, corpus(0, 200)))) == 200


def test_too_few_numbers_are_refused():
    with pytest.raises(ValueError, match="3 uniform numbers are too few"):
        grammar.review([0.5, 0.5, 0.5], 0.0)


@pytest.mark.parametrize(
    ("prompt", "response", "stopped", "expected"),
    [
        ("the plot is", "great .", True, 1.5 * tanh(1 / 3)),
        ("the plot is", "great .", False, 1.5 * tanh(1 / 3) - 0.5),
        ("the plot is", "dull and i hated the film .", True, -1.5 * tanh(2 / 3)),
        ("the plot is", "great and the cast is great .", True, 1.5 * tanh(2 / 3) - 0.6),
        ("the plot is", "long and the cast is long and the script is long .", True, -1.2),
        ("the plot is great .", "", True, 0.0),
        ("the plot is", "", True, -0.5),  # "is <eos>"
        ("the plot", "plot is great .", True, 1.5 * tanh(1 / 3) - 0.5),  # "plot plot", across the boundary
        ("the plot is", "great great", True, 1.5 * tanh(2 / 3) - 0.5 * 2 - 0.6),  # "great great" and "great <eos>"
        (
            "the great plot is great",
            "and i loved the masterpiece .",
            True,
            1.5 * tanh(2 / 3) - 0.5,
        ),  # "the masterpiece"
        ("the plot is", "<unk> .", True, -1.0),
    ],
)
def test_gold_by_hand(prompt, response, stopped, expected):
    assert gold_reward(prompt.split(), response.split(), stopped) == pytest.approx(expected)


def test_gold_of_the_corpus_holds_no_penalty_but_for_repeats(reviews):
    for words in reviews[:200]:
        response = words[8:-1]
        balance = sum((word in grammar.POSITIVE) - (word in grammar.NEGATIVE) for word in response)
        adjectives = Counter(word for word in response if word in grammar.ADJECTIVES)
        repeated = sum(count - 1 for count in adjectives.values())
        assert gold_reward(words[:8], response, True) == pytest.approx(1.5 * tanh(balance / 3) - 0.6 * repeated)
