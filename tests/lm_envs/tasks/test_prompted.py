"""Each task on real text with a small model: the prompts that ship, a file of the user's, and a few scored samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lm_envs.benchmarks.commands.compare import Compare
from lm_envs.benchmarks.run.compare import check_runs
from lm_envs.tasks import TASKS, load
from lm_envs.tasks.sampling import sample
from tests.lm_envs import byo

OWN = {
    "instruct": [{"prompt": f"say {word}", "constraints": [{"kind": "words", "least": 1}]} for word in "abcdef"],
    "concepts": [{"concepts": ["cat", word], "reference": f"A cat and {word}."} for word in "abcdef"],
    "dialogue": [{"context": ["Hi", f"Is it {word}?"], "good": ["Yes"], "bad": ["No"]} for word in "abcdef"],
    "summarise": [{"post": f"Letter {word} is lost.", "summary": f"{word} is lost."} for word in "abcdef"],
    "harmless": [{"prompt": f"Say {word}.", "care": word in "ab", "topic": ["b"], "held": ["c"]} for word in "abcdef"],
    "fine-grained": [{"prompt": f"Say {word}.", "topic": ["b"], "held": ["c"]} for word in "abcdef"],
    "reasoning": [{"question": f"1 + {k}?", "answer": f"1 + {k} = {k + 1}\n#### {k + 1}"} for k in range(6)],
}

JUDGES = {
    "concepts": {"judge": "lm_envs.tasks.concepts:coverage"},
    "dialogue": {"judge": "lm_envs.reward.lengths:tokens"},
    "summarise": {"judge": "lm_envs.reward.lengths:tokens"},
}  # libraries of metrics take seconds to import


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return byo.for_shipped_prompts(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", OWN)
def test_what_ships(name: str, policy: Path):
    """The task as it is, and its reward and judge on samples of the model."""
    task = load(name, policy=str(policy), max_new_tokens=3, **JUDGES.get(name, {}))
    assert task.name == name and len(task.prompts["test"]) >= 100 and task.judge is not None
    few = {column: values[:3] for column, values in task.columns["test"].items()}
    eos = task.eos_token_ids
    found = sample(
        task.reference, task.tokenizer, task.prompts["test"][:3], 3, eos_token_id=eos, max_new_tokens=3, columns=few
    )
    assert all(np.isfinite(found.score(scorer)).all() for scorer in (task.reward, task.judge))


@pytest.mark.parametrize("name", OWN)
def test_the_users_file(name: str, policy: Path, tmp_path: Path):
    """And a bad row of it is named, or left out."""
    path = byo.write_jsonl(tmp_path / "own.jsonl", [*OWN[name], {"other": 1}])
    text = f"{name}?path={path}&policy={policy}&max_new_tokens=4"
    with pytest.raises(ValueError, match=r"own.jsonl, line 7: "):
        load(text)
    left_out = pytest.warns(UserWarning, match=r"own.jsonl: 1 bad row was passed over \(line 7: ")
    with pytest.warns(UserWarning, match="1 test prompt"), left_out:
        task = load(f"{text}&bad=skip", **JUDGES.get(name, {}))
    assert task.max_new_tokens == 4 and [len(task.prompts[split]) for split in ("validation", "test")] == [1, 1]


def test_other_prompts_are_given_as_path():
    with pytest.raises(ValueError, match="instruct has prompts of its own: others are given as path"):
        load("instruct", prompts="p.jsonl")


def test_an_unknown_option_is_told_before_a_model_is_read():
    with pytest.raises(ValueError, match="instruct has no option 'max_new_token': did you mean 'max_new_tokens'"):
        load("instruct?policy=nowhere&max_new_token=4")


def test_prompts_are_messages_for_a_model_with_a_chat_template(policy: Path, tmp_path: Path):
    path = byo.write_jsonl(tmp_path / "own.jsonl", OWN["instruct"])
    with pytest.warns(UserWarning, match="1 test prompt"):
        plain = load("instruct", path=str(path), policy=str(policy))
    assert plain.tokenizer.decode(plain.prompts["test"][0]).startswith("<s>say ")
    template = "{% for m in messages %}{{ '(' + m['role'] + ') ' + m['content'] }}{% endfor %}"
    chat = tmp_path / "chat"
    plain.reference.save_pretrained(chat)
    plain.tokenizer.save_pretrained(chat)
    (chat / "chat_template.jinja").write_text(template)
    with pytest.warns(UserWarning, match="1 test prompt"):
        found = load("instruct", path=str(path), policy=str(chat))
    assert "(user) say " in found.tokenizer.decode(found.prompts["test"][0])


def test_a_comparison_of_one_gets_the_settings_for_pretrained_models(policy: Path, tmp_path: Path):
    suite = Compare(task=(f"instruct?policy={policy}",), out=tmp_path / "out").to_suite()
    assert "rloo" in suite.algorithms and all("learning_rate" not in chosen for chosen in suite.overrides.values())
    check_runs(suite.runs())
    assert set(OWN) <= set(TASKS)
