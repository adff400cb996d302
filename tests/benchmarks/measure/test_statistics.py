"""Statistics against known answers: worked by hand, by SciPy, and by simulated scores with known differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lm_envs.benchmarks.measure import statistics as ours
from lm_envs.benchmarks.measure.statistics import crossed_mean
from lm_envs.benchmarks.run.aggregate import differences

SIMULATIONS = [pytest.param(60, id="quick"), pytest.param(500, id="whole", marks=pytest.mark.slow)]


def drawn(rng, seeds, prompts, by_seed, by_prompt, rest, mean=0.0):
    """Outcomes ``(S, P)`` with normal effects of these standard deviations."""
    effects = by_seed * rng.normal(size=(seeds, 1)) + by_prompt * rng.normal(size=prompts)
    return mean + effects + rest * rng.normal(size=(seeds, prompts))


def held(estimates, truth):
    return np.mean([each.low <= truth <= each.high for each in estimates])


def fair(share, count):
    """95 % give or take the limits of the issue, and twice the error of a smaller number of simulations."""
    room = 0.0 if count >= 500 else 2 * math.sqrt(0.95 * 0.05 / count)
    return 0.92 - room <= share <= min(1.0, 0.98 + room)


def test_a_crossed_mean_by_hand():
    """MS of seeds 4.5 - 2 * 0.0 ...: a two-way table with effects of 1 per seed, 3 per prompt and no rest."""
    found = crossed_mean(np.array([[0.0, 3.0, 6.0], [1.0, 4.0, 7.0]]))
    assert found.value == 3.5 and found.layers == ("seeds", "prompts")
    a, b = 0.5 / 2, 9 / 3  # the variances of the row means and of the column means, over their numbers
    assert found.error == pytest.approx(math.sqrt(a + b))
    assert found.freedom == pytest.approx((a + b) ** 2 / (a**2 / 1 + b**2 / 2))


def test_the_p_value_of_two_layers_by_simulation():
    """The variance of the few seeds is a fiducial draw; that of the prompts, less the share of the rest, is known."""
    values = np.array([[0.0, 5.0, 3.0, 2.0, -2.0], [3.0, 1.0, 4.0, -1.0, 1.0], [1.0, 4.0, 5.0, 0.5, 0.0]])
    found, (seeds, prompts) = crossed_mean(values), values.shape
    by_seed, by_prompt = values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_prompt + values.mean()
    few, known = by_seed.var(ddof=1) / seeds, by_prompt.var(ddof=1) / prompts
    known -= (rest**2).sum() / ((seeds - 1) * (prompts - 1)) / values.size
    drawn = few * (seeds - 1) / np.random.default_rng(0).chisquare(seeds - 1, 400_000) + known
    assert known > 0 and found.p == pytest.approx((2 * stats.norm.sf(found.value / np.sqrt(drawn))).mean(), rel=1e-2)


def test_one_layer_is_the_usual_t_interval():
    values = np.array([0.2, 0.9, 0.4, 0.7])
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    for shape, layers in (((1, 4), ("prompts",)), ((4, 1), ("seeds",))):
        found = crossed_mean(values.reshape(shape))
        assert (found.low, found.high) == pytest.approx((low, high)) and found.layers == layers
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-3)
    assert math.isnan(crossed_mean(np.array([[0.5]])).error)
    assert math.isnan(crossed_mean(np.full((2, 3), np.nan)).value)
    assert crossed_mean(np.array([[1.0, np.nan, 0.0], [1.0, 1.0, 0.0]])).value == 0.5  # a prompt without a judgment
    exact = crossed_mean(np.full((3, 1), 0.7))
    assert exact.low == exact.high == pytest.approx(0.7) and exact.p == 0
    assert crossed_mean(np.array([[1e-17], [3e-17], [2e-17]])).p == 1  # equal but for rounding


@pytest.mark.parametrize("count", SIMULATIONS)
@pytest.mark.parametrize(
    "seeds, prompts, spreads",
    [
        (3, 100, (0.1, 0.5, 0.8)),
        (3, 100, (0.5, 0.5, 0.5)),
        (3, 100, (0.0, 0.3, 1.0)),
        (5, 256, (0.05, 0.5, 0.5)),
        (1, 100, (0.0, 0.5, 0.5)),
    ],
)
def test_intervals_hold_the_truth(seeds, prompts, spreads, count):
    rng = np.random.default_rng(0)
    found = [crossed_mean(drawn(rng, seeds, prompts, *spreads, mean=0.3)) for _ in range(count)]
    assert fair(held(found, 0.3), count)


@pytest.mark.parametrize("count", SIMULATIONS)
def test_win_rates_hold_the_truth(count):
    """Outcomes of 0 and 1; seeds and prompts differ. An error over prompts alone would hold it in half the cases."""
    rng = np.random.default_rng(1)
    effects = rng.normal(size=(2, 200_000))
    truth = float((1 / (1 + np.exp(-(1.2 + 0.4 * effects[0] + 0.7 * effects[1])))).mean())
    found, prompts_only = [], []
    for _ in range(count):
        rate = 1 / (1 + np.exp(-drawn(rng, 4, 256, 0.4, 0.7, 0.0, mean=1.2)))
        wins = (rng.random(rate.shape) < rate).astype(float)
        found.append(crossed_mean(wins))
        prompts_only.append(crossed_mean(wins.mean(axis=0, keepdims=True)))
    assert fair(held(found, truth), count)
    assert held(prompts_only, truth) < 0.75  # negative control: the error that was printed before


@pytest.mark.parametrize("count", SIMULATIONS)
@pytest.mark.parametrize("layout", ["prompts", "runs"])
def test_equal_methods_are_hardly_ever_called_better(count, layout):
    rng, alarms, naive = np.random.default_rng(2), 0, 0
    for _ in range(count):
        prompts = 0.5 * rng.normal(size=60)
        by_name = {}
        for name in ("sft", *"abcd"):
            golds = prompts + drawn(rng, 3, 60, 0.2, 0.0, 0.7)
            values = [list(each) if layout == "prompts" else [] for each in golds]
            by_name[name] = [{"seed": s, "gold": float(golds[s].mean()), "golds": values[s]} for s in range(3)]
        found = differences(by_name)
        alarms += any(each.clear or each.reversed().clear for each in found)
        naive += any(each.estimate.p < 0.05 for each in found)
    # 5 % is what the theory allows: not more than it, but for the noise of the simulations.
    assert alarms / count <= 0.05 + 1.65 * math.sqrt(0.05 * 0.95 / count) < 0.15 < naive / count


@pytest.mark.parametrize("shift, clear", [(0.8, True), (0.0, False)])
def test_a_large_difference_is_seen(shift, clear):
    rng = np.random.default_rng(3)
    made = {"a": drawn(rng, 5, 100, 0.1, 0.5, 0.5, mean=shift), "b": drawn(rng, 5, 100, 0.1, 0.5, 0.5)}
    rows = {name: [{"seed": s, "gold": 0.0, "golds": list(x[s])} for s in range(5)] for name, x in made.items()}
    (found,) = differences(rows)
    assert found.clear == clear and not found.reversed().clear
    single = {name: mine[:1] for name, mine in rows.items()}
    assert not differences(single)[0].clear  # one run of a method is not the method


def test_holm_by_hand():
    assert ours.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert ours.holm([0.5, math.nan, 0.9])[0] == 1.0 and math.isnan(ours.holm([0.5, math.nan])[1])


def test_weighted_holm_by_hand():
    """Ratios 0.02, 0.04, 0.12: times the weights that are left, 4, then 3, then 1; the last is not below the second."""
    assert ours.holm([0.04, 0.02, 0.12], [2, 1, 1]) == pytest.approx([0.04 / 2 * 4, 0.02 / 1 * 4, 0.12])
    assert ours.holm([0.01, 0.03], [1, 4]) == pytest.approx([0.03 / 4 * 5, 0.03 / 4 * 5])
    assert ours.holm([0.01, math.nan, 0.03], [2, 7, 2]) == pytest.approx([0.02, math.nan, 0.03], nan_ok=True)


def test_seeds_that_would_do():
    values = np.array([0.1, 0.4, 0.3])
    found = ours.enough_seeds(values, 0.01)
    t = {n: values.mean() / (values.std(ddof=1) / math.sqrt(n)) for n in (found - 1, found)}
    assert 2 * stats.t.sf(t[found], found - 1) < 0.01 <= 2 * stats.t.sf(t[found - 1], found - 2)
    assert ours.enough_seeds(np.array([-1.0, 1.0, 0.01]), 0.01) is None


def test_pairs_with_sft_spend_half():
    rng = np.random.default_rng(9)
    rows = {
        name: [{"seed": s, "gold": g, "golds": []} for s, g in enumerate(rng.normal(mean, 1, size=4))]
        for name, mean in {"a": 0.0, "sft": 9.0, "b": 1.0, "c": 2.0}.items()
    }
    raw = {each.methods: each.estimate.p for each in differences(rows)}
    assert len(raw) == 6
    shares = {pair: 1 / 6 for pair in raw}  # three pairs with SFT share a half, and so do three others
    assert [each.p for each in differences(rows)] == pytest.approx(ours.holm(list(raw.values()), list(shares.values())))
    two = {name: rows[name] for name in ("a", "sft", "b")}  # two with SFT, one without
    found = differences(two)
    assert [each.p for each in found] == pytest.approx(ours.holm([each.estimate.p for each in found], [1, 2, 1]))
    assert [each.methods for each in found] == [("a", "sft"), ("a", "b"), ("sft", "b")]


def test_aggregates_are_those_of_scipy():
    scores = np.random.default_rng(4).normal(size=(7, 10))
    assert ours.interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=1))
    assert float(ours.optimality_gap(np.array([0.2, 1.4]))) == pytest.approx(0.4)
    x, y = np.array([1.0, 2.0, 5.0]), np.array([1.0, 0.0, 4.0, 6.0])
    value, low, high = ours.probability_of_improvement([x], [y])
    assert value == pytest.approx(stats.mannwhitneyu(x, y).statistic / 12) and low < value < high
    # Newcombe's example of complete separation, 3 against 3: the interval is not a point.
    value, low, high = ours.probability_of_improvement([np.array([4.0, 5.0, 6.0])], [np.array([1.0, 2.0, 3.0])])
    assert value == high == 1 and 0.3 < low < 0.75


@pytest.mark.parametrize("count", SIMULATIONS)
@pytest.mark.parametrize("statistic", ["mean", "iqm"])
@pytest.mark.parametrize("tasks, runs", [(1, 10), (6, 3), (10, 5)])
def test_stratified_intervals_hold_the_truth(statistic, tasks, runs, count):
    rng = np.random.default_rng(5)
    centers = np.linspace(0, 1, tasks)
    function = ours.interquartile_mean if statistic == "iqm" else lambda x: x.mean(axis=-1)
    many = np.concatenate([c + 0.3 * rng.normal(size=40_000) for c in centers])
    truth = float(function(many))
    found = [ours.stratified([c + 0.3 * rng.normal(size=runs) for c in centers], function) for _ in range(count)]
    assert fair(held(found, truth), count)


@pytest.mark.parametrize("count", SIMULATIONS)
def test_improvements_hold_the_truth(count):
    rng, truth, inside = np.random.default_rng(6), float(stats.norm.cdf(1 / math.sqrt(2))), 0
    for _ in range(count):
        _, low, high = ours.probability_of_improvement([rng.normal(1, 1, 8)] * 1, [rng.normal(0, 1, 8)])
        inside += low <= truth <= high
    assert fair(inside / count, count)


def test_lengths_are_controlled():
    """A method that wins by length alone wins half at equal lengths; one that wins by itself keeps its win-rate."""
    rng = np.random.default_rng(7)
    gaps = rng.normal(6, 4, size=(3, 400))
    by_length = (rng.random(gaps.shape) < 1 / (1 + np.exp(-2 * np.tanh(gaps / gaps.std())))).astype(float)
    assert by_length.mean() > 0.75
    found = ours.length_controlled(by_length, gaps)
    assert abs(found.value - 0.5) < 3 * found.error < 0.2
    own = (rng.random(gaps.shape) < 0.8).astype(float)
    found = ours.length_controlled(own, gaps)
    assert found.low < 0.8 < found.high
    never = ours.length_controlled(np.ones((2, 50)), gaps[:2, :50])
    assert 0.9 < never.value <= 1 and math.isfinite(never.error)


@pytest.mark.parametrize("count", SIMULATIONS)
def test_length_controlled_intervals_hold_the_truth(count):
    rng, found = np.random.default_rng(8), []
    for _ in range(count):
        gaps = rng.normal(3, 4, size=(4, 200))
        rate = 1 / (1 + np.exp(-(0.4 + np.tanh(gaps / gaps.std()) + 0.2 * rng.normal(size=(4, 1)))))
        found.append(ours.length_controlled((rng.random(rate.shape) < rate).astype(float), gaps))
    assert fair(held(found, 1 / (1 + math.exp(-0.4))), count)


def test_a_performance_profile_by_hand():
    scores = np.array([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    share, low, high = ours.performance_profile(scores, np.array([-1.0, 0.5, 1.0, 3.0]))
    assert share == pytest.approx([1, 5 / 6, 3 / 6, 0])  # above, not at
    assert (low[0], high[0], low[3], high[3]) == (1, 1, 0, 0)
    above = crossed_mean(np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    odds = math.exp((above.high - 0.5) / 0.25)  # of the upper end; those of 1/2 are 1
    assert (low[2], high[2]) == pytest.approx((1 / (1 + odds), odds / (1 + odds)))
    wilson = stats.binomtest(3, 4).proportion_ci(method="wilson")
    for shape in ((1, 4), (4, 1)):
        share, low, high = ours.performance_profile(np.array([0.0, 2.0, 3.0, 4.0]).reshape(shape), np.array([1.0]))
        assert (share[0], low[0], high[0]) == pytest.approx((0.75, *wilson))
    share, low, high = ours.performance_profile(np.array([[0.5]]), np.array([0.0]))
    assert share[0] == 1 and np.isnan([low[0], high[0]]).all()


@pytest.mark.parametrize("count", SIMULATIONS)
@pytest.mark.parametrize(
    "seeds, prompts, spreads",
    [
        (3, 100, (0.1, 0.5, 0.6)),
        (5, 100, (0.3, 0.5, 0.6)),
        (10, 256, (0.3, 0.5, 0.6)),
        (1, 256, (0, 0.5, 0.6)),
        (60, 1, (1, 0, 0)),
    ],
)
def test_profiles_hold_the_truth_at_each_score(seeds, prompts, spreads, count):
    """Also where few scores lie above, or few below."""
    rng, thresholds = np.random.default_rng(5), np.array([-1.0, 0.0, 0.4])
    truth = stats.norm.sf(thresholds / math.hypot(*spreads))
    found = [ours.performance_profile(drawn(rng, seeds, prompts, *spreads), thresholds)[1:] for _ in range(count)]
    lows, highs = np.array(found).transpose(1, 0, 2)
    for share in ((lows <= truth) & (truth <= highs)).mean(axis=0):
        assert fair(share, count)


def nested(rng, models, seeds, prompts, spreads, mean=0.0):
    """Outcomes ``(models x seeds, P)`` with normal effects of models, their seeds, prompts, prompts within models, and
    the rest; and each run's model."""
    of_model, of_seed, of_prompt, of_both, rest = spreads
    effects = of_model * rng.normal(size=(models, 1, 1)) + of_seed * rng.normal(size=(models, seeds, 1))
    effects = effects + of_prompt * rng.normal(size=prompts) + of_both * rng.normal(size=(models, 1, prompts))
    outcomes = mean + effects + rest * rng.normal(size=(models, seeds, prompts))
    return outcomes.reshape(-1, prompts), np.repeat(np.arange(models), seeds).tolist()


