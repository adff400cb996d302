"""What ends a run early: guards against collapse, which no table crowns, and stop rules."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lm_envs.algos.engine import settings_by_size
from lm_envs.benchmarks.errors import Interrupted, UserError
from lm_envs.benchmarks.report.html import answers
from lm_envs.benchmarks.run import one_run, stopping
from lm_envs.benchmarks.run.compare import compare
from lm_envs.benchmarks.run.leaderboard import write_leaderboard
from lm_envs.benchmarks.run.problems import open_problem
from lm_envs.benchmarks.run.results import footnotes, rich_table, table, write_csv
from lm_envs.benchmarks.run.stop_rules import METRICS, Rule, parse_rule
from lm_envs.benchmarks.run.storage import Records, read_json
from lm_envs.benchmarks.run.suite_files import load_suite, parse_suite
from lm_envs.benchmarks.run.suites import Guards, Plan, RunSpec, Suite, TaskSettings
from tests.benchmarks.fake_task import NAME
from tests.benchmarks.report.test_recomputed_cells import many

PLAN = Plan(iterations=6, test_prompts=8, validation_prompts=8, validate_every=3, checkpoint_every=2)
WILD = {"learning_rate": 0.3, "episodes": 16, "anneal": False, "kl_coef": 0.0}
TAME = {"learning_rate": 1e-5, "episodes": 16}
STOP = {"action": "stop", "kl_per_token": 0.5}


def spec(**changes) -> RunSpec:
    return RunSpec(**{"task": NAME, "algorithm": "reinforce", "seed": 0, "plan": PLAN, "guards": STOP, **changes})


def records(out: Path, run: RunSpec) -> list[dict]:
    return Records(out / run.label / "metrics.jsonl").read()


def test_the_band_by_hand():
    band = Guards()
    assert band.collapse(kl=12.0, length=10.0, distinct=0.3, start=0.6) is None
    assert "1.6 nats per token, above 1.5" in (band.collapse(16.0, 10.0, 0.5, 0.5) or "")
    assert "0.20 of the start's share" in (band.collapse(1.0, 10.0, 0.1, 0.5) or "")
    assert band.collapse(math.nan, 10.0, math.nan, 0.5) is None and band.collapse(9.0, 0.0, 0.5, math.nan) is None
    small, large = 1_000_000, settings_by_size.SMALL
    assert (band.acts(small), band.acts(large), Guards(action="off").acts(large)) == ("tell", "stop", "off")


def test_a_run_that_collapses_stops_and_one_that_does_not_goes_on(tmp_path):
    events: list[dict] = []
    result = one_run.execute(spec(overrides=WILD), tmp_path, notify=events.append)
    done = records(tmp_path, spec())[-1]
    assert 0 < done["iteration"] < 6 and done["kl"] / done["length"] > 0.5
    assert all(r["kl"] / r["length"] <= 0.5 for r in records(tmp_path, spec())[1:-1])
    assert "above 0.5, in iteration" in result["collapsed"] and result["collapsed"].endswith(str(done["iteration"]))
    assert [e["why"] for e in events if e["event"] == "ended"] == [result["collapsed"]]
    assert read_json(tmp_path / spec().label / "config.json")["guards"] == {**STOP, "distinct_2": 0.25}
    assert one_run.execute(spec(overrides=WILD), tmp_path)["collapsed"] == result["collapsed"]  # finished
    # negative control: a normal run, by the same band
    calm = one_run.execute(spec(overrides=TAME, seed=1), tmp_path)
    assert "collapsed" not in calm and records(tmp_path, spec(seed=1))[-1]["iteration"] == 6


def test_repeated_pairs_stop_a_run_too(tmp_path):
    band = {"action": "stop", "kl_per_token": 1e6, "distinct_2": 0.9}
    result = one_run.execute(spec(overrides=WILD, guards=band), tmp_path)
    assert "share of different token pairs" in result["collapsed"]
    found = [r["distinct_2"] for r in records(tmp_path, spec())[1:]]
    assert found[-1] < 0.9 * found[0] and all(value >= 0.9 * found[0] for value in found[:-1])


def test_a_small_model_is_told_of_and_goes_on(tmp_path):
    band = {"kl_per_token": 0.5}
    result = one_run.execute(spec(overrides=WILD, guards=band), tmp_path)
    assert records(tmp_path, spec())[-1]["iteration"] == 6 and "on the prompts of the test" in result["collapsed"]
    off = one_run.execute(spec(overrides=WILD, guards={**band, "action": "off"}, seed=1), tmp_path)
    assert "collapsed" not in off


def test_a_run_that_was_interrupted_where_it_collapsed_does_not_go_on(tmp_path):
    whole = one_run.execute(spec(overrides=WILD), tmp_path / "whole")

    def at_once(self, problem):
        raise Interrupted("between the last iteration and the result")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(one_run._Run, "_finish", at_once)
        one_run.execute(spec(overrides=WILD), tmp_path / "cut")
    resumed = one_run.execute(spec(overrides=WILD), tmp_path / "cut")
    assert resumed["collapsed"] == whole["collapsed"] and resumed["kl"] == whole["kl"]


def test_a_collapsed_method_is_never_crowned(tmp_path):
    rows = many({"sft": 0.0, "a": 0.5, "b": 0.9})
    assert answers(rows)[0].startswith("b reaches the highest")
    fallen = [row | {"collapsed": "KL of 2.0 nats per token"} if row["algorithm"] == "b" else row for row in rows]
    told = answers(fallen)
    assert told[0].startswith("a reaches the highest") and told[-1] == "Collapsed, so not ranked: b."
    all_of_them = [row | {"collapsed": "x"} if row["algorithm"] != "sft" else row for row in rows]
    assert answers(all_of_them) == ["Collapsed, so not ranked: a and b."]
    write_leaderboard(fallen, tmp_path, {}, {})
    (task,) = read_json(tmp_path / "leaderboard.json")["tasks"]
    assert [(m["method"], m.get("collapsed")) for m in task["methods"]][-1] == ("b", len(rows) // 3)
    lines = table(fallen)
    assert "b (collapsed" in next(line.title for line in lines if line.algorithm == "b")
    assert any("b collapsed: KL of 2.0 nats per token." == note for note in footnotes(lines))
    assert rich_table(lines).columns[1]._cells[-1].startswith("b (collapsed")
    write_csv(fallen, tmp_path / "results.csv")
    head, *more = (tmp_path / "results.csv").read_text().splitlines()
    assert head.endswith(",collapsed") and sum("nats per token" in line for line in more) == len(rows) / 3


def test_guards_are_read_and_checked():
    text = 'tasks = ["reviews"]\nalgorithms = ["ppo"]\n[guards]\nkl_per_token = 3\naction = "tell"\n'
    (run,) = parse_suite(text, "s.toml").runs()
    assert run.to_json()["guards"] == {"kl_per_token": 3.0, "action": "tell"}
    with pytest.raises(UserError, match="s.toml, line 5"):
        parse_suite(text.replace('"tell"', '"cry"'), "s.toml")
    assert load_suite("demo").guards == {} and "guards" not in load_suite("demo").runs()[0].to_json()


def test_rules_reach_the_run_and_are_recorded(monkeypatch):
    monkeypatch.setattr(settings_by_size, "SMALL", 10)
    problem = open_problem(spec(overrides={"episodes": 16}, guards={}))
    chosen = problem.settings()["chosen_by_rule"]
    assert chosen == {"learning_rate": 3e-5, "micro_batch": 16, "kl_target": 6.0}
    assert problem.agent.config.learning_rate == 3e-5 and problem.agent.config.kl_target == 6.0
    assert problem.guards.action == "stop"
    with pytest.warns(UserWarning, match="use learning_rate=3e-05"):
        own = open_problem(spec(overrides={"learning_rate": 1.0}))
    assert own.agent.config.learning_rate == 1.0 and "learning_rate" not in own.chosen
    # adapters by default from some size on, unless the whole model is asked for
    monkeypatch.setattr(settings_by_size, "LORA_FROM", 10)
    lora = open_problem(spec())
    assert lora.chosen["lora_rank"] == 16 and lora.agent.config.learning_rate == pytest.approx(3e-4)
    assert sum(p.numel() for p in lora.policy.model.parameters() if p.requires_grad) < 2e5
    whole = open_problem(spec(adaptation={"lora_rank": 0}))
    assert all(p.requires_grad for p in whole.policy.model.parameters())


def test_nothing_changes_for_the_shipped_models():
    problem = open_problem(spec(guards={}))
    assert problem.chosen == {} and "chosen_by_rule" not in problem.settings() and problem.guards.action == "tell"


def test_variety_counts_pairs_within_responses():
    class Traj:
        response = torch.tensor([[1, 2, 1, 2], [1, 2, -1, -1]])

    assert stopping.variety(Traj()) == 2 / 4  # (1, 2) three times, (2, 1) once


# ---- stop rules ----


@pytest.mark.parametrize(
    ("text", "rule", "normal"),
    [
        ("kl>20", Rule("kl", ">", 20.0), "kl > 20"),
        (" KL  >2e1 ", Rule("kl", ">", 20.0), "kl > 20"),
        ("win-rate < -0.5", Rule("win_rate", "<", -0.5), "win_rate < -0.5"),
        ("gold no  better for 10", Rule("gold", patience=10), "gold no better for 10"),
    ],
)
def test_rules_are_read(text, rule, normal):
    assert str(parse_rule(text)) == normal
    assert parse_rule(normal) == rule == parse_rule(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gld > 2", "did you mean 'gold'\\?.*gold, proxy, win_rate, return"),
        ("kl", "no stop rule"),
        ("kl = 2", "no stop rule"),
        ("", "no stop rule"),
        ("kl > nan", "no number"),
        ("kl > 2 nats", "no stop rule"),
        ("gold no better for 0", "1 or more"),
        ("gold no better for 2.5", "1 or more"),
        ("gold no better for " + "9" * 5000, "1 or more"),
        ("kl no better for 3", "neither more nor less kl is better"),
    ],
)
def test_what_is_no_rule_gets_one_line(text, told):
    with pytest.raises(UserError, match=told) as caught:
        parse_rule(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def seen(rule: str, values: list[float]) -> list[int]:
    """The measurements at which a rule holds."""
    watch = stopping.Watch([parse_rule(rule)])
    metric = parse_rule(rule).metric
    return [i for i, x in enumerate(values) if watch.see({"iteration": i, f"validation_{metric}": x})]


def test_rules_by_hand():
    assert seen("gold < 0.5", [0.1, 0.6, 0.5, 0.4]) == [3]  # the start does not end it
    assert seen("gold no better for 2", [1.0, 2.0, 2.0, 1.5, 3.0, 2.9, 3.0]) == [3, 6]
    assert seen("regret no better for 2", [1.0, 0.5, 0.6, 0.4, 0.4, 0.5]) == [5]
    assert seen("gold no better for 2", [1.0, math.nan, math.nan]) == [2]
    batches = stopping.Watch([parse_rule("kl > 20"), parse_rule("gold no better for 1")])
    assert batches.see({"iteration": 4, "kl": 19.0}) is None  # and no measurement of gold
    assert batches.see({"iteration": 5, "kl": 21.0}) == ("stop_rule", "kl > 20 at iteration 5")


def stopped(*rules: str, **changes) -> RunSpec:
    return spec(**{"guards": {}, "overrides": WILD, "stop": list(rules), **changes})


def test_a_stopped_run_is_finished_like_any_other(tmp_path):
    run, events = stopped("kl > 1"), []
    result = one_run.execute(run, tmp_path, notify=events.append)
    *before, last = records(tmp_path, run)
    assert 0 < last["iteration"] < 6
    assert result["stop_rule"] == f"kl > 1 at iteration {last['iteration']}"
    highest = [max(r.get("kl", 0.0), r.get("validation_kl", 0.0)) for r in (*before, last)]
    assert highest[-1] > 1 and all(kl <= 1 for kl in highest[:-1])
    assert "validation_gold" in last  # its curve ends where it ends
    assert [(e["kind"], e["why"]) for e in events if e["event"] == "ended"] == [("stop_rule", result["stop_rule"])]
    assert (tmp_path / run.label / "model").is_dir() and result["prompts"] == 8
    assert read_json(tmp_path / run.label / "config.json")["run"]["stop"] == ["kl > 1"]
    rows = [result | {"seed": seed} for seed in (0, 1)]
    assert any(f"by a rule (seed 0: {result['stop_rule']}; seed 1" in note for note in footnotes(table(rows)))
    write_csv(rows, tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text().splitlines()[0].endswith(",stop_rule")
    # negative control
    calm = one_run.execute(stopped("kl > 1", overrides=TAME, seed=1), tmp_path)
    assert "stop_rule" not in calm and records(tmp_path, stopped(seed=1))[-1]["iteration"] == 6


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_cut_anywhere_stops_at_the_same_iteration(tmp_path, everywhere):
    plan = Plan(iterations=12, test_prompts=8, validation_prompts=8, validate_every=1, checkpoint_every=2)
    run = stopped("proxy no better for 2", plan=plan)
    whole = one_run.execute(run, tmp_path / "whole")
    end = records(tmp_path / "whole", run)[-1]["iteration"]
    assert 3 <= end < 12 and whole["stop_rule"] == f"proxy no better for 2 at iteration {end}"
    for cut in range(1, end + 1) if everywhere else [end - 1]:
        asked = iter([*[False] * (cut - 1), True, *[False] * 20])
        with pytest.raises(Interrupted):
            one_run.execute(run, tmp_path / str(cut), should_stop=lambda asked=asked: next(asked))
        again = one_run.execute(run, tmp_path / str(cut))
        assert (again["stop_rule"], again["kl"]) == (whole["stop_rule"], whole["kl"])
        assert len(records(tmp_path / str(cut), run)) == end + 1


def test_a_rule_that_holds_where_the_budget_ends_has_cut_nothing_off(tmp_path):
    run = stopped("kl > -1000", plan=Plan(iterations=1, test_prompts=4, validate_every=1))
    told: list[dict] = []
    result = one_run.execute(run, tmp_path, notify=told.append)
    assert "stop_rule" not in result and not [event for event in told if event["event"] == "ended"]


def test_a_rule_about_what_a_run_does_not_measure_is_refused():
    with pytest.raises(UserError, match="measures proxy, kl, length, and no gold"):
        open_problem(stopped("gold < 0", options={"judge": False}))
    with pytest.raises(UserError, match="read at measurements, and there are none"):
        open_problem(stopped("gold < 0", plan=Plan(iterations=1, validate_every=0)))
    assert open_problem(stopped("kl > 1", plan=Plan(iterations=1, validate_every=0))).stops
    with pytest.raises(UserError, match="measures return, length, and no kl"):
        open_problem(RunSpec("CartPole-v1", "reinforce", 0, PLAN, stop=["kl > 1"]))
    assert open_problem(stopped("gold < 0", algorithm="sft", overrides={})).stops == ()  # not trained


@pytest.mark.parametrize("name", ["fake", pytest.param("enumerable", marks=pytest.mark.slow), "CartPole-v1"])
def test_metrics_are_those_of_the_learning_curve(name):
    run = spec(guards={}, overrides={}) if name == "fake" else RunSpec(name, "reinforce", 0, PLAN)
    problem = open_problem(run)
    assert set(problem.measured) <= set(problem.validate()[0]) and set(problem.measured) <= set(METRICS)


def test_a_suite_has_rules_and_says_where_one_is_wrong():
    text = 'tasks = ["reviews"]\nalgorithms = ["ppo"]\nstop = ["kl>20", "gold no better for 10"]\n'
    (run,) = parse_suite(text, "s.toml").runs()
    assert run.to_json()["stop"] == ["kl > 20", "gold no better for 10"]
    with pytest.raises(UserError, match="s.toml, line 3: stop: no metric 'kk'"):
        parse_suite(text.replace("kl>", "kk>"), "s.toml")


@pytest.mark.slow
def test_jobs_stop_where_one_does(tmp_path):
    suite = Suite("s", (TaskSettings(NAME),), ("reinforce",), (0, 1), PLAN, {"reinforce": WILD}, stop=("kl > 1",))
    rows = [compare(suite, tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2)]
    assert [row["stop_rule"] for row in rows[0]] == [row["stop_rule"] for row in rows[1]]
    assert [row["kl"] for row in rows[0]] == [row["kl"] for row in rows[1]]
