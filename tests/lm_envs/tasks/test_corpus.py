"""A task of one's own labelled text: reading, dividing, what is learned from which half, the judge, the cache."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.tokens import right_pad
from lm_envs.reward.learned import raw_scores
from lm_envs.tasks import corpus, load, sampling
from lm_envs.tasks.corpus import TextJudge, openings, read_labelled, training_half

GOOD, BAD = ("wonderful", "moving", "funny", "warm"), ("dull", "tired", "awful", "empty")
NOUNS, PLACES = ("film", "story", "cast", "script"), ("boston", "paris", "rome", "delhi", "lima")
SMALL = {
    "vocabulary": 400,
    "hidden": 32,
    "layers": 1,
    "heads": 2,
    "lm_steps": 60,
    "rm_steps": 90,
    "rm_epochs": 30,
    "lm_learning_rate": 5e-3,
    "rm_learning_rate": 5e-3,
    "lm_batch": 320,
    "rm_batch": 16,
    "samples": 48,
    "max_new_tokens": 12,
    "min_new_tokens": 2,
    "prompt_tokens": 16,
    "max_tokens": 40,
}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentences(count: int = 200, seed: int = 0) -> list[dict]:
    """Sentences whose adjectives say the label."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = GOOD if i % 2 else BAD
        opening = f"the {draw.choice(NOUNS)} from {draw.choice(PLACES)} {i}"
        rows.append({"text": f"{opening} is {draw.choice(words)} and {draw.choice(words)} .", "label": i % 2})
    return rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("text") / "mine.jsonl", sentences())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LM_ENVS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def task(source, cache):
    return corpus.load(source, **SMALL)


def message_of(call, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading and dividing


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a b", "label": 2}', "'label' must be 0 or 1, or false or true, not 2"),
        ('{"text": "a b", "label": "pos"}', "'label' must be 0 or 1, or false or true, not 'pos'"),
        ('{"text": "a b"}', "there is no 'label' here"),
        ('{"label": 1}', "there is no 'text' here"),
        ('{"text": " ", "label": 1}', "'text' is empty"),
        ('{"text": "a b", "label": 1, "split": "train"}', "a 'split' here, unlike before"),
        ('{"text": "a b", "label": 1', "not JSON"),
        ("17", "expected a JSON object"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, cache, line, expected):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(sentences(1)[0]) + "\n" + line + "\n")
    message = message_of(lambda: load("corpus", path=str(path)))
    assert f"{path}, line 2" in message and expected in message


def test_too_little_text_and_bad_settings(tmp_path, source, cache):
    few = write(tmp_path / "few.jsonl", sentences(6))
    assert "give more texts" in message_of(lambda: corpus.load(few))
    one = write(tmp_path / "one.jsonl", [row for row in sentences() if row["label"]])
    assert "with label 0" in message_of(lambda: corpus.load(one))
    assert "goes on after an opening of 40 words" in message_of(lambda: corpus.load(source, **SMALL, prompt_words=40))
    assert "give path=" in message_of(lambda: load("corpus"))
    assert "did you mean 'lm_steps'" in message_of(lambda: corpus.load(source, lm_step=3))
    assert "vocabulary" in message_of(lambda: corpus.load(source, vocabulary=256))
    assert "max_tokens=64" in message_of(lambda: corpus.load(source, max_new_tokens=60))
    assert "multiple of heads" in message_of(lambda: corpus.load(source, heads=3))
    assert "lm_batch must be at least 1" in message_of(lambda: corpus.load(source, lm_batch=0))
    with pytest.raises(FileNotFoundError):
        corpus.load(tmp_path / "none.jsonl")
    assert list(cache.glob("corpus/*/manifest.json")) == []  # nothing of it was kept


def test_texts_without_split_are_divided_by_their_content(tmp_path):
    rows = sentences(300)
    divided = {row.text: row for row in read_labelled(write(tmp_path / "a.jsonl", rows))}
    sizes = [sum(row.split == name for row in divided.values()) for name in ("train", "validation", "test")]
    assert sizes == [240, 30, 30]
    assert read_labelled(write(tmp_path / "b.jsonl", rows[::-1])) != list(divided.values())  # the order differs
    again = {row.text: row for row in read_labelled(tmp_path / "b.jsonl")}
    assert again == divided
    halves = [training_half(list(divided.values()), half) for half in (0, 1)]
    assert not {row.text for row in halves[0]} & {row.text for row in halves[1]}
    assert sum(map(len, halves)) == 240 and 90 < len(halves[0]) < 150


def test_a_held_out_text_is_not_trained_on(tmp_path):
    rows = [{**row, "split": "train"} for row in sentences(100)]
    rows[10] = {**rows[10], "text": rows[10]["text"].replace(" ", "  \n")}  # white space is one space
    rows += [{**sentences(100)[10], "split": "test"}, {"text": "quite another", "label": 0, "split": "val"}]
    divided = {row.text: row.split for row in read_labelled(write(tmp_path / "a.jsonl", rows))}
    assert divided[sentences(100)[10]["text"]] == "test" and divided["quite another"] == "validation"
    assert list(divided.values()).count("train") == 99


