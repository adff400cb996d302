"""Every number of a study's results, and every answer of a simulated annotator, is computed here a second time by plain
loops. What is taken from the project is the counted uniforms alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_envs import rng
from lm_envs.feedback import agreement, ratings
from lm_envs.feedback.annotators import Annotator, work
from lm_envs.feedback.store import Judgment, Store, Task
from lm_envs.feedback.study import Answer, Item, Response, StudySettings
from lm_envs.feedback.summary import summarize

pytest.importorskip("krippendorff")
RESAMPLED = 40
SCORE = {"one": 0.0, "three": 1.5, "two": 0.5}  # of a reward model, by source, beside a number per item


def study() -> list[Judgment]:
    """Ratings from 1 to 4 by three people of two or three responses to 14 items: ties, skipped items, items with known
    ranks, orders and times of all kinds."""
    draws, found = np.random.default_rng(5), []
    for number in range(1, 15):
        names = ["one", "two", "three"] if number % 3 else ["two", "one"]
        texts = [" ".join("x" * int(draws.integers(1, 9)) for _ in range(3)) for _ in names]
        known = () if number % 4 else (0, 1, 1)[: len(names)]
        item = Item(f"p{number}", tuple(map(Response, texts, names)), known=known)
        for name in ("ann", "ben", "cy")[: 1 + number % 4]:
            given = tuple(
                int(x) for x in np.clip(draws.integers(1, 4, len(names)) + (np.array(names) == "three"), 1, 4)
            )
            order = tuple(int(place) for place in draws.permutation(len(names)))
            told = sorted(set(given), reverse=True)
            ranks = tuple(told.index(x) for x in given)
            answer = Answer(ranks=ranks, ratings=given, seconds=float(draws.integers(1, 90)))
            if (number, name) in ((2, "ann"), (7, "ben")):
                answer = Answer(skipped="unclear", seconds=0.5)
            found.append(Judgment(name, number, item, order, answer, float(-number)))
    return found


def compared(judgments: list[tuple[int, Judgment]]) -> dict[tuple, dict[str, int]]:
    """By item and two responses, what each person said; which of them is the first alternates."""
    found: dict[tuple, dict[str, int]] = {}
    for number, judgment in judgments:
        ranks = judgment.answer.ranks
        for i, j in itertools.combinations(range(len(ranks)), 2):
            better = (ranks[i] < ranks[j]) - (ranks[i] > ranks[j])
            found.setdefault((number, i, j), {})[judgment.annotator] = better * (-1) ** (number + i + j)
    return found


def raw(units: dict[tuple, dict[str, int]]) -> float:
    pairs = [a == b for said in units.values() for a, b in itertools.combinations(said.values(), 2)]
    return sum(pairs) / len(pairs) if pairs else math.nan


def alpha(units: dict[Any, dict[str, Any]], ordinal: bool = False) -> float:
    """Krippendorff's, from the coincidences of values within each unit."""
    together: Counter[tuple] = Counter()
    for said in units.values():
        for (_, a), (_, b) in itertools.permutations(said.items(), 2):
            together[a, b] += 1 / (len(said) - 1)
    values = sorted({a for a, _ in together})
    count = {a: sum(together[a, b] for b in values) for a in values}

    def apart(a: Any, b: Any) -> float:
        between = [x for x in values if min(a, b) <= x <= max(a, b)]
        return (sum(count[x] for x in between) - (count[a] + count[b]) / 2) ** 2 if ordinal else float(a != b)

    pairs = list(itertools.product(values, repeat=2))
    expected = sum(count[a] * count[b] * apart(a, b) for a, b in pairs)
    seen = sum(together[a, b] * apart(a, b) for a, b in pairs)
    return 1 - (sum(count.values()) - 1) * seen / expected if expected else math.nan


def over_items(judgments: list[Judgment], statistic: Any) -> tuple[float, ...]:
    """The 95 % percentile interval over resampled items, and their number."""
    items = list(dict.fromkeys(judgment.item for judgment in judgments))
    draws, found = np.random.default_rng(0), []
    for _ in range(RESAMPLED):
        drawn = [items[k] for k in draws.integers(len(items), size=len(items))]
        found.append(statistic(compared([(k, j) for k, item in enumerate(drawn) for j in judgments if j.item == item])))
    return (*np.nanquantile(found, (0.025, 0.975)), len(items))


