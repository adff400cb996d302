"""Finished runs that go on to a larger budget: the same as a run that had it from the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.errors import Interrupted, UserError
from lm_envs.benchmarks.run.one_run import execute, settings_of
from lm_envs.benchmarks.run.storage import Checkpoints, Records, finished, write_sealed
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests.benchmarks.fake_task import NAME

SETTINGS = {"episodes": 16, "epochs": 2, "learning_rate": 1e-2, "anneal": False}


def spec(algorithm: str = "ppo", overrides: dict | None = None, **plan) -> RunSpec:
    made = Plan(**{"test_prompts": 8, "validation_prompts": 8, "validate_every": 1, "checkpoint_every": 2, **plan})
    own = SETTINGS if algorithm == "ppo" else {}
    return RunSpec(NAME, algorithm, 0, made, overrides=own if overrides is None else overrides)


def lasting(out: Path, run: RunSpec) -> list[list[dict]]:
    return [
        [{k: v for k, v in r.items() if not k.endswith(("_s", "per_second"))} for r in Records(path).read()]
        for path in (out / run.label / "metrics.jsonl", out / run.label / "samples.jsonl")
    ]


def weights(out: Path, run: RunSpec) -> bytes:
    return (Checkpoints(out / run.label / "checkpoints").paths()[-1] / "tensors.safetensors").read_bytes()


@pytest.mark.parametrize("budget", [{"iterations": 4}, {"episodes": 64}])
def test_an_extended_run_is_the_longer_run(tmp_path, budget):
    short, (kind, amount) = spec(**budget), next(iter(budget.items()))
    longer = spec(**{kind: 2 * amount})
    execute(short, tmp_path / "a", keep=1)
    first = settings_of(tmp_path / "a" / short.label)
    with pytest.raises(Interrupted):  # stopped on the way, and continued
        execute(longer, tmp_path / "a", keep=1, extend=True, should_stop=lambda: True)
    assert finished(tmp_path / "a" / short.label) is None
    result = execute(longer, tmp_path / "a", keep=1)
    execute(longer, tmp_path / "b", keep=1)
    assert lasting(tmp_path / "a", longer) == lasting(tmp_path / "b", longer)
    assert weights(tmp_path / "a", longer) == weights(tmp_path / "b", longer)
    config = settings_of(tmp_path / "a" / short.label)
    assert config["extends"] == [first["sha256"]] and config["agent"]["iterations"] == 8
    assert finished(tmp_path / "a" / short.label) == result


def test_what_is_not_a_larger_budget_is_refused(tmp_path):
    run = spec(iterations=2)
    execute(run, tmp_path, keep=1)
    before = finished(tmp_path / run.label)
    for other in (
        spec(iterations=1),
        spec(episodes=640),
        spec(iterations=4, test_prompts=4),
        spec(iterations=4, overrides=SETTINGS | {"epochs": 3}),
    ):
        with pytest.raises(UserError, match="other settings"):
            execute(other, tmp_path, extend=True)
    with pytest.raises(UserError, match="other settings"):
        execute(spec(iterations=4), tmp_path)
    assert finished(tmp_path / run.label) == before == execute(run, tmp_path, extend=True, keep=1)


def test_the_algorithms_own_number_counts(tmp_path):
    own = SETTINGS | {"iterations": 2}
    execute(spec(overrides=own), tmp_path / "own", keep=1)
    with pytest.raises(UserError, match="other settings"):  # which come before those of the plan
        execute(spec(overrides=own, iterations=3), tmp_path / "own", extend=True)
    few = {**SETTINGS, "episodes": 2, "epochs": 1}
    stop = iter([False, True])
    with pytest.raises(Interrupted):
        execute(spec(overrides=few), tmp_path, should_stop=lambda: next(stop))
    number = settings_of(tmp_path / spec().label)["agent"]["iterations"]
    with pytest.raises(UserError, match="other settings"):
        execute(spec(overrides=few, iterations=number), tmp_path, extend=True)
    with pytest.raises(Interrupted):
        execute(spec(overrides=few, iterations=number + 1), tmp_path, extend=True, should_stop=lambda: True)
    assert settings_of(tmp_path / spec().label)["agent"]["iterations"] == number + 1


def test_a_finished_run_keeps_what_it_is_asked_to(tmp_path):
    run = spec(iterations=5)
    for keep in (0, 1, 3):
        execute(run, tmp_path / str(keep), keep=keep)
        left = Checkpoints(tmp_path / str(keep) / run.label / "checkpoints").paths()
        assert [path.name for path in left] == [f"checkpoint-00000{i}" for i in (2, 4, 5)][3 - keep :]
        assert (tmp_path / str(keep) / run.label / "model" / "model.safetensors").exists()
    execute(run, tmp_path / "1", keep=0)
    assert not Checkpoints(tmp_path / "1" / run.label / "checkpoints").paths()
    with pytest.raises(UserError, match="no checkpoint to go on from.*--keep 1"):
        execute(spec(iterations=6), tmp_path / "0", extend=True)
    assert finished(tmp_path / "0" / run.label) is not None


def test_the_command_extends_all_runs_of_a_comparison(tmp_path):
    words = ["compare", "--task", NAME, "--algorithms", "sft", "best-of-2", "ppo", "--out", str(tmp_path / "out")]
    words += ["--test-prompts", "8", "--set", "ppo.episodes=16"]
    main([*words, "--iterations", "2", "--keep", "1"])
    main([*words, "--iterations", "3", "--extend"])
    for algorithm in ("sft", "best-of-2", "ppo"):
        run = RunSpec(NAME, algorithm, 0, Plan())
        assert settings_of(tmp_path / "out" / run.label)["run"]["plan"]["iterations"] == 3
        assert finished(tmp_path / "out" / run.label) is not None
    assert Records(tmp_path / "out" / run.label / "metrics.jsonl").read()[-1]["iteration"] == 3
    assert not Checkpoints(tmp_path / "out" / run.label / "checkpoints").paths()  # --keep was not given again


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path):
    run = spec(iterations=2)
    with pytest.raises(Interrupted):
        execute(run, tmp_path, should_stop=lambda: True)
    path = tmp_path / run.label / "config.json"
    config = json.loads(path.read_text())
    del config["run"]["plan"]["split"]
    write_sealed(path, {name: value for name, value in config.items() if name != "sha256"})
    Checkpoints(path.parent / "checkpoints").prune(0)  # they are of the config as it was
    execute(run, tmp_path)
    config["run"]["plan"]["split"] = "validation"  # but a setting that differs is one
    write_sealed(path, {name: value for name, value in config.items() if name != "sha256"})
    with pytest.raises(UserError, match="plan.split"):
        execute(run, tmp_path)
