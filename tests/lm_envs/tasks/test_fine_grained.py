"""Three sentences, each with a reward: the rules by hand, both ways to pay, and learned rewards in a rule's place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lm_envs.reward.base import call_reward, is_dense
from lm_envs.reward.building import build_reward
from lm_envs.reward.specs import parse_reward
from lm_envs.tasks import fine_grained, load, prompted
from tests.lm_envs import byo

TOPIC = ["soup", "pot"]


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
    return str(byo.for_shipped_prompts(tmp_path / "policy"))


def test_the_rules_by_hand():
    first = "The soup is hot."
    earlier = [[], [first], [first], [first], [first] * 3]
    texts = [first, "The soup is cold.", "The pots are hot.", "A pot!", "Her pot is in the pot is."]
    assert fine_grained.relevant(texts, [TOPIC] * 5, earlier) == [1, 0, 1, 0, 1]
    assert fine_grained.new(texts, earlier) == pytest.approx([1, 1 / 3, 1, 0, 5 / 6])
    assert fine_grained.beyond(earlier) == [0, 0, 0, 0, 1]
    assert fine_grained.relevant(["The soup is hot, and"], [TOPIC], [[]]) == [0]  # it was cut
    texts = ["Salt. Bowls. Hot!", "Salt and salt and a bowl of hot soup"]
    assert fine_grained.judge(texts, [["salt", "bowl", "hot", "taste"]] * 2) == pytest.approx([1.5, 1.0])

    class Known:
        def mean(self, texts):
            return np.array([-2.0, -2.0])

    assert fine_grained.Plausible(Known())([first, "A pot!"]) == [0.8, 0.0]


def test_what_ships():
    rows = prompted.read(prompted.SHIPPED / "fine-grained.jsonl", fine_grained._row)
    assert Counter(row["split"] for row in rows) == {"train": 96, "validation": 24, "test": 120}
    assert all(len(row["topic"]) == len(row["held"]) == 4 and not set(row["topic"]) & set(row["held"]) for row in rows)
    topics = {split: {tuple(row["topic"]) for row in rows if row["split"] == split} for split in ("train", "test")}
    assert not topics["train"] & topics["test"]


def test_the_same_sum_at_the_sentences_or_at_the_end(policy: str):
    dense, sparse = (load("fine-grained", policy=policy, dense=dense) for dense in (True, False))
    assert is_dense(dense.reward) and not is_dense(sparse.reward)
    ids = [dense.tokenizer(text)["input_ids"] for text in ("a b c d. b c a d. d c b a. a a a a.", "a b")]
    given = {
        "prompts": ["p"] * 2,
        "completions": [dense.tokenizer.decode(row) for row in ids],
        "completion_ids": ids,
        "finish_reasons": ["stop", "length"],
        "topic": [["a"], ["b"]],
    }
    paid, total = call_reward(dense.reward, **given), call_reward(sparse.reward, **given)
    np.testing.assert_allclose(paid.sum(axis=1), total)
    assert [part.__name__ for _, part in dense.reward.parts] == ["relevance", "novelty", "plausibility", "extra"]


def test_weights_and_rewards_in_a_rules_place(policy: str):
    reward = load(f"fine-grained?policy={policy}&novelty=lm_envs.reward.lengths:tokens*0.5&relevance=0&extra=0").reward
    assert [(weight, part.__name__) for weight, part in reward.parts] == [(1.0, "novelty"), (0.3, "plausibility")]
    given = {"completions": ["x y"], "completion_ids": [[1, 2, 3]], "finish_reasons": ["stop"], "prompts": ["p"]}
    assert call_reward(reward.parts[0][1], **given).tolist() == [[0, 0, 1.5]]
    with pytest.raises(ValueError, match="one of relevance, novelty and plausibility must not be 0"):
        load(f"fine-grained?policy={policy}&relevance=0&novelty=0&plausibility=0")
    with pytest.raises(ValueError, match="there is no file 'mine.py'"):
        load("fine-grained?policy=nowhere&novelty=mine.py:f")


@pytest.mark.slow
def test_a_learned_classifier_of_sentences(policy: str, tmp_path: Path):
    model = f"model:{byo.make(tmp_path / 'own').root / 'reward_model'}"
    task = load("fine-grained", policy=policy, relevance=f"{model}*0.3", novelty=0)
    sample = {"prompts": ["a"], "completions": ["b c."], "completion_ids": [[1, 2, 3]], "finish_reasons": ["stop"]}
    learned = build_reward(parse_reward(model))
    paid = call_reward(task.reward.parts[0][1], **sample)
    assert paid[0, -1] == pytest.approx(0.3 * call_reward(learned, **sample)[0]) and not paid[0, :-1].any()


def test_bad_rows_are_named(tmp_path: Path):
    path = byo.write_jsonl(tmp_path / "f.jsonl", [{"prompt": "a", "topic": ["b"], "held": "c"}])
    with pytest.raises(ValueError, match="line 1: 'held' must be a list of texts, not 'c'"):
        prompted.read(path, fine_grained._row)