def share(values: list[tuple[int, float]]) -> tuple[float, ...]:
    """Mean, interval over resampled items, and the number of values."""
    items = sorted({item for item, _ in values})
    drawn = np.random.default_rng(0).integers(len(items), size=(RESAMPLED, len(items)))
    means = [np.mean([x for k in row for item, x in values if item == items[k]]) for row in drawn]
    return (np.mean([x for _, x in values]), *np.quantile(means, (0.025, 0.975)), len(values))


def cells(row: dict[str, Any], name: str) -> tuple[float, ...]:
    return row[name], row["low"], row["high"], row["n"]


@pytest.fixture(scope="module")
def judgments() -> list[Judgment]:
    return study()


@pytest.fixture(scope="module")
def answered(judgments: list[Judgment]) -> list[Judgment]:
    return [judgment for judgment in judgments if judgment.answer.ranks]


@pytest.fixture(scope="module")
def scores(judgments: list[Judgment]) -> list[list[float]]:
    return [[SCORE[r.source] * (1 + j.item / 7) for r in j.content.responses] for j in judgments]


@pytest.fixture(scope="module")
def found(judgments: list[Judgment], scores: list[list[float]]) -> dict[str, list[dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (agreement, ratings):
            patch.setattr(module, "RESAMPLES", RESAMPLED)
        return summarize(judgments, scores=scores)


def test_agreement(found: dict[str, list[dict[str, Any]]], answered: list[Judgment]) -> None:
    units = compared([(judgment.item, judgment) for judgment in answered])
    rows = {row["measure"]: row for row in found["Agreement between annotators"]}
    for name, measure in (("raw agreement of two people", raw), ("Krippendorff's alpha, nominal", alpha)):
        assert cells(rows.pop(name), "value") == pytest.approx((measure(units), *over_items(answered, measure)))
    rated: dict[Any, dict[str, Any]] = {}
    for judgment in answered:
        for place, rating in enumerate(judgment.answer.ratings):
            rated.setdefault((judgment.item, place), {})[judgment.annotator] = rating
    row = rows.pop("Krippendorff's alpha of ratings, ordinal")
    assert (row["value"], row["n"]) == pytest.approx((alpha(rated, ordinal=True), len(rated)))
    sizes = Counter(len(said) for said in units.values() if len(said) > 1)
    assert len(sizes) == 2 and sizes[2] != sizes[3]
    ((size, count),) = sizes.most_common(1)
    several = [list(said.values()) for said in units.values() if len(said) == size]
    everything = sum(several, [])
    chance = sum((everything.count(c) / len(everything)) ** 2 for c in (-1, 0, 1))
    same = np.mean([np.mean([a == b for a, b in itertools.permutations(said, 2)]) for said in several])
    row = rows.pop(f"Fleiss' kappa, {size} people")
    assert (row["value"], row["n"]) == pytest.approx(((same - chance) / (1 - chance), count))
    for a, b in itertools.combinations(("ann", "ben", "cy"), 2):
        both = [(said[a], said[b]) for said in units.values() if {a, b} <= set(said)]
        mine, theirs = ([pair[k] for pair in both] for k in (0, 1))
        chance = sum(mine.count(c) * theirs.count(c) for c in (-1, 0, 1)) / len(both) ** 2
        row = rows.pop(f"Cohen's kappa, {a} and {b}")
        kappa = (np.mean([x == y for x, y in both]) - chance) / (1 - chance)
        assert (row["value"], row["n"]) == pytest.approx((kappa, len(both)))
    assert not rows
    assert agreement.cohen_kappa([0, 0, 1], [0, 0, 2]) == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))


