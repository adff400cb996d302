"""Responses of what a run left beside its start's, by a second computation: transformers' own greedy decoding."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
import torch

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run.generation import opened
from lm_envs.benchmarks.run.one_run import execute
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.model.loading import load_policy
from lm_envs.printable import printable
from lm_envs.tasks import load
from tests.benchmarks.distinct_task import NAME
from tests.lm_envs import byo

CHAT = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a task, far from its start."""
    out = tmp_path_factory.mktemp("runs")
    plan = Plan(iterations=2, test_prompts=4, validation_prompts=4, validate_every=0)
    spec = RunSpec(NAME, "reinforce", 0, plan, overrides={"episodes": 8, "learning_rate": 0.1})
    execute(spec, out)
    return out / spec.folder


def greedy(model, ids: list[int], most: int) -> list[int]:
    """By forwards of the whole text."""
    row = list(ids)
    with torch.no_grad():
        for _ in range(most):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(ids) :]


def test_a_run_answers_its_test_prompts_beside_its_start(run, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    main(["generate", "--policy", str(run / "model"), "--count", "3", "--temperature", "0", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    task, tuned = load(NAME), load_policy(run / "model")
    assert len(rows) == 3
    for row, ids in zip(rows, task.prompts["test"], strict=False):
        assert row["prompt"] == task.tokenizer.decode(ids)
        for name, model in (("start", task.start), ("tuned", tuned)):
            expected = greedy(model, list(ids), task.max_new_tokens)
            if task.eos_token_id in expected:
                expected = expected[: expected.index(task.eos_token_id)]
            assert row[name].split() == task.tokenizer.decode(expected).split()
    assert any(row["start"] != row["tuned"] for row in rows)
    said = capsys.readouterr().out
    assert said.splitlines()[0] == rows[0]["prompt"] and f"  tuned | {rows[0]['tuned'].strip()}" in said


def test_samples_differ_and_depend_on_the_seed_alone(run, tmp_path):
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ["generate", "--policy", str(run), "--count", "2", "--samples", "3", "--seed", str(seed)]
        main([*words, "--out", str(tmp_path / name)])
        found[name] = (tmp_path / name).read_text()
    rows = [json.loads(line) for line in found["a"].splitlines()]
    assert found["a"] == found["b"] != found["c"] and len(rows) == 6
    assert len({row["tuned"] for row in rows[:3]}) > 1 and rows[0]["prompt"] == rows[2]["prompt"] != rows[3]["prompt"]


@pytest.fixture
def talker(tmp_path):
    """A model with a chat template."""
    tokenizer = byo.byte_level_bpe()
    tokenizer.chat_template = CHAT
    byo.llama(300).save_pretrained(tmp_path / "talker")
    tokenizer.save_pretrained(tmp_path / "talker")
    return tmp_path / "talker"


def test_a_conversation_reads_what_was_said(talker, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("old\nfish\n"))
    main(["chat", "--policy", str(talker), "--temperature", "0", "--max-new-tokens", "4", "--system", "be"])
    said = capsys.readouterr().out.splitlines()
    left = opened(str(talker))

    def reply(text: str) -> str:
        ids = left.tokenizer(text, add_special_tokens=False)["input_ids"]
        return left.respond("tuned", [ids], temperature=0, max_new_tokens=4)[0].strip()

    first = reply("s be u old a ")
    second = reply(f"s be u old a {first} u fish a ")
    assert said == printable(f"{first}\n{second}").splitlines() and first != second


def test_a_text_is_a_message_where_there_is_a_template(talker, tmp_path, capsys):
    words = ["generate", "--policy", str(talker), "--temperature", "0", "--max-new-tokens", "4"]
    main([*words, "--text", "old", "--text", "fish", "--out", str(tmp_path / "out")])
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    left = opened(str(talker))
    ids = [left.tokenizer(f"u {text} a ", add_special_tokens=False)["input_ids"] for text in ("old", "fish")]
    assert [row["tuned"] for row in rows] == left.respond("tuned", ids, temperature=0, max_new_tokens=4)
    assert [row["prompt"] for row in rows] == ["old", "fish"] and "start" not in rows[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", "--policy", "MODEL"], "is not a run on a task, so it has no prompts: give --text or --prompts"),
        (["generate", "--policy", "MODEL", "--text", "a", "--prompts", "b"], "by --text or by --prompts, not both"),
        (["generate", "--policy", "MODEL", "--prompts", "none.jsonl"], "none.jsonl"),
        (["generate", "--policy", "MODEL", "--text", "a", "--max-new-tokens", "60"], "the model's context of 48"),
        (["generate", "--policy", "none", "--text", "a"], "none"),
        (["chat", "--policy", "RUN"], "has no chat template, so it does not converse"),
        (["chat", "--policy", "MODEL", "--beside"], "what .* started from is not known"),
        (["generate", "--policy", "UNFINISHED"], "holds no folder `model`"),
    ],
)
def test_bad_input_is_one_line(run, talker, tmp_path, words, told, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes((run / "config.json").read_bytes())
    places = {"MODEL": str(talker), "RUN": str(run), "UNFINISHED": str(unfinished)}
    with pytest.raises(SystemExit):
        main([places.get(word, word) for word in words])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(told, said)
