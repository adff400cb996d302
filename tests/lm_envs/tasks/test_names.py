"""Options in the text that names a task."""

from __future__ import annotations

import pytest

from lm_envs.benchmarks.run.inputs import fingerprints
from lm_envs.benchmarks.run.names import base_task, check_task, is_control
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.tasks import load, parts_of


def test_the_parts_of_a_name():
    assert parts_of("reviews") == ("reviews", None, {})
    assert parts_of("instruct:a/b.jsonl?max_new_tokens=8&policy=x=y&reward=null") == (
        "instruct",
        "a/b.jsonl",
        {"max_new_tokens": 8, "policy": "x=y", "reward": None},
    )
    assert parts_of("my_task.py:load?size=2") == ("my_task.py:load", None, {"size": 2})
    for wrong in ("instruct?", "instruct?size", "instruct?size=1&size=2", "instruct?a b=1"):
        with pytest.raises(ValueError, match="expected options as in instruct"):
            parts_of(wrong)


def test_options_stay_with_the_task():
    assert base_task("instruct-bandit?policy=a-bandit") == ("instruct?policy=a-bandit", "bandit")
    assert base_task("reasoning:chain_sum?max_terms=3") == ("reasoning:chain_sum?max_terms=3", "mdp")
    assert is_control("CartPole-v1") and not is_control("instruct?policy=org/model-v1")
    check_task("instruct-bandit?policy=a")
    with pytest.raises(ValueError, match="did you mean 'instruct'"):
        check_task("instuct?policy=a")


def test_they_reach_the_loader_behind_what_is_given():
    assert load("enumerable?seed=1") is load("enumerable", seed=1)
    assert load("enumerable?seed=1", seed=2) is load("enumerable", seed=2)
    with pytest.raises(ValueError, match="no option 'sead'"):
        load("enumerable?sead=1")


def test_files_in_a_name_are_inputs_of_the_run(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    for name in (f"instruct:{data}", f"instruct?path={data}"):
        found = fingerprints(RunSpec(name, "ppo", 0, Plan()))
        assert [place for place in found if "data.jsonl" in place] == list(found)
        assert len(found) == 1
