"""Equal tuning: what is tried, on which prompts, what is chosen, and that a stopped tuning goes on to the same."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lm_envs.algos.registry import make_config
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run import compare, problems, tuning, workers
from lm_envs.benchmarks.run.one_run import settings_of
from lm_envs.benchmarks.run.storage import Records, finished
from lm_envs.benchmarks.run.suite_files import parse_suite
from lm_envs.benchmarks.run.suites import Plan, Range, Suite, TaskSettings
from lm_envs.benchmarks.run.tuning import default_space, tune
from tests.benchmarks.distinct_task import NAME

PLAN = Plan(iterations=2, test_prompts=4, validation_prompts=4, validate_every=0)
SPACE = {
    "reinforce": {"learning_rate": Range(1e-4, 1e-1, log=True)},
    "ppo": {"clip": (0.1, 0.3), "epochs": Range(1, 6)},
}


def suite(**changes) -> Suite:
    made = {"name": "mine", "tasks": (TaskSettings(NAME),), "algorithms": ("sft", "reinforce", "ppo"), "seeds": (0, 1)}
    made |= {
        "plan": PLAN,
        "overrides": {"reinforce": {"episodes": 4}, "ppo": {"episodes": 4, "clip": 0.3}},
        "tune": SPACE,
    }
    return Suite(**(made | changes))


def lines(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "trials.csv").open()))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[Path, Suite]:
    out = tmp_path_factory.mktemp("tuned")
    return out, tune(suite(), out, trials=4, seeds=2)


def test_every_method_has_the_same_trials_on_validation_prompts(tuned):
    out, _ = tuned
    found = lines(out)
    assert [(line["algorithm"], line["trial"]) for line in found] == [
        (name, str(trial)) for name in ("reinforce", "ppo") for trial in range(4)
    ]
    prompts = {}
    for split in ("validation", "test"):
        task = problems.open_problem(suite(plan=Plan(**vars(PLAN) | {"split": split})).runs()[0])
        prompts[split] = {sample["prompt"] for sample in task.evaluate()[1]}
    assert not prompts["validation"] & prompts["test"]
    for line in found:
        values = []
        for seed in (2, 3):  # neither is the suite's
            trial = out / "trials" / f"trial-00{line['trial']}"
            folder = next(trial.glob(f"*/{line['algorithm']}/seed-{seed}"))
            samples = Records(folder / "samples.jsonl").read()
            assert {sample["split"] for sample in samples} == {"validation"}
            assert {sample["prompt"] for sample in samples} <= prompts["validation"]
            values.append(sum(sample["gold"] for sample in samples) / len(samples))
            settings = dict(part.split("=") for part in line["settings"].split())
            agent = settings_of(folder)["agent"]
            assert {name: float(value) for name, value in settings.items()} == {n: agent[n] for n in settings}
        assert float(line["value"]) == pytest.approx(sum(values) / 2, abs=1e-4) and line["measure"] == "gold"


def test_the_first_trial_is_the_suites_own_and_the_best_is_chosen(tuned):
    out, best = tuned
    found = lines(out)
    first = [line["settings"] for line in found if line["trial"] == "0"]
    assert first == [f"learning_rate={make_config('reinforce').learning_rate}", "clip=0.3 epochs=4"]
    (task,) = best.tasks
    for name in ("reinforce", "ppo"):
        mine = [line for line in found if line["algorithm"] == name]
        top = max(mine, key=lambda line: float(line["value"]))
        assert [line["best"] for line in mine] == [str(int(line is top)) for line in mine]
        chosen = dict(part.split("=") for part in top["settings"].split())
        assert {k: str(v) for k, v in task.overrides[name].items()} == chosen
    assert best.algorithms == suite().algorithms and best.seeds == (0, 1) and best.plan == PLAN
    assert "4 trials a method" in best.description and "clip=" in best.description
    assert len({line["settings"] for line in found if line["algorithm"] == "reinforce"}) == 4


@pytest.mark.slow
def test_a_stopped_tuning_goes_on_to_the_same(tuned, tmp_path, monkeypatch):
    out, best = tuned
    real = compare.compare

    def stopped(given, folder, **options):
        if folder.name == "trial-002":
            raise KeyboardInterrupt
        return real(given, folder, **options)

    monkeypatch.setattr(tuning, "compare", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune(suite(), tmp_path, trials=4, seeds=2)
    monkeypatch.setattr(tuning, "compare", real)
    with pytest.raises(UserError, match="holds a tuning already: --resume"):
        tune(suite(), tmp_path, trials=4, seeds=2)
    assert tune(suite(), tmp_path, trials=4, seeds=2, resume=True) == best
    assert (tmp_path / "trials.csv").read_text() == (out / "trials.csv").read_text()


def test_a_failed_trial_has_no_value(tmp_path, monkeypatch):
    real = workers.attempt

    def attempt(run, out, **options):
        if run.algorithm == "ppo" and out.name == "trial-000":
            return {"event": "failed", "run": run.label, "message": "diverged", "fatal": False}
        return real(run, out, **options)

    monkeypatch.setattr(workers, "attempt", attempt)
    tune(suite(), tmp_path, trials=2, seeds=1)
    mine = [line for line in lines(tmp_path) if line["algorithm"] == "ppo"]
    assert mine[0]["value"] == "" and mine[0]["best"] == "0" and mine[1]["best"] == "1"
    with pytest.raises(UserError, match="all 1 trials of ppo"):
        tune(suite(), tmp_path / "again", trials=1, seeds=1)


def test_a_trial_that_collapsed_is_not_chosen(tmp_path, monkeypatch):
    """However high its score; and each kind of run is opened once for all trials."""
    real, opened = compare.compare, []

    def fallen(given, folder, **options):
        rows = real(given, folder, **options)
        return [row | {"collapsed": "KL", "gold": "9"} if folder.name == "trial-001" else row for row in rows]

    monkeypatch.setattr(tuning, "compare", fallen)
    monkeypatch.setattr(tuning, "prepare", lambda *given: opened.append(given) or {})
    made = suite(algorithms=("reinforce",), overrides={"reinforce": {"episodes": 4}})
    tune(made, tmp_path, trials=2, seeds=1)
    found = [(line["trial"], line["value"], line["collapsed"], line["best"]) for line in lines(tmp_path)]
    assert found[0][2:] == ("0", "1") and found[1] == ("1", "9", "1", "0") and len(opened) == 1


def test_what_is_tried_by_default():
    assert default_space("reinforce", {"learning_rate": 1e-3}) == {"learning_rate": Range(1e-4, 1e-2, log=True)}
    found = default_space("ppo", {"learning_rate": 0.5, "clip": 0.25})
    assert found["learning_rate"] == Range(0.05, 1.0, log=True) and found["clip"] == (0.1, 0.2, 0.25, 0.3)
    assert set(found) == {"learning_rate", "epochs", "clip", "lam"} and found["epochs"] == (1, 2, 4)
    assert default_space("dpo", {"beta": 0.1})["beta"] == Range(0.01, 1.0, log=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[tune.ppo]\nclip = []", "line 4: .*a list of values"),
        ("[tune.ppo]\nclip = [0.1, -1]", "line 4: .*clip"),
        ("[tune.ppo]\nclap = [0.1]", "line 4: .*clap"),
        ("[tune.ppo]\nclip = {low = 1, high = 0.5}", "line 4: .*low < high"),
        ("[tune.ppo]\nclip = {low = 0.1, high = 0.5, lin = true}", "line 4: .*lin"),
        ("[tune.ppo]\nclip = 0.1", "line 3|line 4"),
        ("[tune.rloo]\nlearning_rate = [0.1]", "line 3: .*rloo"),
    ],
)
def test_bad_spaces_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_suite(f'tasks = ["reviews"]\nalgorithms = ["ppo"]\n{text}\n', "s.toml")
    assert "\n" not in str(caught.value)


def test_a_suite_says_what_is_tried():
    text = 'tasks = ["reviews"]\nalgorithms = ["ppo"]\n[tune.ppo]\nclip = [0.1, 0.2]\nepochs = {low = 1, high = 4}\n'
    assert parse_suite(text, "s.toml").tune == {"ppo": {"clip": (0.1, 0.2), "epochs": Range(1, 4)}}


def test_the_command_runs_the_test_once(tmp_path, capsys):
    words = ["tune", "--task", NAME, "--algorithms", "sft", "reinforce", "--trials", "2", "--iterations", "1"]
    words += ["--test-prompts", "4", "--set", "reinforce.episodes=4", "--out", str(tmp_path / "out")]
    main(words)
    out = tmp_path / "out" / "test"
    found = {path.parent.parent.name: finished(path.parent) for path in out.glob("*/*/seed-0/result.json")}
    assert set(found) == {"sft", "reinforce"} and (out / "report.html").exists()
    held = json.loads((out / "comparison.json").read_text())
    assert "Tuned on validation prompts, 2 trials a method" in held["description"]
    with pytest.raises(SystemExit):
        main(["tune", "--task", NAME, "--algorithms", "sft", "--out", str(tmp_path / "none")])
    assert "nothing to tune" in capsys.readouterr().err


def test_methods_that_do_not_suit_are_left_out_of_all(tmp_path, capsys):
    """After the trials, too: of all methods some need what a task lacks."""
    made = suite(algorithms=("reinforce", "distillation"), tune={"reinforce": SPACE["reinforce"]}, every=True)
    best = tune(replace(made, overrides={"reinforce": {"episodes": 4}}), tmp_path, trials=1, seeds=1)
    assert "distillation" not in best.tasks[0].overrides and "distillation" not in best.description
    assert [(line["algorithm"], line["best"]) for line in lines(tmp_path)][0] == ("reinforce", "1")
