"""As a user: files outside the package, compared in two processes, killed, and continued from where they were."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run.names import check_algorithm, check_task
from lm_envs.benchmarks.run.suite_files import parse_suite
from lm_envs.files import sha256
from tests.house import CHECKOUT

PLUGGED = CHECKOUT / "tests" / "plugged"
SUITE = """
tasks = ["my_task.py:load"]
algorithms = ["ppo", "my_algo.py:CISPO"]
[budget]
iterations = 6
[evaluation]
test_prompts = 4
validation_prompts = 4
[checkpoints]
every = 1
[algorithm.ppo]
episodes = 8
[algorithm."my_algo.py:CISPO"]
episodes = 8
clip = 0.3
[task."my_task.py:load".options]
prompts = 8
"""
RUN = Path("my_task.py_load") / "my_algo.py_CISPO" / "seed-0"


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    for file in PLUGGED.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "suite.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lm-envs: ")]
    assert stop.value.code == 1
    return said


def test_a_suite_points_to_the_line_of_a_plug_in_that_is_wrong(mine):
    for old, new, line, why in (
        ('CISPO"]\n[budget', 'CISPO", "my_algo.py:CISP"]\n[budget', 3, "that name does not exist"),
        ('load"]\nalg', 'load", "my_task.py:lod"]\nalg', 2, "did you mean 'load'"),
    ):
        with pytest.raises(Exception, match=f"s.toml, line {line}: .*{why}"):
            parse_suite(SUITE.replace(old, new), "s.toml")
    runs = parse_suite(SUITE, "s.toml").runs()
    assert [run.overrides for run in runs] == [
        {"episodes": 8},
        {"episodes": 8, "clip": 0.3},
    ]
    check_task("my_task.py:load-bandit")
    check_algorithm("my_algo.py:CISPO")


def test_settings_on_the_command_line_are_typed_from_the_config(mine, capsys):
    request = ["compare", "--task", "my_task.py:load", "--algorithms", "my_algo.py:CISPO", "--out", "out"]
    said = refused(capsys, *request, "--set", "my_algo.py:CISPO.clip=wide")
    assert "my_algo.py:CISPO: clip must be a number, not 'wide'" in said
    said = refused(capsys, *request, "--set", "my_algo.py:CISPO.clop=1")
    assert "my_algo.py:CISPO has no setting 'clop': did you mean 'clip'" in said
    assert not Path("out").exists()


def test_train_records_the_hash_and_refuses_to_continue_a_changed_file(mine, capsys):
    request = ["train", "--task", "my_task.py:load", "--algorithm", "my_algo.py:CISPO", "--out", "out"]
    request += ["--iterations", "2", "--set", "clip=0.4", "--set", "episodes=8", "--threads", "1"]
    main(request)
    config = json.loads(Path("out", RUN, "config.json").read_text())
    assert config["agent"]["clip"] == 0.4
    assert config["inputs"] == {
        "algorithm 'my_algo.py'": sha256(mine / "my_algo.py"),
        "task 'my_task.py'": sha256(mine / "my_task.py"),
    }
    capsys.readouterr()
    for name in ("my_algo.py", "my_task.py"):
        kept = (mine / name).read_text()
        (mine / name).write_text(kept + "# changed\n")
        what = "algorithm" if "algo" in name else "task"
        said = refused(capsys, *request, "--resume")
        assert f"began with other contents of {what} '{name}': restore them to continue" in said
        (mine / name).write_text(kept)
    main([*request, "--resume"])


def test_an_error_in_a_plugged_in_file_is_one_line_and_the_other_runs_go_on(mine, capsys):
    text = (mine / "my_algo.py").read_text()
    (mine / "my_algo.py").write_text(text.replace("        weight =", "        1 / 0\n        weight ="))
    line = text.splitlines().index(next(row for row in text.splitlines() if row.startswith("        weight ="))) + 1
    said = refused(capsys, "compare", "--suite", "suite.toml", "--iterations", "1", "--out", "out")
    assert "my_algo.py_CISPO/seed-0" in said and f"my_algo.py, line {line}: ZeroDivisionError: division by zero" in said
    assert [row.split(",")[1] for row in Path("out", "results.csv").read_text().splitlines()[1:]] == ["ppo"]
    assert "1 / 0" in Path("out", RUN, "log.txt").read_text()


@pytest.mark.slow
def test_compared_in_two_processes_killed_and_continued(mine):
    words = [sys.executable, "-m", "lm_envs.benchmarks.cli", "compare", "--suite", "suite.toml", "--jobs", "2", "--out"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*words, "whole"], check=True, **quiet)
    process = subprocess.Popen([*words, "killed"], **quiet)
    checkpoints, deadline = Path("killed", RUN, "checkpoints"), time.monotonic() + 300
    while not list(checkpoints.glob("checkpoint-*2")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed", RUN, "result.json").exists()
    subprocess.run([*words, "killed", "--resume"], check=True, **quiet)
    for name in ("ppo", "my_algo.py_CISPO"):
        model = RUN.parent.parent / name / "seed-0" / "model" / "model.safetensors"
        assert sha256("whole" / model) == sha256("killed" / model)
    rows = Path("killed", "results.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["ppo", "my_algo.py:CISPO"]
    assert "my_algo.py:CISPO" in Path("killed", "report.html").read_text()