def test_annotators(
    found: dict[str, list[dict[str, Any]]], judgments: list[Judgment], answered: list[Judgment]
) -> None:
    units = compared([(judgment.item, judgment) for judgment in answered])
    for row, name in zip(found["Annotators"], ("ann", "ben", "cy"), strict=True):
        own = [judgment for judgment in answered if judgment.annotator == name]
        times = sorted(judgment.answer.seconds for judgment in own)
        half = len(times) // 2
        middle = times[half] if len(times) % 2 else (times[half - 1] + times[half]) / 2
        others = []
        for said in units.values():
            rest = Counter(vote for who, vote in said.items() if who != name)
            if name in said and rest and rest.most_common(1)[0][1] > rest.total() / 2:
                others.append(said[name] == rest.most_common(1)[0][0])
        gold = []
        for judgment in own:
            known, ranks = judgment.content.known, judgment.answer.ranks
            for i, j in itertools.permutations(range(len(known)), 2):
                if known[i] < known[j]:
                    gold.append(ranks[i] < ranks[j])
        skipped = sum(judgment.annotator == name for judgment in judgments) - len(own)
        expected = {"annotator": name, "answers": len(own), "skipped": skipped, "median seconds": middle}
        expected |= {"with the others": np.mean(others), "with gold items": np.mean(gold) if gold else math.nan}
        assert row == pytest.approx(expected, nan_ok=True) and len(set(others)) == 2


def test_biases(found: dict[str, list[dict[str, Any]]], answered: list[Judgment]) -> None:
    first, longer = [], []
    for judgment in answered:
        ranks, texts = judgment.answer.ranks, [response.text for response in judgment.content.responses]
        for i, j in itertools.permutations(range(len(ranks)), 2):
            if ranks[i] < ranks[j]:
                first += [(judgment.item, float(judgment.order.index(i) < judgment.order.index(j)))]
                longer += [(judgment.item, float(len(texts[i]) > len(texts[j])))] * (len(texts[i]) != len(texts[j]))
    for row, values in zip(found["Biases (0.5 is none)"], (first, longer), strict=True):
        assert cells(row, "share") == pytest.approx(share(values))


def battles(judgments: list[Judgment]) -> list[tuple[int, str, str, float]]:
    said = []
    for judgment in judgments:
        ranks, names = judgment.answer.ranks, [response.source for response in judgment.content.responses]
        for i, j in itertools.combinations(range(len(ranks)), 2):
            said.append(
                (judgment.item, names[i], names[j], 0.5 + 0.5 * ((ranks[i] < ranks[j]) - (ranks[i] > ranks[j])))
            )
    return said


def strengths(wins: np.ndarray) -> np.ndarray:
    """Bradley and Terry's maximum likelihood in Elo points around 0, by Zermelo's iteration, of ``(R, N, N)``."""
    wins = wins + ratings.PRIOR / 2 * (1 - np.eye(wins.shape[-1]))
    p = np.ones(wins.shape[:-1])
    for _ in range(2_000):
        both = (wins + wins.swapaxes(1, 2)) / (p[:, :, None] + p[:, None])
        p = wins.sum(axis=2) / both.sum(axis=2)
        p /= np.exp(np.log(p).mean(axis=1, keepdims=True))
    return 400 * np.log10(p)


def test_ratings_of_the_methods(found: dict[str, list[dict[str, Any]]], answered: list[Judgment]) -> None:
    said, names = battles(answered), ["one", "three", "two"]
    items = sorted({item for item, *_ in said})
    wins = np.zeros((len(items), 3, 3))
    for item, a, b, result in said:
        wins[items.index(item), names.index(a), names.index(b)] += result
        wins[items.index(item), names.index(b), names.index(a)] += 1 - result
    drawn = np.random.default_rng(0).multinomial(len(items), np.full(len(items), 1 / len(items)), size=RESAMPLED)
    tables = np.stack(
        [wins.sum(axis=0), *(sum(n * table for n, table in zip(row, wins, strict=True)) for row in drawn)]
    )
    value, *resampled = strengths(tables)
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    rows = [row for row in found["Ratings"] if "Bradley-Terry" in row]
    assert [row["source"] for row in rows] == [names[k] for k in np.argsort(-value)]
    for row in rows:
        k = names.index(row["source"])
        counts = sum(row["source"] in pair for _, *pair, _ in said)
        assert cells(row, "Bradley-Terry") == pytest.approx((value[k], low[k], high[k], counts), abs=1e-3)
    assert found["Ratings"] == rows  # no circle


