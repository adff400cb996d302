"""Summaries of posts: the reward by hand, what ships, and files in the formats of TL;DR."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lm_envs.reward.base import call_reward, part_means
from lm_envs.tasks import prompted, summarise, summarise_posts
from tests.lm_envs import byo

FACTS = [["cat"], ["run", "escape"], ["old lady"], ["keep"]]


class Known:
    """A model for which every token of a text costs its first letter's place in the alphabet."""

    def mean(self, texts):
        return np.array([-(ord(text[0].lower()) - 96.0) if " " in text else np.nan for text in texts])


def test_facts_are_mentioned_in_any_form():
    texts = ["Cats keep to an older lady.", "It escaped to an old man.", "the old ladies' cat kept running", ""]
    assert summarise.coverage(texts, [FACTS] * 4) == [0.75, 0.25, 1.0, 0.0]


def test_the_reward_by_hand():
    reward = summarise.covering(Known(), limit=4, over=0.05)
    texts = ["a cat ran", "a cat ran to town again", "cat"]
    given = {"prompts": ["p"] * 3, "completions": texts, "completion_ids": [[1]] * 3, "finish_reasons": ["stop"] * 3}
    assert call_reward(reward, **given, facts=[FACTS] * 3) == pytest.approx([0.5 * 0.9, 0.5 * 0.9 - 2 * 0.05, 0.0])
    assert part_means(reward) == pytest.approx({"part_facts*fluency": 0.3, "part_over": 2 / 3})
    with pytest.raises(ValueError, match="limit must be at least 1 word, not 0"):
        summarise.covering(Known(), 0, 0.05)


def test_what_ships():
    rows = summarise_posts.rows()
    assert Counter(row["split"] for row in rows) == {"train": 110, "validation": 20, "test": 110}
    assert len({row["post"] for row in rows}) == 240
    for row in rows:
        assert summarise.coverage([row["post"], row["summary"]], [row["facts"]] * 2) == [1.0, 1.0]
        assert len(row["summary"].split()) <= 25 and "{" not in row["post"] + row["title"] + row["summary"]
        assert summarise._row(row)["facts"] == row["facts"]


POST = "I found a kitten. The kitten sleeps in my shoe, and my landlord hates kittens.\n\nTL;DR:"
COMPARISON = {
    "info": {"id": "t3_1", "post": POST[:-8], "title": "Kitten against landlord", "subreddit": "pets"},
    "summaries": [
        {"text": " A kitten sleeps.", "policy": "sup1"},
        {"text": " The landlord hates it.", "policy": "ref"},
    ],
    "choice": 1,
    "worker": "w",
    "split": "train",
    "extra": {"confidence": 8},
}


@pytest.mark.parametrize(
    ("row", "reference", "title"),
    [
        (COMPARISON, " The landlord hates it.", "Kitten against landlord\n\n"),
        (
            {**COMPARISON, "info": json.dumps(COMPARISON["info"])},
            " The landlord hates it.",
            "Kitten against landlord\n\n",
        ),
        ({"post": POST, "title": None, "summaries": COMPARISON["summaries"], "choice": 0}, " A kitten sleeps.", ""),
        ({"post": POST, "summary": "A kitten.", "title": "Kitten", "subreddit": "pets"}, "A kitten.", "Kitten\n\n"),
        ({"prompt": POST, "label": "A kitten."}, "A kitten.", ""),
        ({"prompt": POST, "completion": "A kitten."}, "A kitten.", ""),
    ],
)
def test_rows_of_tldr(row, reference, title):
    made = summarise._row(row)
    assert made["prompt"] == title + POST[:-8] and made["reference"] == [reference]
    assert ["kitten"] in made["facts"] and ["landlord"] in made["facts"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"post": POST}, "line 1: 'summary' must be a text"),
        ({"summary": "A kitten."}, "line 1: 'post' must be a text"),
        ({**COMPARISON, "choice": 2}, "line 1: 'choice' must be the number of a summary, 0 to 1"),
        ({"post": POST, "summary": "A kitten.", "title": 3}, "line 1: 'title' must be a text, not 3"),
        ({"post": POST, "summary": "A kitten.", "facts": ["kitten"]}, "line 1: 'facts' must be a list of lists"),
        ({"post": "1 + 1", "summary": "2"}, "line 1: the post has no word to go by"),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        prompted.read(byo.write_jsonl(tmp_path / "f.jsonl", [row]), summarise._row)
