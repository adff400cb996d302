"""Algorithms that need what a task does not have: left out of "all", refused where they are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lm_envs.algos.registry import Unsuited
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run.compare import prepare
from lm_envs.benchmarks.run.suites import Plan, Suite, TaskSettings
from tests.benchmarks.fake_task import NAME

LACKING = {
    "ppo-ptx": "ppo-ptx needs demonstrations, which task 'fake' does not have",
    "iterated-rlhf": "iterated-rlhf needs "
    "one learned reward model to make its own like, which task 'fake' does not have",
}


def suite(*algorithms: str) -> Suite:
    return Suite("mine", (TaskSettings(NAME),), algorithms, plan=Plan(iterations=1, test_prompts=4))


def test_all_leaves_them_out_and_says_why():
    every = replace(suite("ppo", *LACKING), every=True)
    assert prepare(every, every.runs()) == {(NAME, name): why for name, why in LACKING.items()}
    for name, why in LACKING.items():
        named = suite("ppo", name)
        with pytest.raises(Unsuited, match=f"^{why}$"):
            prepare(named, named.runs())
    without_judge = replace(every, tasks=(TaskSettings(NAME, options={"judge": False}),))
    assert "a judge for simulated annotators" in prepare(without_judge, without_judge.runs())[NAME, "iterated-rlhf"]


@pytest.mark.parametrize(
    ("task", "left_out"),
    [
        ("CartPole-v1", {"sft", "best-of-2", "dpo", "quark", "online-dpo", "ppo-ptx", "iterated-rlhf"}),
        (f"{NAME}-bandit", {"sft", "best-of-2", "ppo-ptx", "iterated-rlhf"}),
    ],
)
def test_all_on_other_kinds_of_env(task, left_out):
    every = Suite("mine", (TaskSettings(task),), ("rloo", *left_out), plan=Plan(1, test_prompts=4), every=True)
    found = prepare(every, every.runs())
    assert {name for _, name in found} == left_out
    assert all(name in why for (_, name), why in found.items())


@pytest.mark.parametrize("name", LACKING)
def test_named_it_is_one_line(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--task", NAME, "--algorithm", name, "--out", str(tmp_path / "out"), "--iterations", "1"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lm-envs: ")]
    assert stop.value.code == 1 and said == [f"lm-envs: {LACKING[name]}"]
    assert not (tmp_path / "out").exists()