def test_a_nested_mean_by_hand():
    outcomes = np.array([[0.0, 2.0], [2.0, 4.0], [5.0, 7.0], [7.0, 9.0]])  # effects of 5 a model, 2 a seed, 2 a prompt
    found = ours.nested_mean(outcomes, [0, 0, 1, 1])
    rows = crossed_mean(np.array([[1.0, 3.0], [6.0, 8.0]]), "models")
    assert (found.value, found.error, found.freedom) == (4.5, rows.error, rows.freedom)
    assert found.layers == ("models", "seeds", "prompts")
    # the models' means differ by 5: a variance of 12.5, of which a seed's 2 / 2 is not the models'
    assert found.models == pytest.approx((12.5 - 1.0) / 2 / found.error**2)
    assert ours.nested_mean(outcomes, [3] * 4) == crossed_mean(outcomes)
    single = ours.nested_mean(outcomes[::2], [0, 1])  # one seed a model: not told apart
    assert single.layers == ("models", "seeds", "prompts") and math.isnan(single.models)
    uneven = ours.nested_mean(outcomes[[0, 1, 2, 3, 3]], [0, 0, 1, 1, 1])
    assert uneven.value == pytest.approx((2.0 + np.mean([6.0, 8.0, 8.0])) / 2)  # models count alike