def test_a_repeated_text_has_its_first_label(tmp_path):
    rows = sentences(60)
    again = [{**row, "label": 1 - row["label"]} for row in rows]
    found = {row.text: row.label for row in read_labelled(write(tmp_path / "a.jsonl", rows + again))}
    assert found == {row["text"]: row["label"] for row in rows}


def test_openings_belong_to_one_split(tmp_path):
    rows = [{**row, "split": "train"} for row in sentences(60)]
    rows += [
        {"text": rows[3]["text"][:-1] + "!", "label": 1, "split": "test"},
        {"text": "short", "label": 0, "split": "dev"},
    ]
    found = openings(read_labelled(write(tmp_path / "a.jsonl", rows)), 5)
    opening = " ".join(rows[3]["text"].split()[:5])
    assert found["test"] == [opening] and opening not in found["train"] and len(found["train"]) == 59
    assert found["validation"] == []  # nothing would be left to write


# What is made


def test_prompts_are_the_beginnings_of_texts(task, source):
    rows = {row.text: row.split for row in read_labelled(source)}
    for name, prompts in task.prompts.items():
        for ids in prompts:
            opening = task.tokenizer.decode(ids).strip()
            assert len(opening.split()) == 5
            (text,) = [text for text in rows if text.startswith(opening + " ")]
            assert rows[text] == name
            assert task.tokenizer(text)["input_ids"][: len(ids)] == ids  # so the model goes on as it was taught
    assert len(task.prompts["test"]) == 20
    for ids in task.demonstrations:
        text = task.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert rows[text] == "train" and (ids[-1] == task.eos_token_id) and task.eos_token_id not in ids[:-1]


def test_bytes_that_were_never_seen_round_trip(task):
    text = "naïve — 東京 ☂"
    assert task.tokenizer.decode(task.tokenizer(text)["input_ids"]) == " " + text


def test_the_models_learned(task):
    """On text whose label stands in two words, both classifiers are nearly always right, and the model predicts."""
    assert task.stats["reward_accuracy"] > 0.8 and task.stats["judge_accuracy"] > 0.9
    assert task.stats["perplexity"] < 30 < len(task.tokenizer)
    assert task.reference.dtype == torch.float32 and task.reference.num_parameters() < 1e5


def test_perplexity_per_word_counts_words_and_ends(task, source):
    """The same nats over tokens and over words: the first token of a text is given, and its end counts as a word."""
    texts = [row.text for row in read_labelled(source) if row.split != "train"]
    ids = [task.tokenizer(text)["input_ids"] for text in texts]
    assert max(map(len, ids)) < SMALL["max_tokens"]  # none is cut, so each has its end
    tokens, words = sum(map(len, ids)), sum(len(text.split()) + 1 for text in texts)
    nats = tokens * np.log(task.stats["perplexity"])
    assert np.log(task.stats["perplexity_per_word"]) == pytest.approx(nats / words)


def test_the_reward_means_something_on_texts_that_break_off(task, source):
    """Held-out texts, cut after their first adjective."""
    rows = [row for row in read_labelled(source) if row.split != "train"]
    cut = [row.text.split() for row in rows]
    scores = task.reward(
        [" " + " ".join(words[:5]) for words in cut],
        [" " + " ".join(words[5:7]) for words in cut],
        finish_reasons=["length"] * len(rows),
    )
    threshold = task.stats["reward_threshold"]
    assert np.mean([(score > threshold) == row.label for score, row in zip(scores, rows, strict=True)]) > 0.75
    mean, std = task.reward.normalise
    assert threshold == pytest.approx(-mean / std)


def test_it_is_an_environment(task):
    env = TextVectorEnv(task, num_envs=8)
    traj = rollout(env, LMPolicy.for_mdp(env.mdp, task.reference), episodes=64, seed=0)
    assert abs(float(traj.score.mean())) < 0.5 and 0.5 < float(traj.score.std()) < 1.5  # in units of the reference's
    judged = task.judge(*env.mdp.texts(traj.prompt.numpy(), traj.response.numpy()))
    assert 0 < min(judged) < task.stats["judge_threshold"] < max(judged) < 1


