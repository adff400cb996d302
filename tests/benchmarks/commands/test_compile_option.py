"""``compile`` on its way from a suite or a command line to the policy that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_envs.algos.policies import language_model
from lm_envs.benchmarks.cli import Compare, main
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.problems import open_problem
from lm_envs.benchmarks.run.suite_files import parse_suite
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.benchmarks.speed.throughput import _compiles
from lm_envs.model import compiled
from tests.benchmarks.fake_task import NAME


def test_suites_and_command_lines_ask_for_it():
    text = 'tasks = ["reviews", "CartPole-v1"]\nalgorithms = ["ppo"]\ncompile = true\n'
    runs = {run.task: run for run in parse_suite(text, "mine.toml").runs()}
    assert runs["reviews"].compile and not runs["CartPole-v1"].compile
    assert RunSpec(**runs["reviews"].to_json() | {"plan": runs["reviews"].plan}) == runs["reviews"]
    assert "compile" not in runs["CartPole-v1"].to_json()  # so that runs of earlier versions can be continued
    with pytest.raises(UserError, match="line 3: the suite: compile must be true or false, not 'yes'"):
        parse_suite(text.replace("true", '"yes"'), "mine.toml")
    for asked in (True, False):
        command = Compare(out=Path("out"), task=("reviews",), algorithms=("ppo",), compile=asked)
        assert [run.compile for run in command.to_suite().runs()] == [asked]


def spec(**changes) -> RunSpec:
    return RunSpec(**{"task": NAME, "algorithm": "ppo", "seed": 0, "plan": Plan(iterations=1), **changes})


def test_the_policy_that_is_trained_is_compiled(monkeypatch):
    checked = []
    monkeypatch.setattr(language_model, "check_compilable", checked.append)
    problem = open_problem(spec(compile=True))
    assert checked == [problem.policy.model] and isinstance(problem.policy._fixed, compiled.FixedRows)
    assert open_problem(spec()).policy._fixed is None


def test_it_is_refused_when_a_run_starts(monkeypatch):
    with pytest.raises(UserError, match="the policy is a table, with no layers to freeze, adapt or compile"):
        open_problem(spec(task="enumerable", algorithm="reinforce", compile=True))
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        open_problem(spec(compile=True))


@pytest.mark.slow
def test_a_short_run(tmp_path):
    if not _compiles("cpu"):
        pytest.skip("no C++ compiler")
    words = ["--task", NAME, "--algorithm", "ppo", "--iterations", "3", "--out", str(tmp_path), "--compile"]
    main(["train", *words, "--set", "episodes=16"])
    assert len(list(tmp_path.rglob("model.safetensors"))) == 1