@pytest.mark.parametrize("count", SIMULATIONS)
@pytest.mark.parametrize(
    "models, seeds, prompts, spreads",
    [
        (5, 3, 100, (0.3, 0.1, 0.5, 0.2, 0.6)),
        (5, 2, 100, (0.0, 0.2, 0.5, 0.0, 0.6)),
        (4, 3, 256, (0.1, 0.1, 0.5, 0.1, 0.6)),  # of three models 92 % in 3,000 simulations
        (4, 1, 100, (0.3, 0.1, 0.5, 0.2, 0.6)),
        (4, 3, 1, (0.5, 0.3, 0.0, 0.0, 0.0)),
    ],
)
def test_three_layers_hold_the_truth(models, seeds, prompts, spreads, count):
    rng = np.random.default_rng(7)
    drawn_ = [nested(rng, models, seeds, prompts, spreads, mean=0.3) for _ in range(count)]
    assert fair(held([ours.nested_mean(*each) for each in drawn_], 0.3), count)
    if spreads[0] >= 0.3:  # negative control: intervals that leave the models out are too narrow
        if seeds > 1:
            assert held([crossed_mean(each[0]) for each in drawn_], 0.3) < 0.92


def test_the_part_of_the_models_is_found():
    rng = np.random.default_rng(8)
    of_model, of_seed, rest, models, seeds, prompts = 0.3, 0.4, 0.6, 40, 4, 300
    outcomes = nested(rng, models, seeds, prompts, (of_model, of_seed, 0.0, 0.0, rest))
    truth = of_model**2 / (of_model**2 + of_seed**2 / seeds + rest**2 / seeds / prompts)
    assert ours.nested_mean(*outcomes).models == pytest.approx(truth, abs=0.12)
