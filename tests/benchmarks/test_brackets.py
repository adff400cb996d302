"""Everything a user names may lie in folders whose names mean something to shells' patterns and to rich's markup."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run.storage import Records
from tests.house import CHECKOUT
from tests.lm_envs import byo

STRANGE = "[x]*/[/b] $a^$ :x:"  # "[/b]" would close a tag that nothing opened, and "$a^$" is no formula


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A policy, a reward model, data of each stage, a task and an algorithm, all in that folder."""
    root = tmp_path_factory.mktemp("brackets") / STRANGE
    byo.make(root)
    prompts = [f"the cat {i}" for i in range(12)]
    byo.write_jsonl(root / "demonstrations.jsonl", [{"prompt": p, "completion": " ate ."} for p in prompts])
    byo.write_jsonl(root / "preferences.jsonl", [{"prompt": p, "chosen": " a", "rejected": " b"} for p in prompts])
    (root / "rows").mkdir()
    shutil.copy(root / "preferences.jsonl", root / "rows" / "[a].jsonl")
    shutil.copy(CHECKOUT / "tests" / "plugged" / "my_algo.py", root)
    (root / "my_task.py").write_text("from tests.benchmarks.fake_task import load\n")
    return root


def said(capfd, *words: object) -> str:
    main([str(word) for word in words])
    told = capfd.readouterr()
    return "".join((told.out + told.err).split())  # a narrow terminal breaks lines


def of(path: Path) -> str:
    return "".join(str(path).split())


@pytest.mark.parametrize("name", ["preferences.jsonl", "rows"])
def test_data_of_any_name_are_checked(root, capfd, name):
    assert of(root / name) in (found := said(capfd, "data", "check", root / name)) and "12usable" in found


@pytest.mark.parametrize("command", ["sft", "reward-model", "dpo"])
def test_stages(root, capfd, command):
    data = root / ("demonstrations.jsonl" if command == "sft" else "rows")
    out = root / command
    words = (command, "--model", root / "policy", "--data", data, "--out", out, "--iterations", 1, "--threads", 1)
    assert of(out / "model") in said(capfd, *words) and (out / "model" / "model.safetensors").is_file()
    assert Records(out / "metrics.jsonl").read()


@pytest.mark.slow
def test_training_on_parts_and_its_report(root, capfd):
    parts = ("--policy", root / "policy", "--reward-model", root / "reward_model", "--prompts", root / "prompts.jsonl")
    words = ("train", *parts, "--algorithm", "ppo", "--out", root / "train", "--iterations", 1, "--set", "episodes=4")
    assert of(root / "train" / "report.html") in said(capfd, *words, "--threads", 1)
    assert of(root / "train" / "report.html") in said(capfd, "report", root / "train")


def test_a_comparison_of_what_is_plugged_in(root, capfd):
    suite = root / "suite.toml"
    names = [json.dumps(f"{root}/{name}") for name in ("my_task.py:load", "my_algo.py:CISPO")]
    suite.write_text(f"tasks = [{names[0]}]\nalgorithms = ['sft', {names[1]}]\nbudget.iterations = 1\n")
    found = said(capfd, "compare", "--suite", suite, "--out", root / "compare")
    assert of(root / "compare" / "report.html") in found
    assert "".join(f"{root}/my_algo.py:CISPO".split()) in "".join(
        (root / "compare" / "results.csv").read_text().split()
    )


def test_a_study(root, capfd):
    texts = byo.write_jsonl(root / "texts.jsonl", [{"prompt": "p", "completions": ["a", "b"]}])
    said(capfd, "people", "new", "--out", root / "study", "--texts", texts)
    said(capfd, "people", "simulate", root / "study", "--annotators", 2)
    assert of(root / "answers.jsonl") in said(capfd, "people", "export", root / "study", root / "answers.jsonl")


@pytest.mark.parametrize(
    "words",
    [
        ("sft", "--model", "{}/none", "--data", "{}/demonstrations.jsonl", "--out", "{}/no"),
        ("sft", "--model", "{}/policy", "--data", "{}/none.jsonl", "--out", "{}/no"),
        ("compare", "--suite", "{}/none.toml", "--out", "{}/no"),
        ("report", "{}/none"),
        ("people", "results", "{}/none"),
        ("check", "{}/none.py:f"),
    ],
)
def test_messages_have_the_name_as_it_is(root, capfd, words):
    with pytest.raises(SystemExit) as stop:
        main([word.format(root) for word in words])
    told = "".join(capfd.readouterr().err.split())
    assert stop.value.code == 1 and of(root) in told
