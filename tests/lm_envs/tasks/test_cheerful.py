"""Cheerful sentences: prompts, scores by hand, and the task with a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_envs.benchmarks.run.compare import check_runs
from lm_envs.benchmarks.run.suite_files import load_suite
from lm_envs.tasks import cheerful, load
from tests.lm_envs import byo


def test_scores_by_hand():
    texts = ["A happy, happy dog.", "A joyful smile of pure delight and love", "", [{"content": "A good day!"}]]
    assert cheerful.reward(texts) == [1.5, 3.0, 0.0, 0.5]  # a word counts once; three at most
    assert cheerful.judge(texts) == [0.5, 0.0, 0.0, 1.5]
    assert not cheerful.REWARDED & cheerful.JUDGED


def test_no_topic_is_in_two_splits():
    rows = cheerful.prompts()
    by_split = {s: {r["prompt"] for r in rows if r["split"] == s} for s in ("train", "validation", "test")}
    assert [len(found) for found in by_split.values()] == [144, 36, 108]
    assert len(set(cheerful._TOPICS)) == len(cheerful._TOPICS) == 96
    for topic in cheerful._TOPICS:
        asked = {form.format(topic) for form in cheerful._ASKED}
        assert sum(not asked.isdisjoint(found) for found in by_split.values()) == 1
    words = " ".join(cheerful._TOPICS).split()
    assert not (cheerful.REWARDED | cheerful.JUDGED) & set(words) - {"fresh"}


def test_the_task_with_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
    folders = byo.make(tmp_path / "own")
    template = "{% for m in messages %}{{ m['content'][-12:] + ' ' }}{% endfor %}"
    (folders.root / "policy" / "chat_template.jinja").write_text(template)
    task = load("cheerful", policy=str(folders.root / "policy"), max_new_tokens=4)
    assert task.name == "cheerful" and len(task.prompts["test"]) == 108 and task.judge is not None


def test_the_suite_is_read():
    suite = load_suite("demo-pretrained")
    assert suite.guards == suite.adaptation == {} and suite.tasks[0].options["policy"] == "smollm2"
    check_runs(suite.runs())
    assert all("learning_rate" not in chosen for chosen in suite.overrides.values())
