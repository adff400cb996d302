"""Over-optimisation: the fits, best-of-n over all subsets, and a whole drawing of a tiny task."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lm_envs.algos.best_of_n import kl_bound
from lm_envs.benchmarks import cli
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.report.overoptimization import FLOOR, Curve, Settings, best_of_subsets, fit, overoptimise

TASK = "tests.algos.batches:learned_task"  # words that a count judges, and a learned reward
SMALL = Settings(
    pairs=(6, 1200),
    held_out=256,
    flip=0.0,
    iterations=4,
    prompts=2,
    samples=16,
    overrides={"learning_rate": 2e-2, "episodes": 32},
    reward_model={"steps": 120, "batch_size": 64, "learning_rate": 1e-2},
)
SMALLER = replace(SMALL, held_out=32, iterations=2, samples=4, reward_model={"steps": 4})


def test_the_fits_recover_what_made_the_points():
    kl = np.array([0.0, 0.1, 0.5, 1.0, 4.0, 9.0, 16.0])
    d = np.sqrt(kl)
    found = fit(kl, d * (2.0 - 0.3 * d), "best-of-n")
    assert found == pytest.approx({"alpha": 2.0, "beta": 0.3, "r2": 1.0})
    with np.errstate(divide="ignore", invalid="ignore"):
        gold = np.nan_to_num(d * (1.5 - 0.7 * np.log(d)))
    assert fit(kl, gold, "ppo") == pytest.approx({"alpha": 1.5, "beta": 0.7, "r2": 1.0})
    assert fit(kl, gold, "best-of-n")["r2"] < 0.99  # negative control: the other form does not fit
    assert math.isnan(fit([0.0, 0.0, 1.0], [0.0, 0.0, 1.0], "ppo")["alpha"])


def test_the_fit_ends_where_gold_first_fell_below_the_floor():
    gold = [0.0, 0.5, 0.2, FLOOR, 1.5 * FLOOR, 0.3]
    curve = Curve(500, 0.6, "ppo", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 6, gold)
    assert curve.fitted() == 4
    assert Curve(500, 0.6, "ppo", [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]).fitted() == 2


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_over_all_subsets_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 3, 5))
    expected = []
    for p, g in zip(proxy, gold, strict=True):
        subsets = [list(s) for s in itertools.combinations(range(5), n)]
        expected.append(np.mean([g[s][p[s].argmax()] for s in subsets]))
    assert best_of_subsets(proxy, gold, n) == pytest.approx(np.mean(expected))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("over")
    return overoptimise(TASK, {}, SMALL, out), out


def test_a_curve_per_reward_model_and_method(drawn):
    curves, out = drawn
    assert [(c.pairs, c.method) for c in curves] == [(6, "best-of-n"), (6, "ppo"), (1200, "best-of-n"), (1200, "ppo")]
    for curve in curves:
        assert len(curve.kl) == len(curve.proxy) == len(curve.gold) == (5 if curve.method == "best-of-n" else 4)
    assert curves[0].kl == [kl_bound(n) for n in (1, 2, 4, 8, 16)]
    found = json.loads((out / "overoptimisation.json").read_text())
    assert found["curves"][1]["gold"] == curves[1].gold and found["settings"]["pairs"] == [6, 1200]
    assert (out / "overoptimisation.png").read_bytes()[:4] == b"\x89PNG"


def test_best_of_n_starts_at_nothing_and_its_proxy_rises(drawn):
    for curve in drawn[0]:
        if curve.method == "best-of-n":
            assert curve.proxy[0] == pytest.approx(0, abs=1e-9) and curve.gold[0] == pytest.approx(0, abs=1e-9)
            assert curve.proxy == sorted(curve.proxy) and curve.proxy[-1] > 0.5


def test_a_reward_model_of_more_data_is_better_and_worth_more(drawn):
    few, _, many, _ = drawn[0]
    assert many.accuracy > few.accuracy
    assert many.gold[-1] > few.gold[-1] > -1


def test_training_begins_at_the_start_and_leaves_it(drawn):
    curve = drawn[0][3]
    assert curve.kl[0] == pytest.approx(0, abs=1e-6) and curve.kl[-1] > 0.05
    assert abs(curve.gold[0]) < 1 and curve.proxy[-1] > curve.proxy[0]


def test_the_command_draws_and_says_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "lm_envs.benchmarks.report.overoptimization.Settings", lambda **given: replace(SMALLER, pairs=given["pairs"])
    )
    cli.main(["overoptimise", "--task", TASK, "--pairs", "8", "--out", str(tmp_path / "o")])
    said = capsys.readouterr().out
    assert "8 pairs, best-of-n: gold at most" in said and (tmp_path / "o" / "overoptimisation.png").exists()


def test_a_task_without_judge_or_learned_reward_is_refused(tmp_path):
    with pytest.raises(UserError, match="judge and a learned reward"):
        overoptimise("tests.benchmarks.fake_task:load", {}, SMALL, tmp_path)
    with pytest.raises(ValueError, match="pairs"):
        Settings(pairs=(1,))
    with pytest.raises(SystemExit):
        cli.main(["overoptimise", "--algorithm", "pp0", "--out", str(tmp_path)])
