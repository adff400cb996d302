"""Building the Reviews task: its tokenizer, what determines the product, and the quality that it must have."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lm_envs import files, tasks
from lm_envs.benchmarks.cli import main
from lm_envs.model.tokens import right_pad
from lm_envs.reward import learned
from lm_envs.tasks import reviews, reviews_build, sampling
from lm_envs.tasks.reviews import FOLDER, GoldReview, annotate, ranking_accuracy
from lm_envs.tasks.reviews_build import ReviewsConfig, make_tokenizer, perplexity, sample_pairs

TINY = dict(
    reviews=300, train_prompts=60, validation_prompts=20, test_prompts=20, max_new_tokens=10,
    hidden=8, layers=1, heads=2, sft_steps=3, sft_batch=8, pairs=32, held_out_pairs=16,
    rm_hidden=8, rm_layers=1, rm_heads=2, rm_steps=3, rm_batch=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("reviews")
    reviews_build.build(made, **TINY)
    return made


@pytest.fixture(scope="module")
def task(folder):
    return reviews.load(folder)


def manifest(folder):
    return json.loads((folder / files.MANIFEST).read_text())


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


# --- the product ----------------------------------------------------------------------------------------------------


def test_what_is_built_can_be_loaded(task, folder):
    assert {name: len(prompts) for name, prompts in task.prompts.items()} == {"train": 60, "validation": 20, "test": 20}
    assert task.max_new_tokens == 10 and len(task.pairs) == 32 and task.kl_coef == 0.1
    assert sum(len(prompts) for prompts in task.prompts.values()) == 100 < len(task.demonstrations) < 300
    made_from = manifest(folder)["made_from"]
    assert made_from["config"] == vars(ReviewsConfig(**TINY)) and made_from["versions"]["torch"] == torch.__version__


def test_the_reward_has_mean_0_and_std_1_on_samples_of_the_reference(task):
    config, prompts = ReviewsConfig(**TINY), task.prompts["validation"]
    samples = sample_pairs(config, task.reference, task.tokenizer, prompts, 16, 32)
    scores = samples.score(task.reward)
    assert scores.mean() == pytest.approx(0, abs=1e-4) and scores.std() == pytest.approx(1, abs=1e-4)
    gold = samples.score(GoldReview()).reshape(-1, 2)
    assert gold.mean() == pytest.approx(task.stats["sft_gold"])
    difference = scores.reshape(-1, 2) @ [1, -1]
    assert ranking_accuracy(gold, difference) == pytest.approx(task.stats["rm_accuracy"])
    # The reward model was trained on ids; what it reads through text is the same.
    ids = right_pad([[*prompts[i // 2], *row] for i, row in enumerate(samples.completion_ids)])
    raw = learned.raw_scores(task.reward.model, ids).detach().numpy()
    assert (raw - task.reward.normalise[0]) / task.reward.normalise[1] == pytest.approx(scores, abs=1e-4)


def test_the_pairs_are_samples_of_the_reference_that_annotators_chose_from(task, folder):
    config = ReviewsConfig(**TINY)
    samples = sample_pairs(config, task.reference, task.tokenizer, task.prompts["train"], 32, 0)
    assert [response for _, *both in task.pairs for response in both] == samples.completion_ids
    assert any(first != second for _, first, second in task.pairs)
    gold = samples.score(GoldReview()).reshape(-1, 2)
    data = load_file(folder / "data.safetensors")
    assert (annotate(gold[:, 0], gold[:, 1], flip=0.25, seed=0) == data["preferred"]).all()


def test_perplexity_by_hand(task):
    """Of a model without weights every token is equally likely."""
    model = sampling.small_gpt2(type(task.reference), task.tokenizer, 64, (8, 1, 2), 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, [[1, 2, 3], [4, 5]]) == pytest.approx(len(task.tokenizer))
    assert 1 < task.stats["sft_perplexity"] < 1.1 * len(task.tokenizer)


def test_building_is_a_function_of_the_settings_and_touches_no_global_generator(folder, tmp_path):
    before = torch.random.get_rng_state()
    reviews_build.build(tmp_path, **TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert manifest(tmp_path)["files"] == manifest(folder)["files"]


CHANGES = dict(
    seed=1, reviews=310, train_prompts=61, validation_prompts=21, test_prompts=21, max_new_tokens=9,
    hidden=12, layers=2, heads=4, sft_steps=4, sft_batch=9, sft_learning_rate=1e-3, pairs=33, held_out_pairs=17,
    flip=0.5, rm_hidden=12, rm_layers=2, rm_heads=4, rm_steps=4, rm_batch=9, rm_learning_rate=1e-4, rm_weight_decay=0.5,
    kl_coef=0.5,
)  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(ReviewsConfig)])
def test_every_setting_makes_a_difference(name, folder, tmp_path):
    reviews_build.build(tmp_path, **{**TINY, name: CHANGES[name]})
    assert manifest(tmp_path)["files"] != manifest(folder)["files"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sft_step=3), "reviews has no option 'sft_step': did you mean 'sft_steps'"),
        (dict(zzz=3), "reviews has no option 'zzz': there are flip, "),
        (dict(pairs=0), "reviews: pairs must be at least 1, not 0"),
        (dict(flip=1.5), r"reviews: flip must be at most 1, not 1.5"),
        (dict(kl_coef=-1), "reviews: kl_coef must be at least 0, not -1"),
        (dict(hidden=10, heads=4), "reviews: hidden=10 must be a multiple of heads=4"),
        (dict(max_new_tokens=57), "reviews: max_new_tokens must be at most 56"),
        (dict(reviews=50), "50 reviews have 50 distinct openings, fewer than the 100 prompts asked for"),
    ],
)
def test_bad_options_are_one_clear_line(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as found:
        reviews_build.build(tmp_path, **{**TINY, **options})
    assert "\n" not in str(found.value) and not list(tmp_path.iterdir())


def test_the_command_builds_a_variant_that_suites_can_use(tmp_path, capfd):
    tiny = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    main(["build", "reviews", "--out", str(tmp_path / "new"), *tiny, "--set", "flip=0.4"])
    told = capfd.readouterr()
    assert told.out == f"{tmp_path / 'new'}\n"
    for line in ("fine-tuning the language model", "sampling pairs", "training the reward model"):
        assert line in told.err
    assert manifest(tmp_path / "new")["made_from"]["config"] == {**vars(ReviewsConfig(**TINY)), "flip": 0.4}
    assert len(tasks.load("reviews", path=str(tmp_path / "new")).prompts["test"]) == 20
    for arguments, message in (
        (["--out", str(tmp_path / "new")], "is not an empty folder: name a new one"),
        (["--out", str(tmp_path / "other"), "--set", "flop=1"], "reviews has no option 'flop': did you mean 'flip'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["build", "reviews", *arguments])
        assert stop.value.code == 1 and message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "other").exists()


# --- the quality ----------------------------------------------------------------------------------------------------


def check_quality(stats):
    """Bounds that hold on any processor; the shipped product and a new one are held to the same."""
    assert stats["sft_perplexity"] == pytest.approx(6.6, rel=0.03)
    assert stats["sft_gold"] == pytest.approx(-0.08, abs=0.08)
    assert 0.75 < stats["rm_accuracy"] < 0.85
    assert 0.5 < stats["rm_gold_correlation"] < 0.75
    assert 0.57 < stats["annotator_accuracy"] < 0.63


def test_the_shipped_product_is_of_the_quality_it_should_be():
    shipped = reviews.load()
    check_quality(shipped.stats)
    assert manifest(FOLDER)["made_from"]["config"] == vars(ReviewsConfig())
    prompts, _, held_out = reviews_build.split(ReviewsConfig(), make_tokenizer())
    assert prompts == shipped.prompts
    assert perplexity(shipped.reference, held_out) == pytest.approx(shipped.stats["sft_perplexity"], rel=1e-4)


@pytest.mark.slow
def test_a_new_product_is_of_the_same_quality(tmp_path):
    reviews_build.build(tmp_path)
    check_quality(reviews.load(tmp_path).stats)