@pytest.mark.parametrize("flipped", [0, 1])
def test_each_learns_from_the_labels_of_its_own_half(flipped, task, source, cache, tmp_path):
    """Turn the labels of one half round: the other half's model stays as it was, to the bit."""
    rows = read_labelled(source)
    turned = {row.text for row in training_half(rows, flipped)}
    path = write(
        tmp_path / "turned.jsonl",
        [{"text": r.text, "label": r.label ^ (r.text in turned), "split": r.split} for r in rows],
    )
    other = corpus.load(path, **SMALL)
    same_reward = all(
        torch.equal(a, b) for a, b in zip(task.reward.model.parameters(), other.reward.model.parameters(), strict=True)
    )
    same_judge = np.array_equal(task.judge.weight, other.judge.weight)
    assert (same_reward, same_judge) == ((False, True) if flipped == 0 else (True, False))
    accuracies = other.stats["reward_accuracy"], other.stats["judge_accuracy"]
    assert accuracies[flipped] < 0.3 and accuracies[1 - flipped] > 0.8


def test_long_texts_are_cut(source):
    rows = read_labelled(source)
    tokenizer = sampling.make_tokenizer([row.text for row in rows], 300)
    whole, cut = (corpus.encode(tokenizer, rows, limit) for limit in (1000, 10))
    assert all(ids[-1] == tokenizer.eos_token_id for ids in whole)
    assert cut == [ids[:10] for ids in whole] and len(tokenizer) == 300


# The loss over prefixes


def test_prefix_loss_is_the_loss_of_every_prefix():
    config = corpus.CorpusConfig(**SMALL)
    tokenizer = sampling.make_tokenizer(["a b c d"], 257)
    sizes = (config.hidden, config.layers, config.heads)
    model = sampling.small_gpt2(corpus.GPT2ForSequenceClassification, tokenizer, config.max_tokens, sizes, 0)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    texts, labels = [[5, 6, 7, 8, 0], [9, 10, 0]], torch.tensor([1, 0])
    ids = right_pad(texts)

    def logistic(prefix: list[int], label: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(raw_scores(model, right_pad([prefix]))[0], label.float())

    expected = [
        0.5 * logistic(text, label) + 0.5 * torch.stack([logistic(text[:t], label) for t in range(1, len(text))]).mean()
        for text, label in zip(texts, labels, strict=True)
    ]
    found = corpus.prefix_loss(model, ids, labels)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    padded = F.pad(ids, (0, 4), value=-1)
    torch.testing.assert_close(corpus.prefix_loss(model, padded, labels), found)


# The judge


def test_the_judge_is_scikit_learns_pipeline():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = sentences(80)
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    ).fit(texts, labels)
    judge = TextJudge.fit(texts, labels)
    asked = ["the film is warm", "the film is dull , moving and dull", "unheard of", ""]
    expected = pipeline.predict_proba(asked)[:, 1]
    for found in (judge, TextJudge(*json.loads(json.dumps(judge.arguments)))):
        np.testing.assert_allclose(found.probability(asked), expected, rtol=1e-9)
    split = [text.partition(" is") for text in asked]
    np.testing.assert_allclose(judge([a for a, _, _ in split], [b + c for _, b, c in split]), expected, rtol=1e-9)
    assert judge([], []) == [] and (expected[0] > judge.threshold > expected[1])


def test_without_scikit_learn_one_line_says_what_to_install(source, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(corpus, "build", lambda *a: pytest.fail("built before it was checked"))
    assert "pip install 'lm-envs[corpus]'" in message_of(lambda: corpus.load(source, **SMALL, seed=9), ImportError)


def test_words_are_needed(tmp_path, cache):
    rows = [{"text": f"! ? {'!' * i} ? ! ! ?", "label": i % 2} for i in range(60)]
    assert "judge cannot learn" in message_of(lambda: corpus.load(write(tmp_path / "a.jsonl", rows), **SMALL))


# The cache


def test_made_once_and_made_again_when_something_changes(task, source, cache, tmp_path, monkeypatch):
    class Built(Exception):
        pass

    def build(*arguments):
        raise Built

    monkeypatch.setattr(corpus, "build", build)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(source.read_bytes())
    again = corpus.load(moved, **SMALL)  # another name, the same content
    assert again.stats == task.stats and again.prompts == task.prompts and again.demonstrations == task.demonstrations
    assert torch.equal(again.reference.lm_head.weight, task.reference.lm_head.weight)
    assert again.reward.normalise == task.reward.normalise
    with pytest.raises(Built):
        corpus.load(source, **{**SMALL, "lm_steps": 61})
    moved.write_text(source.read_text() + json.dumps({"text": "one more of them", "label": 1}) + "\n")
    with pytest.raises(Built):
        corpus.load(moved, **SMALL)


def test_what_is_cached_is_data(task, cache):
    files = [path for path in cache.glob("corpus/*/**/*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert load_file(next(path for path in files if path.parent.name == "policy" and path.suffix == ".safetensors"))


def test_building_is_a_function_of_its_arguments(task, source, tmp_path, monkeypatch):
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path))
    torch.manual_seed(123)
    again = corpus.load(source, **SMALL)
    for a, b in ((task.reference, again.reference), (task.reward.model, again.reward.model)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert again.stats == task.stats