def test_elo(found: dict[str, list[dict[str, Any]]], answered: list[Judgment]) -> None:
    said, draws = battles(answered), np.random.default_rng(9)
    items = sorted({item for item, *_ in said})
    of_item = {item: [battle for battle in said if battle[0] == item] for item in items}

    def played(fought: list[tuple[int, str, str, float]]) -> list[float]:
        rating = dict.fromkeys(("one", "three", "two"), 1000.0)
        for k in draws.permutation(len(fought)):
            _, a, b, result = fought[k]
            change = 16 * (result - 1 / (1 + 10 ** ((rating[b] - rating[a]) / 400)))
            rating[a], rating[b] = rating[a] + change, rating[b] - change
        return list(rating.values())

    mean = np.mean([played(said) for _ in range(300)], axis=0)
    drawn = [[items[k] for k in draws.integers(len(items), size=len(items))] for _ in range(400)]
    each = [np.mean([played(sum((of_item[i] for i in row), [])) for _ in range(3)], axis=0) for row in drawn]
    low, high = np.quantile(each, (0.025, 0.975), axis=0)
    rows = {row["source"]: row for row in found["Elo"]}
    whole = ratings.elo([ratings.Battle(*battle) for battle in said], start=0.0)  # with all of its resamples
    assert list(rows) == sorted(rows, key=lambda name: -rows[name]["Elo"])
    for k, name in enumerate(("one", "three", "two")):
        count = sum(name in pair for _, *pair, _ in said)
        assert rows[name]["n"] == count and rows[name]["Elo"] == pytest.approx(mean[k], abs=3)
        more, wide = whole[name], high[k] - low[k]
        assert more.value == pytest.approx(mean[k] - 1000, abs=3)
        assert (more.low, more.high) == pytest.approx((low[k] - 1000, high[k] - 1000), abs=0.15 * wide)
        assert more.high - more.low == pytest.approx(wide, rel=0.15)


def test_win_rates_and_mean_ratings(
    found: dict[str, list[dict[str, Any]]], judgments: list[Judgment], answered: list[Judgment]
) -> None:
    said = battles(answered)
    counts = Counter(name for _, *pair, _ in said for name in pair)
    assert counts["one"] == counts["two"] > counts["three"]  # "one" is the first of those most often compared
    for against, rows in (
        ("one", found["Preferred to one"]),
        ("three", summarize_quickly(judgments, "three")["Preferred to three"]),
    ):
        assert [row["source"] for row in rows] == sorted({"one", "two", "three"} - {against})
        for row in rows:
            values = [(i, r if b == against else 1 - r) for i, a, b, r in said if {a, b} == {row["source"], against}]
            assert cells(row, "share") == pytest.approx(share(values))
    assert [row["source"] for row in found["Mean rating"]] == ["one", "three", "two"]
    for row in found["Mean rating"]:
        values = [
            (judgment.item, float(rating))
            for judgment in answered
            for response, rating in zip(judgment.content.responses, judgment.answer.ratings, strict=True)
            if response.source == row["source"]
        ]
        assert cells(row, "mean") == pytest.approx(share(values))


