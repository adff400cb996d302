"""The clause grammar of the Reviews task, the pairs of words that it can never produce, and the gold reward.

A context-free grammar without recursion makes clauses; a review strings them together. Each review has a
latent sentiment z in [-1, 1], and each opinionated word is positive with probability ``(1 + z) / 2``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate, count, pairwise
from math import tanh

import numpy as np

from lm_envs import rng

EOS = "<eos>"
UNKNOWN = "<unk>"
MIN_TOKENS, MAX_TOKENS = 16, 34  # of a review, EOS included
SENTIMENTS = (-1.0, -0.7, 0.0, 0.7, 1.0)
_NUMBERS = 128  # uniform numbers that any one review needs at most


LEXICON: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "ADJ+": "great good fine superb brilliant wonderful charming clever moving beautiful gripping funny fresh "
        "excellent stunning warm witty touching",
        "ADJ-": "bad awful terrible boring dull weak clumsy tedious stupid bland horrible lifeless messy annoying "
        "shallow stale painful forgettable",
        "ADJ": "long short quiet loud dark simple strange young old french american familiar modern slow",
        "VERB+": "loved enjoyed admired adored praised",
        "VERB-": "hated disliked resented endured regretted",
        "VERB": "watched saw rented discussed finished remembered",
        "NOUN+": "masterpiece gem triumph delight classic",
        "NOUN-": "mess disaster bore failure waste",
        "FILM": "film movie picture story comedy drama thriller remake sequel",
        "PART": "plot script acting cast director ending dialogue soundtrack camera editing humor romance villain hero "
        "opening",
        "PARTS": "characters effects jokes performances songs scenes actors costumes",
        "ADVERB": "very really quite truly rather simply so",
        "PERSON": "i we they you people critics",
        "PLACE": "theater city village school house hotel",
        "TIME": "yesterday twice again alone together recently",
        "NUMBER": "two three seven ten",
        "UNIT": "hours minutes years days",
        "DET": "the this that",
        "BE": "is was seems looks feels",
        "IS": "is was becomes",
        "ARE": "are were seem look feel",
        "JOIN": "and but while because",
        "A": "a an",
    }.items()
}

# Each rule lists (weight, symbols). A symbol is a rule, a class of the lexicon, "ADJ*" and the like (a class
# whose sign the sentiment picks), or a word.
OPINIONATED = {"ADJ*": ("ADJ+", "ADJ-"), "VERB*": ("VERB+", "VERB-"), "NOUN*": ("NOUN+", "NOUN-")}
RULES: dict[str, tuple[tuple[float, tuple[str, ...]], ...]] = {
    "REVIEW": (
        (2, ("SENTENCE", EOS)),
        (4, ("SENTENCE", "SENTENCE", EOS)),
        (1, ("SENTENCE", "SENTENCE", "SENTENCE", EOS)),
    ),
    "SENTENCE": (
        (5, ("CLAUSE", ".")),
        (5, ("CLAUSE", "JOIN", "CLAUSE", ".")),
        (2, ("CLAUSE", ",", "CLAUSE", "JOIN", "CLAUSE", ".")),
    ),
    "CLAUSE": (
        (6, ("SUBJECT", "BE", "QUALITY")),
        (6, ("SUBJECTS", "ARE", "QUALITY")),
        (3, ("PERSON", "VERB*", "OBJECT")),
        (1, ("PERSON", "VERB", "OBJECT", "TIME")),
        (2, ("DET", "FILM", "IS", "A", "NOUN*")),
        (2, ("DET", "FILM", "has", "A", "ADJ*", "PART")),
        (1, ("DET", "FILM", "takes", "place", "in", "A", "ADJ", "PLACE")),
        (1, ("DET", "FILM", "lasts", "for", "NUMBER", "UNIT")),
        (1, ("the", "PART", "stays", "in", "the", "PLACE")),
        (1, ("the", "PARTS", "come", "from", "the", "ADJ", "PLACE")),
    ),
    "SUBJECT": ((3, ("DET", "FILM")), (3, ("the", "PART")), (1, ("the", "PART", "of", "the", "FILM"))),
    "SUBJECTS": ((3, ("the", "PARTS")), (1, ("the", "PARTS", "of", "the", "FILM"))),
    "OBJECT": ((3, ("DET", "FILM")), (2, ("the", "PART")), (2, ("the", "PARTS"))),
    "QUALITY": ((3, ("ADJ*",)), (3, ("ADVERB", "ADJ*")), (1, ("ADJ",))),
}

WORDS: tuple[str, ...] = tuple(
    sorted(
        {word for words in LEXICON.values() for word in words}
        | {
            symbol
            for alternatives in RULES.values()
            for _, symbols in alternatives
            for symbol in symbols
            if symbol not in RULES and symbol not in LEXICON and symbol not in OPINIONATED and symbol != EOS
        }
    )
)
# Cumulative weights. Early words of a class are up to three times as frequent as late ones, as words are.
_EDGES: dict[str, tuple[float, ...]] = {
    symbol: tuple(accumulate(weight for weight, _ in alternatives)) for symbol, alternatives in RULES.items()
} | {symbol: tuple(accumulate(np.linspace(3, 1, len(words)).tolist())) for symbol, words in LEXICON.items()}
POSITIVE = frozenset(LEXICON["ADJ+"] + LEXICON["VERB+"] + LEXICON["NOUN+"])
NEGATIVE = frozenset(LEXICON["ADJ-"] + LEXICON["VERB-"] + LEXICON["NOUN-"])
ADJECTIVES = frozenset(LEXICON["ADJ+"] + LEXICON["ADJ-"] + LEXICON["ADJ"])


def review(numbers: Sequence[float], sentiment: float) -> list[str]:
    """Return a review that ends in ``<eos>``, a pure function of uniform numbers and the latent sentiment; ValueError
    for too few numbers."""
    draw = iter(numbers)
    words: list[str] = []

    def pick(edges: Sequence[float]) -> int:
        return bisect_right(edges, next(draw) * edges[-1])

    def expand(symbol: str) -> None:
        if symbol in RULES:
            for part in RULES[symbol][pick(_EDGES[symbol])][1]:
                expand(part)
        elif symbol in OPINIONATED:
            expand(OPINIONATED[symbol][pick((1 + sentiment, 2))])
        elif symbol in LEXICON and symbol != "A":  # which article it is depends on the next word
            words.append(LEXICON[symbol][pick(_EDGES[symbol])])
        else:
            words.append(symbol)

    try:
        expand("REVIEW")
    except StopIteration:
        raise ValueError(f"{len(numbers)} uniform numbers are too few for this review") from None
    return [_article(words[i + 1]) if word == "A" else word for i, word in enumerate(words)]


def _article(following: str) -> str:
    return "an" if following[0] in "aeiou" else "a"


def corpus(seed: int, size: int, first: int = 0) -> list[list[str]]:
    """Return reviews number ``first`` to ``first + size - 1``, of ``MIN_TOKENS`` to ``MAX_TOKENS`` words with
    ``<eos>``.

    Latent sentiments are positive and negative equally often, so the corpus is neutral on the whole.
    """
    numbers = np.arange(first, first + size)
    found: dict[int, list[str]] = {}
    for attempt in count():  # reviews that are too short or too long are drawn again, with other numbers
        left = numbers if not attempt else np.array([n for n in numbers.tolist() if n not in found], dtype=np.int64)
        if not len(left):
            return [found[n] for n in numbers.tolist()]
        places = np.arange(attempt * _NUMBERS, (attempt + 1) * _NUMBERS)
        drawn = rng.uniform(seed, rng.CORPUS, left[:, None], places)
        for number, row in zip(left.tolist(), drawn.tolist(), strict=True):
            words = review(row[1:], SENTIMENTS[int(row[0] * len(SENTIMENTS))])
            if MIN_TOKENS <= len(words) <= MAX_TOKENS:
                found[number] = words
    raise AssertionError("unreachable")


@lru_cache(maxsize=1)
def grammatical() -> frozenset[tuple[str, str]]:
    """Return every pair of neighboring words that some review holds; ``<eos>`` counts as a word.

    Where a rule sets X before Y, any last word of X can stand before any first word of Y.
    """

    def words(symbol: str) -> frozenset[str]:
        return frozenset(LEXICON.get(symbol, (symbol,)))

    @cache
    def edge(symbol: str, place: int) -> frozenset[str]:
        if symbol in RULES:
            return frozenset().union(*(edge(parts[place], place) for _, parts in RULES[symbol]))
        if symbol in OPINIONATED:
            return frozenset().union(*map(words, OPINIONATED[symbol]))
        return words(symbol)

    pairs = {
        (left, right)
        for alternatives in RULES.values()
        for _, parts in alternatives
        for before, after in pairwise(parts)
        for left in edge(before, -1)
        for right in edge(after, 0)
    }
    return frozenset(pair for pair in pairs if pair[0] not in LEXICON["A"] or pair[0] == _article(pair[1]))


def gold_reward(prompt: Sequence[str], response: Sequence[str], stopped: bool) -> float:
    """Return the score by which simulated annotators choose.

    ``1.5 tanh((p - n) / 3) - 0.5 u - 0.6 r - 0.5 m`` with, in the response, p positive and n negative words,
    u neighboring pairs of words that the grammar can never produce (the prompt's last word and the EOS are neighbors
    too), r adjectives that occurred before, and m = 1 if the response did not stop by itself.

    Args:
        prompt, response: their words, without EOS.
        stopped: whether EOS followed.
    """
    balance = sum((word in POSITIVE) - (word in NEGATIVE) for word in response)
    spoken = [*prompt[-1:], *response, *([EOS] if stopped else [])]
    ungrammatical = sum(pair not in grammatical() for pair in pairwise(spoken))
    adjectives = [word for word in response if word in ADJECTIVES]
    repeated = len(adjectives) - len(set(adjectives))
    return 1.5 * tanh(balance / 3) - 0.5 * ungrammatical - 0.6 * repeated - 0.5 * (not stopped)
