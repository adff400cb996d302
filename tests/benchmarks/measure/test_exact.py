"""A comparison on the task that is solved exactly: expectations for samples, regret, and the frontier drawn."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch

from lm_envs.algos.best_of_n import BestOfN
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.measure import exact, samples
from lm_envs.benchmarks.report.plots import frontier
from lm_envs.benchmarks.report.series import gather, styles
from lm_envs.benchmarks.run.problems import TextProblem
from lm_envs.benchmarks.run.results import collect_results, table
from lm_envs.benchmarks.run.suite_files import load_suite
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.env.mdp import TextMDP
from lm_envs.exact.solver import Exact
from lm_envs.tasks.enumerable import load
from tests.benchmarks.fake_task import NAME

SMALL = {"tokens": 2, "horizon": 3, "prompts": 2}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("exactly")
    suite = out / "small.toml"
    suite.write_text(
        """
        tasks = ["enumerable"]
        algorithms = ["sft", "best-of-4", "reinforce", "ppo"]
        seeds = [0]
        budget = { episodes = 16384 }
        evaluation = { test_prompts = 2, validation_prompts = 2, every = 2 }
        checkpoints = { every = 100 }
        [task.enumerable]
        options = { tokens = 2, horizon = 3, prompts = 2 }
        """
    )
    assert main(["compare", "--suite", str(suite), "--out", str(out / "run")]) in (None, 0)
    return out / "run"


def test_results_hold_the_regret_and_exact_expectations(compared):
    rows = {row["algorithm"]: row for row in csv.DictReader((compared / "results.csv").open())}
    solver = Exact(TextMDP(load(**SMALL)))
    assert float(rows["sft"]["regret"]) == pytest.approx(1) and float(rows["sft"]["win_rate"]) == pytest.approx(0.5)
    assert float(rows["sft"]["kl"]) == pytest.approx(0, abs=1e-12)
    best = solver.best_of_n(solver.log_ref, 4)
    for name, expected in (
        ("kl", solver.kl(best)),
        ("proxy", solver.reward(best)),
        ("win_rate", solver.win_rate(best, solver.log_ref)),
        ("frontier_gap", solver.frontier_gap(best)),
        ("regret", solver.regret(best)),
    ):
        assert float(rows["best-of-4"][name]) == pytest.approx(float(expected), rel=1e-4)
    for name in ("sft", "best-of-4"):  # they do not train
        assert rows[name]["gradient_cosine"] == rows[name]["gradient_cosine_se"] == ""
    for name in ("reinforce", "ppo"):
        error = float(rows[name]["gradient_cosine_se"])
        assert 0 < error < 0.1 and abs(float(rows[name]["gradient_cosine"]) - 1) < 4 * error
        assert float(rows[name]["regret"]) < 0.2 and float(rows[name]["frontier_gap"]) >= 0


def test_the_figure_shows_the_frontier_and_no_method_above_it(compared):
    series = gather(compared, collect_results(compared))
    figure = frontier(series, styles(series))
    curve = max(figure.axes[0].lines, key=lambda line: len(line.get_xdata()))
    assert "most possible" in {text.get_text() for text in figure.axes[0].texts}
    solver = Exact(TextMDP(load(**SMALL)))
    for kl, reward in zip(curve.get_xdata(), curve.get_ydata(), strict=True):
        assert reward == pytest.approx(solver.frontier_reward(kl), abs=1e-6)
    for line in table(collect_results(compared)):
        assert line.mean["proxy"] <= solver.frontier_reward(line.mean["kl"]) + 1e-9


def test_measures_agree_with_samples():
    solver = Exact(TextMDP(load()))
    noise = torch.randn(solver.log_ref.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for policy in (
        TabularPolicy(solver, solver.log_ref + noise),
        BestOfN(LMPolicy.for_mdp(solver.mdp, solver.mdp.reference), solver.mdp, 3),
    ):
        found = exact.measure(solver, policy)
        env = samples.evaluation_env(solver.mdp.task, "test", group_size=1000)
        sampled = samples.rollout(env, policy, episodes=4000, seed=5)
        for name, values in (("proxy", sampled.score), ("length", sampled.response_lengths.double())):
            error = float(values.std()) / 4000**0.5
            assert abs(float(values.mean()) - found[name]) < 4 * error


@pytest.mark.parametrize("kind", ["table", "best-of-3", "soft-best-of-3"])
def test_every_measure_is_computed_a_second_time(kind):
    """Response by response, from the probabilities under the policy and under SFT, and the scores."""
    solver = Exact(TextMDP(load(tokens=3, horizon=2, prompts=2)))
    noise = torch.randn(solver.log_ref.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = solver.log_ref + noise
    policy, p = TabularPolicy(solver, table), solver.sequences(table.log_softmax(dim=2)).exp().tolist()
    ref, score, lengths = (
        solver.sequences(solver.log_ref).exp().tolist(),
        solver.score.tolist(),
        solver.mask.sum(dim=1).tolist(),
    )
    if kind != "table":
        n, temperature, mdp = 3, 0.4 if kind.startswith("soft") else None, solver.mdp
        policy = BestOfN(LMPolicy.for_mdp(mdp, mdp.reference), mdp, n, temperature)
        p = []
        for chances, scores in zip(ref, score, strict=True):
            found = [0.0] * len(scores)
            for drawn in itertools.product(range(len(scores)), repeat=n):
                best = max(scores[k] for k in drawn)
                first = next(k for k in drawn if scores[k] == best)
                weights = [float(k == first) for k in drawn]
                if temperature is not None:
                    weights = [math.exp((scores[k] - best) / temperature) for k in drawn]
                for k, weight in zip(drawn, weights, strict=True):
                    found[k] += math.prod(chances[j] for j in drawn) * weight / sum(weights)
            p.append(found)
    found, beta, count = exact.measure(solver, policy), solver.kl_coef, range(len(score[0]))
    rows = list(zip(p, ref, score, strict=True))
    reward = np.mean([sum(a * r for a, r in zip(ours, scores, strict=True)) for ours, _, scores in rows])
    start = np.mean([sum(b * r for b, r in zip(theirs, scores, strict=True)) for _, theirs, scores in rows])
    kl = np.mean([sum(a * math.log(a / b) for a, b in zip(ours, theirs, strict=True) if a) for ours, theirs, _ in rows])
    optimum = np.mean(
        [beta * math.log(sum(b * math.exp(r / beta) for b, r in zip(q, s, strict=True))) for _, q, s in rows]
    )
    wins = [0.5 + 0.5 * np.sign(s[i] - s[j]) for _, _, s in rows for i in count for j in count]
    chance = [a[i] * b[j] for a, b, _ in rows for i in count for j in count]
    assert (found["proxy"], found["gold"], found["kl"]) == pytest.approx((reward, reward, kl))
    assert found["win_rate"] == pytest.approx(np.dot(wins, chance) / 2)
    assert found["length"] == pytest.approx(np.mean([np.dot(ours, lengths) for ours in p]))
    assert found["regret"] == pytest.approx((optimum - reward + beta * kl) / (optimum - start))
    curve = exact.result(solver, policy)["frontier"]
    kls, rewards = [0.0], [start]
    largest = max(map(max, score)) - min(map(min, score))
    for coef in largest * np.geomspace(20, 0.002, 60):
        tilted = [np.array(b) * np.exp((np.array(s) - max(s)) / coef) for _, b, s in rows]
        tilted = [q / q.sum() for q in tilted]
        both = list(zip(tilted, rows, strict=True))
        kls.append(np.mean([sum(a * math.log(a / b) for a, b in zip(q, r[1], strict=True) if a) for q, r in both]))
        rewards.append(np.mean([np.dot(q, r[2]) for q, r in both]))
    assert curve == {"kl": pytest.approx(kls), "reward": pytest.approx(rewards)} and kls == sorted(kls)
    assert found["frontier_gap"] == pytest.approx(np.interp(kl, kls, rewards) - reward, abs=0.02)
    half = exact.half_way(solver).exp()
    torch.testing.assert_close(half, (solver.log_ref.exp() + solver.optimal_policy.exp()) / 2)
    assert exact.result(solver, policy)["kl_se"] == 0 and not exact.result(solver, policy)["kl_is_bound"]


def test_only_a_table_gets_a_table():
    assert TextProblem(RunSpec(NAME, "sft", 0, Plan())).exact is None
    run = RunSpec(task="enumerable", algorithm="a2c", seed=0, plan=Plan(iterations=1), options=SMALL)
    problem = TextProblem(run)
    assert isinstance(problem.policy, TabularPolicy) and problem.agent.config.learning_rate == 0.05
    changed = TextProblem(RunSpec(**{**run.__dict__, "overrides": {"learning_rate": 0.5}}))
    assert changed.agent.config.learning_rate == 0.5 and changed.agent.config.lam == 1.0


def test_a_settings_bias_shows_in_the_gradient_column():
    plan = Plan(iterations=1, test_prompts=2, validation_prompts=2)
    for overrides, biased in (({}, False), ({"kl_loss": "k1"}, True), ({"kl_coef": 1.2}, True)):
        run = RunSpec(task="enumerable", algorithm="rloo", seed=0, plan=plan, options=SMALL, overrides=overrides)
        found = TextProblem(run).evaluate()[0]
        assert (found["gradient_cosine"] < 1 - 4 * found["gradient_cosine_se"]) == biased
    run = RunSpec(task="enumerable", algorithm="dpo", seed=0, plan=plan, options=SMALL, overrides={"pairs": 10})
    assert "gradient_cosine" not in TextProblem(run).evaluate()[0]  # it does not sample


def test_the_built_in_suite_reads():
    suite = load_suite("enumerable")
    assert suite.description.startswith("Distance to the exact optimum")
