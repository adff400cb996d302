"""Agreement and ratings against hand-computed values and against simulated annotators of known parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lm_envs.feedback import agreement, ratings
from lm_envs.feedback.annotators import Annotator, work
from lm_envs.feedback.ratings import Battle
from lm_envs.feedback.store import Judgment, Store, Task
from lm_envs.feedback.study import Answer, Item, Response, StudySettings
from lm_envs.feedback.summary import summarize

pytest.importorskip("krippendorff")


def judged(who: str, item: int, ranks: Sequence[int], sources: Sequence[str] = ("a", "b"), at: float = 0.0) -> Judgment:
    content = Item("p", tuple(Response(f"text of {source}", source) for source in sources))
    return Judgment(who, item, content, tuple(range(len(sources))), Answer(ranks=tuple(ranks)), at)


def test_cohens_kappa_by_hand() -> None:
    # 20 both yes, 5 + 10 disagree, 15 both no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5 (the textbook's example).
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert agreement.cohen_kappa(first, second) == pytest.approx(0.4)
    assert agreement.cohen_kappa([1, 0, 1], [1, 0, 1]) == 1.0
    assert math.isnan(agreement.cohen_kappa([1, 1], [1, 1]))


def test_fleiss_kappa_is_that_of_his_table() -> None:
    # Ten subjects, fourteen raters, five categories: kappa 0.210 (Fleiss 1971, as worked through in textbooks).
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert agreement.fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)
    with pytest.raises(ValueError, match="same number"):
        agreement.fleiss_kappa([[2, 0], [1, 0]])


def test_alpha_by_hand() -> None:
    # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", example B: two observers, binary: alpha 0.095.
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    values = {unit: {"a": a, "b": b} for unit, (a, b) in enumerate(zip(first, second, strict=True))}
    assert agreement.alpha(values, "nominal") == pytest.approx(0.095, abs=5e-4)
    assert math.isnan(agreement.alpha({0: {"a": 1, "b": 1}}, "nominal"))
    assert math.isnan(agreement.alpha({0: {"a": 1}, 1: {"b": 0}}, "nominal"))


def test_a_ranking_is_its_comparisons() -> None:
    said = agreement.comparisons([judged("x", 7, (1, 0, 1), "abc"), judged("y", 7, (0, 1, 2), "abc")])
    assert said == {(7, 0, 1): {"x": -1, "y": 1}, (7, 0, 2): {"x": 0, "y": -1}, (7, 1, 2): {"x": 1, "y": 1}}
    assert agreement.raw_agreement(said) == pytest.approx(1 / 3)


def test_people_who_agree_that_one_method_is_better_agree_more_than_chance() -> None:
    # Of 100 items both put "a" first in 98, each alone in one. With "a" always the first category alpha would be -0.01.
    found = [judged(who, item, (0, 1)) for who in "xy" for item in range(98)]
    found += [judged("x", 98, (1, 0)), judged("y", 98, (0, 1)), judged("x", 99, (0, 1)), judged("y", 99, (1, 0))]
    said = agreement.comparisons(found)
    assert agreement.raw_agreement(said) == pytest.approx(0.98)
    assert agreement.alpha(said, "nominal") == pytest.approx(0.96, abs=0.005)


def test_biases_count_decided_comparisons_only() -> None:
    shown_first = judged("x", 0, (0, 1))  # shown in stored order: the first one was taken
    tie = judged("x", 1, (0, 0))
    second = judged("x", 2, (1, 0))
    assert agreement.position_bias([shown_first, tie, second]) == [(0, 1.0), (2, 0.0)]
    longer = Judgment(
        "x", 3, Item("p", (Response("long text", "a"), Response("s", "b"))), (1, 0), Answer(ranks=(0, 1)), 0.0
    )
    assert agreement.length_bias([longer]) == [(3, 1.0)]
    assert agreement.position_bias([longer]) == [(3, 0.0)]  # it was shown second


def test_gold_items_and_majorities() -> None:
    gold = Item("p", (Response("good", "a"), Response("bad", "b")), known=(0, 1))
    right = Judgment("x", 0, gold, (0, 1), Answer(ranks=(0, 1)), 0.0)
    tied = Judgment("y", 0, gold, (0, 1), Answer(ranks=(0, 0)), 0.0)
    assert agreement.against_known([right, tied], "x") == [True]
    assert agreement.against_known([right, tied], "y") == [False]
    said = {(0, 0, 1): {"x": 1, "y": 1, "z": -1}, (1, 0, 1): {"x": 1, "y": -1}}
    assert agreement.against_others(said, "z") == [False]
    assert agreement.against_others(said, "x") == [False]  # of item 0 the others are split, of item 1 y disagrees


def test_bradley_terry_of_two_is_the_log_odds() -> None:
    found = [Battle(item, "a", "b", 1.0) for item in range(60)] + [
        Battle(60 + item, "a", "b", 0.0) for item in range(20)
    ]
    rated = ratings.bradley_terry(found)
    expected = 400 * math.log10((60 + ratings.PRIOR / 2) / (20 + ratings.PRIOR / 2))
    assert rated["a"].value - rated["b"].value == pytest.approx(expected, abs=1e-3)
    assert rated["a"].low < rated["a"].value < rated["a"].high
    assert rated["a"].count == 80


def test_a_method_that_lost_everything_has_a_finite_rating() -> None:
    rated = ratings.bradley_terry([Battle(k, "a", "b", 1.0) for k in range(5)])
    assert math.isfinite(rated["b"].value) and rated["a"].value > 200


def test_elo_of_one_battle_by_hand() -> None:
    rated = ratings.elo([Battle(0, "a", "b", 1.0)], k=32)
    assert rated["a"].value == pytest.approx(1016) and rated["b"].value == pytest.approx(984)
    drawn = ratings.elo([Battle(0, "a", "b", 0.5)], k=32)
    assert drawn["a"].value == pytest.approx(1000)


def test_a_tie_is_half_a_win_and_one_source_fights_no_battle() -> None:
    found = ratings.battles([judged("x", 3, (1, 0, 1), ("a", "b", "c")), judged("y", 4, (0, 1), ("a", "a"))])
    assert found == [Battle(3, "a", "b", 0.0), Battle(3, "a", "c", 0.5), Battle(3, "b", "c", 1.0)]


def test_cycles() -> None:
    circle = [Battle(0, "a", "b", 1.0), Battle(1, "b", "c", 1.0), Battle(2, "c", "a", 1.0)]
    assert ratings.cycles(circle) == (1, 1)
    assert ratings.cycles([*circle[:2], Battle(2, "a", "c", 1.0)]) == (0, 1)
    assert ratings.cycles(circle[:2]) == (0, 0)


def test_win_rates_count_ties_half_and_both_directions() -> None:
    found = [
        Battle(0, "a", "sft", 1.0),
        Battle(1, "sft", "a", 1.0),
        Battle(2, "a", "sft", 0.5),
        Battle(3, "a", "b", 1.0),
    ]
    rates = ratings.win_rates(found, "sft")
    assert list(rates) == ["a"] and rates["a"].value == pytest.approx(0.5)


def simulated(seed: int, items: int) -> list[Battle]:
    strength = {"weak": -0.5, "middle": 0.0, "strong": 0.7}
    people = Annotator(lambda item: [strength[response.source] for response in item.responses], seed=seed)
    found = []
    for k in range(items):
        task = Task(k, Item("p", tuple(Response(name, name) for name in strength)), (0, 1, 2), 0, None)
        found.append(Judgment("one", k, task.content, task.order, people(task), float(k)))
    return ratings.battles(found)


@pytest.mark.slow
def test_intervals_cover_the_strengths_of_simulated_annotators(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sorting by Gumbel noise of unit scale is Plackett-Luce, whose pairs are Bradley-Terry. 60 studies, 3 ratings each.
    monkeypatch.setattr(ratings, "RESAMPLES", 200)
    true = np.array([-0.5, 0.0, 0.7]) - np.mean([-0.5, 0.0, 0.7])
    covered = []
    for seed in range(60):
        rated = ratings.bradley_terry(simulated(seed, 80), seed=seed)
        for name, strength in zip(("weak", "middle", "strong"), true, strict=True):
            covered.append(rated[name].low <= ratings.PER_UNIT * strength <= rated[name].high)
    assert 0.89 <= np.mean(covered) <= 0.99, np.mean(covered)


def test_a_liking_for_the_first_is_for_what_is_shown_first() -> None:
    item = Item("p", (Response("a", "x"), Response("b", "y"), Response("c", "z")))
    person = Annotator(lambda item: [0.0, 0.0, 0.0], temperature=1e-3, first=1.0)
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        assert person(Task(0, item, order, 0, None)).ranks[order[0]] == 0


@pytest.mark.slow
def test_a_biased_annotator_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path, StudySettings("s", "pair", seed=3))
    store.add_items([Item(f"p{k}", (Response("x" * 5, "a"), Response("y" * 50, "b"))) for k in range(200)])
    work(store, "first", Annotator(lambda item: [0.0, 0.0], temperature=1.0, first=2.0))
    bias = agreement.share(agreement.position_bias(store.judgments()))
    assert bias.low > 0.8  # sigmoid(2) = 0.88
    length = agreement.share(agreement.length_bias(store.judgments()))
    assert length.low < 0.5 < length.high


def test_an_annotator_s_time_is_the_median_of_answers_without_skipped_items() -> None:
    item = judged("x", 0, (0, 1)).content
    said = [Answer(ranks=(0, 1), seconds=4.0), Answer(ranks=(1, 0), seconds=10.0)]
    said += [Answer(skipped="unclear", seconds=seconds) for seconds in (1.0, 1.5, 2.0)]
    (row,) = summarize([Judgment("x", k, item, (0, 1), answer, 0.0) for k, answer in enumerate(said)])["Annotators"]
    assert (row["answers"], row["skipped"], row["median seconds"]) == (2, 3, 7.0)


def test_a_reward_model_s_margins_against_people() -> None:
    found = [judged("x", 0, (0, 1, 1), "abc"), judged("x", 1, (1, 0))]
    scores = [[2.0, 0.5, 3.0], [1.0, 1.0]]
    # a over b by 1.5: as x; a over c by -1: not; b and c are a tie of x's; the scores of item 1 are alike.
    assert agreement.predicted(found, scores) == [(0, 1.5, 1.0), (0, 1.0, 0.0), (1, 0.0, 0.5)]


def test_the_calibration_of_a_model_that_knows_is_as_expected_and_of_one_that_boasts_is_not() -> None:
    strength = np.random.default_rng(0).normal(size=(3000, 2))
    person = Annotator(lambda item: [float(response.text) for response in item.responses])
    found = []
    for k, (a, b) in enumerate(strength):
        item = Item("p", (Response(str(a), "one"), Response(str(b), "one")))
        found.append(Judgment("x", k, item, (0, 1), person(Task(k, item, (0, 1), 0, None)), 0.0))
    rows = summarize(found, scores=strength.tolist())["Reward model"]
    assert [row["n"] for row in rows] == [3000, 600, 600, 600, 600, 600]
    assert all(row["low"] - 0.02 <= row["expected"] <= row["high"] + 0.02 for row in rows)
    boasting = summarize(found, scores=(4 * strength).tolist())["Reward model"]
    assert [row["as people"] for row in boasting] == [row["as people"] for row in rows]
    assert boasting[0]["expected"] > boasting[0]["high"] + 0.1


def test_elo_s_interval_is_over_items_and_none_where_there_is_one() -> None:
    one = ratings.elo([Battle(0, "a", "b", 1.0), Battle(0, "a", "b", 1.0)])["a"]
    assert one.low == one.high == pytest.approx(one.value)
    few, many = (ratings.elo([Battle(k, "a", "b", float(k % 3 > 0)) for k in range(n)])["a"] for n in (12, 120))
    assert few.low < few.value < few.high and many.low < many.value < many.high
    assert many.low > 1000  # two wins of three, 120 times


@pytest.mark.slow
def test_elo_s_intervals_cover_what_studies_give_on_average() -> None:
    found = [ratings.elo(simulated(seed, 60), seed=seed) for seed in range(60)]
    covered = []
    for name in ("weak", "middle", "strong"):
        true = np.mean([rated[name].value for rated in found])
        covered += [rated[name].low <= true <= rated[name].high for rated in found]
    assert 0.89 <= np.mean(covered) <= 0.99, np.mean(covered)
