"""A reward from simulated choices: that it learns them, is made once, and what learns from the same pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lm_envs.algos.engine.comparisons import annotated_pairs
from lm_envs.feedback.annotators import Annotator
from lm_envs.feedback.study import Item, Response
from lm_envs.reward.base import reward_name
from lm_envs.reward.constraints import met
from lm_envs.reward.likelihood import Likelihood
from lm_envs.reward.units import Samples
from lm_envs.tasks import instruct, load, preferences, prompted, sampling
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.custom import read_examples
from tests.lm_envs import byo

WORDS = "cat saw ate hid fish bird old grey"


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
    tokenizer = byo.byte_level_bpe(vocabulary=400)
    byo.llama(len(tokenizer), context=128).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    splits = ["train"] * 5 + ["validation"] * 2 + ["test"]
    asked = [{"kind": "words", "least": 1}]
    rows = [
        {"prompt": f"say {w}", "constraints": asked, "split": s} for w, s in zip(WORDS.split(), splits, strict=True)
    ]
    return str(byo.write_jsonl(tmp_path / "own.jsonl", rows))


def opened(prompts: str, policy: str, **options) -> TextTask:
    with pytest.warns(UserWarning, match="1 test prompt"):
        return load("instruct", path=prompts, policy=policy, max_new_tokens=6, **options)


def longest(item):
    return [len(response.text) / 10 for response in item.responses]


def test_it_learns_what_annotators_choose(prompts: str, policy: str):
    """Annotators whose score is of the form that the reward can have."""
    plain = opened(prompts, policy)
    secret = preferences.LinearProbe(Likelihood(plain.reference, plain.tokenizer), np.tile([1.0, -2.0], 8), 1)

    def score(item):
        texts = [response.text for response in item.responses]
        return secret([item.prompt] * len(texts), texts)

    made = preferences.with_learned_reward(plain, 240, [Annotator(score, temperature=0.0)])
    assert made.stats["annotator_accuracy"] == 1.0 and len(made.pairs) == len(made.preferred) == 240
    assert [row for row, _, _ in made.pairs[:6]] == [0, 1, 2, 3, 4, 0]
    assert reward_name(made.reward) == "standardise(preferences)"
    chosen = []
    for row, *both in made.pairs:
        rows = sampling.as_samples(
            sampling.Codec(made.tokenizer, made.start), [made.prompts["train"][row]] * 2, both, made.eos_token_ids, {}
        )
        first, second = rows.score(made.reward)
        chosen.append(first > second)
    assert np.mean(np.array(chosen) == made.preferred) > 0.9 and made.stats["rm_accuracy"] > 0.8
    held = sampling.response_pairs(made.start, made, "validation", 4 * len(made.prompts["validation"]))
    scores = held.score(made.reward)
    assert scores.mean() == pytest.approx(0, abs=1e-4) and scores.std() == pytest.approx(1, abs=1e-4)


def test_it_is_made_once_for_the_same_model_prompts_and_annotators(
    prompts: str, policy: str, monkeypatch: pytest.MonkeyPatch
):
    first = opened(prompts, policy, pairs=6)
    assert reward_name(first.reward) == "standardise(preferences)" and set(first.stats) >= {
        "rm_accuracy",
        "annotator_accuracy",
    }
    builds = []
    monkeypatch.setattr(preferences, "_build", lambda *given: builds.append(given))
    plain, teachers = opened(prompts, policy), instruct.pool(instruct.quality, instruct.TEACHERS)
    again = preferences.with_learned_reward(plain, 6, teachers)
    assert again.pairs == first.pairs and again.preferred == first.preferred and not builds
    samples = Samples(["say cat"] * 2, ["a", "b c"], [[70], [71, 72]], ["stop"] * 2)
    assert samples.score(again.reward).tolist() == samples.score(first.reward).tolist()
    for count, others in ((4, teachers), (6, plain.annotators)):
        with pytest.raises((TypeError, FileNotFoundError)):  # nothing was built
            preferences.with_learned_reward(plain, count, others)
    assert len(builds) == 2


def test_the_majority_chooses_and_the_first_annotator_where_there_is_none(prompts: str, policy: str, monkeypatch):
    given = np.array([[1, 0, 1, 0, 0.5, 1], [1, 0, 0, 1, 1, 0], [0, 1, 0.5, 0.5, 1, 0]])
    monkeypatch.setattr(preferences, "votes", lambda annotators, items: given)
    made = preferences.with_learned_reward(opened(prompts, policy), 6, [Annotator(longest)])
    assert made.preferred == [True, False, True, False, True, False]


def test_what_it_cannot_read_is_told_before_anything_is_sampled(prompts: str, policy: str, monkeypatch):
    plain, one = opened(prompts, policy), [Annotator(longest)]
    monkeypatch.setattr(sampling, "response_pairs", lambda *given, **options: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match="pairs of two training prompts"):
        preferences.with_learned_reward(plain, 1, one)
    monkeypatch.setattr(preferences, "is_encoder_decoder", lambda model: model is plain.reference)
    with pytest.raises(ValueError, match="decoder-only policy"):
        preferences.with_learned_reward(plain, 6, one)


def test_algorithms_that_learn_from_preferences_take_the_same_choices(prompts: str, policy: str):
    task = opened(prompts, policy, pairs=4)
    turned = replace(task, preferred=[not first for first in task.preferred])
    for asked, count in ((2048, 4), (3, 3)):
        found, other = (annotated_pairs(each, asked, flip=0.5, seed=7) for each in (task, turned))
        wanted = [rank for first in task.preferred[:count] for rank in ([0, 1] if first else [1, 0])]
        assert found.rank.tolist() == wanted and (found.rank + other.rank).tolist() == [1] * 2 * count
        responses = [response for _, *both in task.pairs[:count] for response in both]
        assert [[t for t in row if t >= 0] for row in found.response.tolist()] == responses


def test_no_annotator_is_asked_twice():
    seeds = [
        [each.seed for each in instruct.pool(instruct.quality, seed)] for seed in (instruct.JUDGES, instruct.TEACHERS)
    ]
    assert not set(seeds[0]) & set(seeds[1])


def test_quality_by_hand():
    asked = [{"kind": "no_commas"}, {"kind": "words", "most": 3}]
    texts = tuple(Response(text, "") for text in ("A bee hums.", "A bee, the old hive.", "A cat, no."))
    item = Item("p", texts, columns={"constraints": asked, "topic": ["bee", "hive"]})
    assert instruct.quality(item) == [0.75, 0.5, 0.25]
    assert instruct.quality(replace(item, columns={"constraints": asked, "topic": None})) == [1.0, 0.0, 0.5]
    assert instruct.quality(replace(item, columns={"constraints": asked[1:], "topic": ["one"]})) == [0.5, 0.0, 0.5]


def test_the_examples_that_ship_meet_what_they_ask_for_and_are_about_nothing_that_is_tested():
    (short, first), (bullets, second), (use, third) = read_examples(prompted.SHIPPED / "instruct_examples.jsonl")
    wool = {"kind": "bullets", "least": 2, "most": 2}
    above = [{"kind": "starts", "phrase": "Above"}, {"kind": "use", "words": ["basket"]}]
    assert "at most 25 words" in short and "two bullet points" in bullets and "the basket" in use
    for text, asked in ((first, {"kind": "words", "most": 25}), (first, {"kind": "no_commas"}), (second, wool)):
        assert met(text, asked)
    assert all(met(third, asked) for asked in above)
    tested = [row for row in prompted.read(prompted.SHIPPED / "instruct.jsonl", instruct._row) if row["topic"]]
    topics = {word for row in tested if row["split"] == "test" for word in row["topic"]}
    assert not [word for word in topics if word in " ".join((short, bullets, use)).lower().split()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": -1}, "pairs must be a whole number from 0 on, not -1"),
        ({"pairs": True}, "pairs must be a whole number"),
        ({"pairs": 3, "reward": "constraints"}, "pairs makes a reward model of its own"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load("instruct", policy="nowhere", **options)
