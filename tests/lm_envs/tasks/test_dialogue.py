"""Replies in a dialogue: the three rewards by hand from a stand-in of the model, what ships, and the user's rows."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lm_envs.reward.base import call_reward, part_means
from lm_envs.tasks import dialogue, prompted
from tests.lm_envs import byo


class Known:
    """A model whose likelihoods and hidden states are functions of the texts' lengths."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def mean(self, texts, contexts):
        self.asked += zip(texts, contexts, strict=True)
        return np.array([-len(c) / 10 if t else np.nan for t, c in zip(texts, contexts, strict=True)])

    def hidden(self, texts):
        angle = np.array([float(len(text)) for text in texts])
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)


CONTEXT = ["Hi there.", "Hello.", "Where to?"]


def test_ease_is_the_dull_replies_mean_likelihood_after_the_reply():
    model = Known()
    assert dialogue.Ease(model)(["Home, and you?", "No"]) == pytest.approx([1.5, 0.3])  # with the line's end
    assert model.asked[0] == (dialogue.DULL[0], "Home, and you?\n") and len(model.asked) == 2 * len(dialogue.DULL)


def test_flow_compares_with_the_same_speakers_turn():
    found = dialogue.Flow(Known())(["Hello!!", "Hello.", "Hi", ""], [CONTEXT, CONTEXT, ["Hi there."], CONTEXT])
    assert found[0] == pytest.approx(-math.log(math.cos(1))) and found[1] == pytest.approx(0.0)
    assert found[2:] == [None, 0.0]
    assert dialogue.Flow(Known())(["Hello...."], [CONTEXT])[0] == pytest.approx(-math.log(1e-3))  # cos 3 is negative


def test_coherence_adds_both_directions():
    model = Known()
    found = dialogue.Coherence(model)(["Home.", ""], [CONTEXT, CONTEXT])
    assert model.asked[0] == ("Home.", "Hi there.\nHello.\nWhere to?\n")
    assert model.asked[2] == ("Where to?", "Home.\n")
    assert found == pytest.approx([-2.7 - 0.6, -40.0])


def test_the_sum_and_its_parts():
    reward = dialogue.engineered(Known(), 0.25, 0.25, 0.5)
    given = {"prompts": ["p"], "completions": ["Hello!!"], "completion_ids": [[1, 2]], "finish_reasons": ["stop"]}
    ease, flow, coherence = 0.8, -math.log(math.cos(1)), -2.7 - 0.8
    assert call_reward(reward, **given, context=[CONTEXT])[0] == pytest.approx(0.25 * (ease + flow) + 0.5 * coherence)
    assert part_means(reward) == pytest.approx({"part_ease": ease, "part_flow": flow, "part_coherence": coherence})
    assert [name for _, name in ((w, r.__name__) for w, r in dialogue.engineered(Known(), 0, 1, 0).parts)] == ["flow"]
    with pytest.raises(ValueError, match="one of ease, flow and coherence"):
        dialogue.engineered(Known(), 0, 0, 0)


def test_what_ships():
    rows = prompted.read(prompted.SHIPPED / "dialogue.jsonl", dialogue._row)
    assert Counter(row["split"] for row in rows) == {"train": 52, "validation": 12, "test": 100}
    assert all(len(row["context"]) == 3 and len(row["good"]) == 2 for row in rows)
    assert [m["role"] for m in rows[0]["prompt"]] == ["user", "assistant", "user"]


def test_rows_of_dailydialog(tmp_path: Path):
    made = dialogue._row({"context": ["a", "b"], "good": ["c"], "bad": ["d"]})
    assert made["prompt"][0] == {"role": "assistant", "content": "a"} and "bad" not in made
    path = byo.write_jsonl(tmp_path / "f.jsonl", [{"context": "a", "good": ["b"]}])
    with pytest.raises(ValueError, match="line 1: 'context' must be a list of texts"):
        prompted.read(path, dialogue._row)
