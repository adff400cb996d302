"""The embedded task: how it is made, what determines it, and the figures it promises."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lm_envs import files as cache
from lm_envs import tasks
from lm_envs.model.tokens import right_pad
from lm_envs.reward import learned
from lm_envs.reward.base import call_reward
from lm_envs.tasks import reviews, sampling
from lm_envs.tasks.reviews import GoldReview, ReviewsConfig, annotate, make_tokenizer, ranking_accuracy

TINY = dict(
    reviews=300, train_prompts=60, validation_prompts=20, test_prompts=20, max_new_tokens=10,
    hidden=8, layers=1, heads=2, sft_steps=3, sft_batch=8, pairs=32, held_out_pairs=16,
    rm_hidden=8, rm_layers=1, rm_heads=2, rm_steps=3, rm_batch=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(root, monkeypatch):
    monkeypatch.setenv("LM_ENVS_CACHE", str(root))


@pytest.fixture(scope="module")
def task(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_ENVS_CACHE", str(root))
        return tasks.load("reviews", **TINY)


def digests(folder):
    return json.loads((folder / cache.MANIFEST).read_text())["files"]


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_every_sequence_of_tokens_survives_the_way_through_text():
    tokenizer = make_tokenizer()
    generator = np.random.default_rng(0)
    rows = generator.integers(0, len(tokenizer) - 1, size=(50, 12)).tolist()
    for row in rows:
        prompt, completion = tokenizer.batch_decode([row[:8], row[8:]], skip_special_tokens=True)
        assert tokenizer(prompt + completion)["input_ids"] == row
    assert tokenizer.decode([*rows[0], tokenizer.eos_token_id], skip_special_tokens=True) == tokenizer.decode(rows[0])


def test_text_as_people_write_it():
    tokenizer = make_tokenizer()
    ids = tokenizer("the  film is\tgreat .")["input_ids"]
    assert tokenizer.decode(ids) == " the film is great ."
    assert tokenizer.decode(tokenizer(" the zebra")["input_ids"]) == " the <unk>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.all_special_ids == [tokenizer.eos_token_id]


# --- the annotators -------------------------------------------------------------------------------------------------


def test_annotators_are_bradley_terry_with_flips():
    count, margin = 20_000, 0.7
    first, second = np.full(count, 0.3 + margin), np.full(count, 0.3)
    right = 1 / (1 + np.exp(-margin))
    for flip in (0.0, 0.25, 1.0):
        expected = right * (1 - flip) + (1 - right) * flip
        found = annotate(first, second, flip=flip, seed=0).mean()
        assert abs(found - expected) < 4 * 0.5 / count**0.5
    flipped = annotate(first, second, flip=0.25, seed=0) != annotate(first, second, flip=0.0, seed=0)
    assert abs(flipped.mean() - 0.25) < 4 * 0.5 / count**0.5


def test_an_annotators_choice_depends_on_its_own_pair_alone():
    gold = np.random.default_rng(0).normal(size=(100, 2))
    alone = annotate(gold[:, 0], gold[:, 1], flip=0.25, seed=3)
    gold[50:] += 5 * np.array([1, -1])
    assert (annotate(gold[:, 0], gold[:, 1], flip=0.25, seed=3)[:50] == alone[:50]).all()
    assert (annotate(gold[:, 0], gold[:, 1], flip=0.25, seed=4) != alone).any()


def test_ranking_accuracy_by_hand():
    gold = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    assert ranking_accuracy(gold, np.array([3.0, 2.0, 5.0, -1.0])) == pytest.approx(1 / 3)
    assert ranking_accuracy(gold[2:3], np.array([1.0])) == 0.5


# --- the judge ------------------------------------------------------------------------------------------------------


def test_the_judge_reads_texts():
    judge = GoldReview()
    given = dict(prompts=[" the plot is"] * 2, completions=[" great .", " great ."])
    stopped, cut = call_reward(judge, **given, completion_ids=[[1, 2, 3]] * 2, finish_reasons=["stop", "length"])
    assert stopped == pytest.approx(1.5 * np.tanh(1 / 3)) and stopped - cut == pytest.approx(0.5)
    assert judge.__name__ == "gold" and judge(**given) == [stopped, stopped]


# --- making and loading ---------------------------------------------------------------------------------------------


def test_the_task_is_whole(task):
    assert {name: len(prompts) for name, prompts in task.prompts.items()} == {"train": 60, "validation": 20, "test": 20}
    assert task.prompt_length == 8 == min(len(prompt) for prompts in task.prompts.values() for prompt in prompts)
    assert task.reference.config.vocab_size == len(task.tokenizer) and not task.reference.training
    assert not any(parameter.requires_grad for parameter in task.reference.parameters())
    assert task.reference.dtype == torch.float32 and task.reference.config.pad_token_id == task.eos_token_id
    assert isinstance(task.reward, learned.LearnedReward) and task.judge.__name__ == "gold"
    assert set(task.stats) >= {"sft_loss", "sft_gold", "rm_accuracy", "annotator_accuracy"}


def test_an_opening_belongs_to_one_split_and_what_is_held_out_is_not_trained_on(task):
    openings = {name: {tuple(prompt) for prompt in prompts} for name, prompts in task.prompts.items()}
    assert sum(map(len, openings.values())) == len(set().union(*openings.values())) == 100
    trained = {tuple(text[:8]) for text in task.demonstrations}
    assert openings["train"] <= trained and not trained & (openings["validation"] | openings["test"])
    assert all(text[-1] == task.eos_token_id and task.eos_token_id not in text[:-1] for text in task.demonstrations)


def test_the_reward_has_mean_0_and_std_1_on_samples_of_the_reference(task):
    config = ReviewsConfig(**TINY)
    held_out = reviews.Pairs.of(
        config, task.reference, task.tokenizer, task.prompts["validation"], 16, 32, lambda done, loss: None
    )
    scores = held_out.samples.score(task.reward)
    assert scores.mean() == pytest.approx(0, abs=1e-4) and scores.std() == pytest.approx(1, abs=1e-4)
    assert held_out.gold.mean() == pytest.approx(task.stats["sft_gold"])
    # The reward model was trained on ids; what it reads through text is the same.
    ids = right_pad([text for pair in held_out.texts for text in pair])
    raw = learned.raw_scores(task.reward.model, ids).detach().numpy()
    assert (raw - task.reward.normalise[0]) / task.reward.normalise[1] == pytest.approx(scores, abs=1e-4)
    # The two of a pair share their prompt, and differ.
    assert all(one[:8] == two[:8] for one, two in held_out.texts)
    assert any(one != two for one, two in held_out.texts)


def test_the_cached_folders_are_ordinary_pretrained_folders(task, root):
    (entry,) = [
        path
        for path in (root / "reviews").iterdir()
        if path.suffix != ".lock"
        and json.loads((path / cache.MANIFEST).read_text())["made_from"]["config"] == vars(ReviewsConfig(**TINY))
    ]
    policy = AutoModelForCausalLM.from_pretrained(entry / "policy")
    for name, parameter in task.reference.state_dict().items():
        assert torch.equal(policy.state_dict()[name], parameter)
    model = AutoModelForSequenceClassification.from_pretrained(entry / "reward_model")
    assert torch.equal(model.score.weight, task.reward.model.score.weight)
    text = " the film is great ."
    assert AutoTokenizer.from_pretrained(entry / "policy")(text)["input_ids"] == task.tokenizer(text)["input_ids"]
    assert not [path for path in entry.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_it_is_made_once(task, monkeypatch):
    monkeypatch.setattr(reviews, "build", lambda *args: pytest.fail("built again"))
    assert tasks.load("reviews", **TINY) is task  # of this process
    again = reviews.load(**TINY)  # of the cache
    assert again is not task and again.prompts == task.prompts and again.stats == task.stats
    assert torch.equal(again.reference.lm_head.weight, task.reference.lm_head.weight)
    assert again.reward([" the"], [" film"]) == task.reward([" the"], [" film"])


def test_making_is_a_function_of_the_config_and_touches_no_global_generator(task, root, tmp_path):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        reviews.build(ReviewsConfig(**TINY), tmp_path / name)
        torch.rand(3)
        cache._write_manifest(tmp_path / name, {})
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    torch.manual_seed(123)
    assert torch.equal(torch.random.get_rng_state(), before)


CHANGES = dict(
    seed=1, reviews=310, train_prompts=61, validation_prompts=21, test_prompts=21, max_new_tokens=9,
    hidden=12, layers=2, heads=4, sft_steps=4, sft_batch=9, sft_learning_rate=1e-3, pairs=33, held_out_pairs=17,
    flip=0.5, rm_hidden=12, rm_layers=2, rm_heads=4, rm_steps=4, rm_batch=9, rm_learning_rate=1e-4, rm_weight_decay=0.5,
)  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(ReviewsConfig) if field.name != "kl_coef"])
def test_every_setting_makes_a_difference(name, tmp_path):
    if not (base := tmp_path.parent / "reviews_base").exists():
        base.mkdir()
        reviews.build(ReviewsConfig(**TINY), base)
        cache._write_manifest(base, {})
    reviews.build(ReviewsConfig(**{**TINY, name: CHANGES[name]}), tmp_path)
    cache._write_manifest(tmp_path, {})
    assert digests(tmp_path) != digests(base)


def test_every_setting_versions_and_code_are_in_the_key(task, monkeypatch):
    asked = []
    monkeypatch.setattr(cache, "cached", lambda kind, parts, build: asked.append(parts))
    monkeypatch.setattr(reviews, "read", lambda folder, config: config)
    assert reviews.load(**TINY, kl_coef=0.5).kl_coef == 0.5
    assert reviews.load(**TINY).kl_coef == ReviewsConfig.kl_coef
    one, two = asked
    assert one["config"] == {**two["config"], "kl_coef": 0.5} and set(one["config"]) == {
        f.name for f in fields(ReviewsConfig)
    }
    assert set(one["versions"]) == {"torch", "transformers", "tokenizers", "numpy"}
    monkeypatch.setattr(cache, "code_hash", lambda files: str(sorted(files)))
    reviews.load(**TINY)
    for file in (
        "reviews.py",
        "reviews_grammar.py",
        "sampling.py",
        "training.py",
        "learned.py",
        "decoding.py",
        "rng.py",
    ):
        assert file in asked[2]["code"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sft_step=3), "reviews has no option 'sft_step': did you mean sft_steps"),
        (dict(zzz=3), "reviews has no option 'zzz': did you mean seed"),
        (dict(pairs=0), "reviews: pairs must be positive, got 0"),
        (dict(flip=1.5), r"reviews: flip must lie in \[0, 1\], got 1.5"),
        (dict(kl_coef=-1), "reviews: kl_coef must not be negative, got -1"),
        (dict(hidden=10, heads=4), "reviews: hidden=10 must be a multiple of heads=4"),
        (dict(max_new_tokens=57), "reviews: max_new_tokens must be at most 56"),
        (dict(reviews=50), "50 reviews have 50 distinct openings, fewer than the 100 prompts asked for"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message) as found:
        tasks.load("reviews", **{**TINY, **options})
    assert "\n" not in str(found.value)


def test_unknown_task_names_the_near_ones():
    with pytest.raises(ValueError, match="no task 'review': did you mean 'reviews'"):
        tasks.load("review")
    with pytest.raises(ValueError, match="no task 'qqq': there are .*reviews"):
        tasks.load("qqq")


def test_an_unwritable_cache_is_noticed_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(reviews, "build", lambda *args: pytest.fail("trained first"))
    with pytest.raises(cache.CacheError, match="cannot write the cache folder .*LM_ENVS_CACHE"):
        reviews.load(**{**TINY, "seed": 99})


def test_progress_is_shown(tmp_path, capfd):
    reviews.build(ReviewsConfig(**TINY), tmp_path)
    shown = capfd.readouterr().err
    for line in ("fine-tuning the language model", "sampling pairs", "training the reward model"):
        assert line in shown


# --- the figures ----------------------------------------------------------------------------------------------------


def test_the_figures_of_the_real_task(monkeypatch):
    monkeypatch.undo()  # the cache that all tests share: other tests need the same task
    task = tasks.load("reviews")
    assert sum(parameter.numel() for parameter in task.reference.parameters()) == pytest.approx(0.6e6, rel=0.1)
    assert task.stats["sft_gold"] == pytest.approx(-0.1, abs=0.08)
    assert 0.75 < task.stats["rm_accuracy"] < 0.85
    assert 0.57 < task.stats["annotator_accuracy"] < 0.63
    samples = sampling.sample(
        task.reference,
        task.tokenizer,
        task.prompts["test"],
        512,
        eos_token_id=task.eos_token_id,
        max_new_tokens=24,
        seed=5,
    )
    gold, proxy = samples.score(task.judge), samples.score(task.reward)
    assert gold.mean() == pytest.approx(-0.1, abs=0.12)
    assert abs(proxy.mean()) < 0.2 and proxy.std() == pytest.approx(1, abs=0.15)
    # The reward is a proxy: it knows something of gold, and far from all.
    assert 0.45 < np.corrcoef(gold, proxy)[0, 1] < 0.8