def summarize_quickly(judgments: list[Judgment], against: str | None = None) -> dict[str, list[dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (agreement, ratings):
            patch.setattr(module, "RESAMPLES", RESAMPLED)
        return summarize(judgments, against)


def test_a_reward_model_beside_people(
    found: dict[str, list[dict[str, Any]]], judgments: list[Judgment], scores: list[list[float]]
) -> None:
    known = []
    for judgment, row in zip(judgments, scores, strict=True):
        ranks = judgment.answer.ranks
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                known.append((judgment.item, abs(row[i] - row[j]), float(row[better] > row[worse])))
    known.sort(key=lambda each: each[1])
    ends = [len(known) * k // 5 for k in range(6)]
    parts = [known, *(known[a:b] for a, b in itertools.pairwise(ends))]
    for row, part in zip(found["Reward model"], parts, strict=True):
        assert row["margin"] == f"{part[0][1]:.2f} to {part[-1][1]:.2f}"
        assert row["expected"] == pytest.approx(np.mean([1 / (1 + math.exp(-margin)) for _, margin, _ in part]))
        assert cells(row, "as people") == pytest.approx(share([(item, right) for item, _, right in part]))


def test_a_circle_of_majorities_is_told_and_a_tie_is_none() -> None:
    def judged(number: int, better: str, worse: str, tie: bool = False) -> Judgment:
        item = Item("p", (Response("x", better), Response("y", worse)))
        return Judgment("ann", number, item, (0, 1), Answer(ranks=(0, 0) if tie else (0, 1)), float(-number))

    # "c" before "a" by two answers of three
    circle = [judged(1, "a", "b"), judged(2, "b", "c"), judged(3, "c", "a"), judged(4, "c", "a"), judged(5, "a", "c")]
    rows = summarize_quickly(circle)
    assert rows["Ratings"][-1]["source"] == "(majorities of 1 of 1 triples go in a circle)"
    assert rows["Agreement between annotators"] == []
    assert ratings.cycles(ratings.battles([judged(k, *"abc"[k:][:2], tie=True) for k in (0, 1)])) == (0, 0)
    ties = [judged(1, "a", "b", True), judged(2, "b", "c", True), judged(3, "a", "c", True)]
    assert ratings.cycles(ratings.battles(ties)) == (0, 1)
    assert [battle.item for battle in ratings.battles(circle)] == [5, 4, 3, 2, 1]  # in order of time
    assert str(agreement.Interval(0.5, 0.25, 0.75, 4)) == "0.50 [0.25, 0.75]"


TEXTS = ("a b c d", "xxx", "y y y y y y")


@pytest.mark.parametrize("given", [{}, {"flip": 0.4}, {"ties": 0.6}, {"per_character": 0.2}, {"first": 1.0}], ids=str)
@pytest.mark.parametrize("scale", [None, 7, 4])
def test_an_annotator_s_answers(given: dict[str, float], scale: int | None) -> None:
    quality, temperature, seed = [0.3, -0.2, 0.1], 0.7, 11
    item = Item("p", tuple(Response(text, "x") for text in TEXTS))
    person = Annotator(lambda item: quality, temperature=temperature, seed=seed, **given)
    flipped = 0
    for number in range(12):
        order = ((0, 1, 2), (2, 0, 1), (1, 2, 0))[number % 3]
        draws = [float(rng.uniform(seed, rng.ANNOTATOR, np.array([number]), np.array([k]))[0]) for k in range(4)]
        utility = [
            q
            + given.get("per_character", 0) * len(text)
            + given.get("first", 0) * (order[0] == k)
            - temperature * math.log(-math.log(draws[1 + k]))
            for k, (q, text) in enumerate(zip(quality, TEXTS, strict=True))
        ]
        if draws[0] < given.get("flip", 0):
            utility, flipped = [-u for u in utility], flipped + 1
        best_first = sorted(range(3), key=lambda k: -utility[k])
        for better, worse in itertools.pairwise(best_first):
            if utility[better] - utility[worse] < given.get("ties", 0):
                utility[worse] = utility[better]
        answer = person(Task(number, item, order, 0, None), scale)
        told = utility
        if scale is not None:
            told = [round(1 + (scale - 1) / (1 + math.exp(-u))) for u in utility]
            assert answer.ratings == tuple(told)
        assert answer.ranks == tuple(sorted({-u for u in told}).index(-u) for u in told)
    assert flipped in range(1, 12) or "flip" not in given


def test_simulated_people_do_as_much_as_they_are_told(tmp_path: Path) -> None:
    store = Store(tmp_path, StudySettings("s", "rate", scale=3))
    store.add_items([Item(f"p{k}", (Response("x", "a"), Response("y", "b"))) for k in range(5)])
    assert work(store, "ann", Annotator(lambda item: [40.0, -40.0]), 3) == 3
    assert [judgment.answer.ratings for judgment in store.judgments()] == [(3, 1)] * 3
    assert work(store, "ann", Annotator(lambda item: [0.0, 0.0])) == 2
