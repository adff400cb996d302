"""`lm-envs check`: what is right passes, and each broken thing is reported by the line that is about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run import contracts
from tests.algos.batches import SAMPLERS
from tests.house import CHECKOUT
from tests.marks import slow_unless

PLUGGED = CHECKOUT / "tests" / "plugged"
QUICK = ("grpo", "dpo")


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    for file in PLUGGED.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def untrained(monkeypatch) -> None:
    """Without the runs on whole tasks, which take seconds."""
    monkeypatch.setattr(contracts, "_trained", lambda *arguments, **options: "")


@pytest.mark.parametrize("name", slow_unless(lambda name: name in QUICK, (*SAMPLERS, "dpo", "binary-feedme")))
def test_our_own_algorithms_pass(name, untrained):
    found = {check: (state, why) for check, state, why in contracts.run(name, {})}
    assert len(found) == 6 and {state for state, _ in found.values()} <= {"pass", "skip"}, found


def broken(mine: Path, old: str, new: str, count: int = 1) -> dict[str, str]:
    """The checks that fail once a text of the algorithm is another, and why."""
    text = (mine / "my_algo.py").read_text()
    assert old in text
    (mine / "my_algo.py").write_text(text.replace(old, new))
    return {name.split(":")[0]: why for name, state, why in contracts.run("my_algo.py:CISPO", {}) if state == "FAIL"}


LOSS = "masked_mean(weight * nll(now.logprob, traj.mask), traj.mask)"
PREPARE = "        returns = torch.where"


LEAKS = """(
            (now.logprob - traj.logprob).detach().exp() * fixed["advantage"] * -now.logprob * traj.mask
        ).sum() / traj.mask.sum()"""
RETURNED = 'return {"advantage": '
COUNTED = 'self.seen = getattr(self, "seen", 0) + 1\n        return {"advantage": self.seen * '
RANDOM = 'import random\n        return {"advantage": random.random() * '


@pytest.mark.parametrize(
    ("old", "new", "failing", "why"),
    [
        ("", "", set(), ""),
        (LOSS, LEAKS, {"law 1"}, "nan in iteration 0"),
        (LOSS, "(weight * nll(now.logprob, traj.mask)).sum(1).mean()", {"law 8"}, "be a mean over each 'token'"),
        ('fixed["logprob"]).detach()', "traj.ref_logprob).detach().nan_to_num()", {"law 7"}, "by before.logprob"),
        (RETURNED, COUNTED, {"law 10"}, "it forgets something: return it from extra_state"),
        (RETURNED, RANDOM, {"law 1", "law 8", "law 10"}, "two runs with the same seed differ"),
        ("grouped - grouped.mean", "-grouped + grouped.mean", {"gradient"}, "does not raise the return"),
    ],
)
def test_what_is_broken_is_reported_by_its_line(mine, untrained, old, new, failing, why):
    found = broken(mine, old, new)
    assert set(found) == failing, found
    assert why in "".join(found.values())


def test_a_user_error_is_told_with_its_line(mine, untrained):
    found = broken(mine, PREPARE, f"        1 / 0\n{PREPARE}")
    assert len(found) == 6 - 1  # the run is left out
    line = next(i for i, text in enumerate((mine / "my_algo.py").read_text().splitlines(), 1) if "1 / 0" in text)
    assert all(why.endswith(f"my_algo.py, line {line}: ZeroDivisionError: division by zero") for why in found.values())


def test_the_command_prints_a_line_per_check_and_exits_with_1(mine, capsys):
    main(["check", "my_reward.py:brevity"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("pass  ") for line in lines)
    (mine / "my_reward.py").write_text(
        "def f(completions, **c):\n    return [len(completions) + 0.0 for _ in completions]\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["check", "my_reward.py:f"])
    told = capsys.readouterr()
    assert stop.value.code == 1 and "my_reward.py:f: 1 check failed" in told.err
    assert [line[:4] for line in told.out.splitlines()] == ["FAIL", "pass", "pass"]
    assert "scores 16, and 1 scored alone" in told.out


def test_a_reward_that_needs_a_column_gets_it(mine):
    (mine / "my_reward.py").write_text(
        "def f(completions, answer):\n    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    why = next(iter(contracts.run("my_reward.py:f*2", {})))
    assert why[1] == "FAIL" and "needs 'answer'" in why[2]
    assert {state for _, state, _ in contracts.run("my_reward.py:f*2", {"answer": "the"})} == {"pass"}


TASK = """
import random
from dataclasses import replace
import my_task

def load():
    task = my_task.load()
    rows = list(task.prompts["train"])
    random.shuffle(rows)
    return CODE
"""


@pytest.mark.parametrize(
    ("code", "failing"),
    [
        ("task", set()),
        ('replace(task, prompts={**task.prompts, "train": rows})', {"loading it again gives the same"}),
        ('replace(task, prompts={split: task.prompts[split] for split in ("train", "test")})', {"splits", "training"}),
        ("replace(task, reward=lambda completions: [random.random() for _ in completions])", {"law 2", "reward"}),
    ],
)
def test_tasks(mine, monkeypatch, untrained, code, failing):
    (mine / "other.py").write_text(TASK.replace("CODE", code))
    if "training" in failing:
        monkeypatch.undo()
        monkeypatch.chdir(mine)
    found = {name.split(":")[0]: why for name, state, why in contracts.run("other.py:load", {}) if state == "FAIL"}
    assert set(found) == failing, found
