"""What the builders of tasks hand to training and sampling: each setting, under its own name, where it belongs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lm_envs.data.conventions import Example
from lm_envs.tasks import corpus, custom, load, reviews_build, sampling, translation
from lm_envs.tasks.corpus import CorpusConfig, TextJudge, training_half
from lm_envs.tasks.reviews_build import ReviewsConfig
from lm_envs.tasks.translation import TranslationConfig
from tests.lm_envs import byo


def recorded(monkeypatch, where, name, instead=None):
    """The calls of a function, which is replaced or only watched."""
    calls, whole = [], getattr(where, name)

    def call(*given, **options):
        calls.append(SimpleNamespace(given=given, options=options))
        return whole(*given, **options) if instead is None else instead(*given, **options)

    monkeypatch.setattr(where, name, call)
    return calls


def texts(count=160):
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    rows = []
    for i in range(count):
        text = " ".join([f"text{i}", *(words[(i + k) % 5] for k in range(6)), "good" if i % 2 else "bad"])
        rows.append(Example("", (text,), label=i % 2, split="train" if i < 120 else ("validation", "test")[i % 2]))
    return rows


def test_corpus(monkeypatch, tmp_path):
    config = CorpusConfig(
        seed=5, vocabulary=300, hidden=8, heads=2, layers=1, weight_decay=0.3, prompt_words=2, prompt_tokens=20,
        max_new_tokens=6, min_new_tokens=2, max_tokens=30, lm_steps=10_000, lm_epochs=3, lm_batch=600,
        lm_learning_rate=3e-3, rm_steps=10_000, rm_epochs=4, rm_batch=7, rm_learning_rate=7e-4, samples=12,
        temperature=0.6,
    )  # fmt: skip

    def learn(title, loop, model, *given, **options):  # else both models, of one seed, would be alike
        if loop is corpus.training.fit_language_model:
            with torch.no_grad():
                model.transformer.wte.weight.mul_(1.5)

    fits = recorded(monkeypatch, sampling, "fit", learn)
    drawn = recorded(monkeypatch, sampling, "sample")
    built = recorded(monkeypatch, sampling, "small_gpt2")
    rows = texts()
    made = corpus.build(rows, config, tmp_path)
    lm, rm = fits
    model, demonstrations, bundles = lm.given[2:]
    assert lm.given[1] is corpus.training.fit_language_model and demonstrations == made["demonstrations"]
    common = {"weight_decay": 0.3, "seed": 5}
    assert lm.options == {"steps": 3 * len(bundles), "learning_rate": 3e-3, **common} and len(bundles) > 2
    assert sorted(i for bundle in bundles for i in bundle) == list(range(120)) and len(demonstrations) == 120
    assert max(len(bundle) * max(len(demonstrations[i]) for i in bundle) for bundle in bundles) <= 600
    half = training_half(rows, 0)
    parts = rm.given[4]
    assert rm.options == {"steps": 4 * len(parts), "learning_rate": 7e-4, **common}
    assert sorted(i for part in parts for i in part) == list(range(len(half))) and max(map(len, parts)) == 7
    reward_model = rm.given[2]
    for name, weight in model.transformer.state_dict().items():  # it starts from the language model
        assert torch.equal(reward_model.transformer.state_dict()[name], weight), name
    assert [call.given[2:] for call in built] == [(30, (8, 1, 2), 5)] * 2
    (sample,) = drawn
    assert sample.given[0] is model and sample.given[2:] == (made["prompts"]["validation"], 12)
    known = {"max_new_tokens": 6, "min_new_tokens": 2, "temperature": 0.6, "seed": 5}
    assert {name: sample.options[name] for name in known} == known
    limited = CorpusConfig(**{**vars(config), "lm_steps": 2, "rm_steps": 3})
    corpus.build(rows, limited, tmp_path / "limited")
    assert [call.options["steps"] for call in fits[2:]] == [2, 3]


def test_corpus_stats_by_hand(monkeypatch):
    """Of a reward model whose scores are known: what counts as label 1, and of which texts."""
    tokenizer = sampling.make_tokenizer([row.text for row in texts()], 300)
    config = CorpusConfig(max_tokens=30, max_new_tokens=6, min_new_tokens=2)
    policy = sampling.small_gpt2(corpus.GPT2LMHeadModel, tokenizer, 30, (8, 1, 2), 0)
    held = texts()[120:124]  # labels 0, 1, 0, 1
    monkeypatch.setattr(corpus, "raw_scores", lambda model, ids: torch.tensor([0.4, 0.2, -1.0, 2.0])[: len(ids)])
    judge = TextJudge.fit([row.text for row in texts()[:40]], [row.label for row in texts()[:40]])
    rewarded = np.array([-0.4, -0.6, -0.5 + 1e-9, 3.0])
    samples = SimpleNamespace(
        score=lambda by: np.array([0.9, 0.2, 0.6, 0.5]) if by is judge else rewarded,
        finish_reasons=["stop", "length", "length", "length"],
    )
    reward = SimpleNamespace(model=None, normalise=(1.0, 2.0))
    found = corpus._stats(policy, reward, judge, tokenizer, held, samples, config)
    assert found["reward_threshold"] == -0.5 and found["judge_threshold"] == 0.5
    # Of equal length, the texts keep their order: 0.4 of a 0 is wrong, 0.2 of a 1 right, and so on.
    assert found["reward_accuracy"] == 0.75
    assert found["sft_reward_positive"] == 0.75 and found["sft_judge_positive"] == 0.5 and found["sft_stopped"] == 0.25
    expected = [(p > 0.5) == row.label for p, row in zip(judge.probability([r.text for r in held]), held, strict=True)]
    assert found["judge_accuracy"] == np.mean(expected)
    assert found["reward_judge_correlation"] == pytest.approx(np.corrcoef(rewarded, [0.9, 0.2, 0.6, 0.5])[0, 1])


def test_the_corpus_judge_is_the_published_pipeline():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rows = [row.text for row in texts()[:60]]
    labels = [i % 2 for i in range(60)]
    judge = TextJudge.fit(rows, labels)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1)
    model = LogisticRegression(C=10.0, max_iter=1000).fit(vectorizer.fit_transform(rows), labels)
    probe = ["alpha beta good", "gamma delta bad epsilon"]
    assert judge.probability(probe) == pytest.approx(model.predict_proba(vectorizer.transform(probe))[:, 1])
    assert judge(["alpha beta", "gamma delta"], [" good", " bad epsilon"]) == pytest.approx(judge.probability(probe))
    many = [f"{text} shared" for text in rows * 17]
    assert len(TextJudge.fit(many, labels * 17).weight) == len(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2).fit(many).vocabulary_
    )
    rare = [*rows * 17, "hapax legomenon"]
    assert not {"hapax", "legomenon"} & set(TextJudge.fit(rare, [*labels * 17, 1]).arguments[0])


def test_translation(monkeypatch):
    config = TranslationConfig(
        seed=5, vocabulary=300, hidden=8, heads=2, layers=1, weight_decay=0.3, sft_epochs=4, sft_batch=20,
        sft_learning_rate=7e-3, label_smoothing=0.25,
    )  # fmt: skip
    tokenizer = translation.make_tokenizer(["ein Hund"], 300)
    model = translation.initial(config, tokenizer)
    fits = recorded(monkeypatch, sampling, "fit", lambda *given, **options: None)
    responses = [([5 + i] * (1 + i % 3), [6 + i, 7 + i, 0][: 2 + i % 2]) for i in range(12)]
    translation._fit(model, responses, config)
    (fit,) = fits
    loss, bundles = fit.given[3:]
    assert fit.given[1] is translation.training.fit and len(bundles) > 1
    assert fit.options == {"steps": 4 * len(bundles), "learning_rate": 7e-3, "weight_decay": 0.3, "seed": 5}
    rows = [0, 3, 8]
    terms = []
    for i in rows:  # one text at a time: no padding
        prompt, target = responses[i]
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0, *target[:-1]]])}
        log_p = model(**inputs).logits[0].log_softmax(-1)
        terms += [-(0.75 * row[token] + 0.25 * row.mean()) for row, token in zip(log_p, target, strict=True)]
    torch.testing.assert_close(loss(rows), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)


def test_translation_measures_on_validation(monkeypatch, tmp_path):
    monkeypatch.setattr(translation, "_fit", lambda *_: None)
    rows = [(f"p{i}", f"r{i}", split) for i, split in enumerate(["train", "train", "validation", "test", "test"])]
    pairs = [Example(prompt, (text, "or"), split=split) for prompt, text, split in rows]
    asked = recorded(monkeypatch, translation, "greedy", lambda model, prompts, *_, **__: [[5]] * len(prompts))
    config = TranslationConfig(vocabulary=300, hidden=8, heads=2, layers=1, prompt_tokens=2, max_new_tokens=9)
    made = translation.build(pairs, config, tmp_path)
    (call,) = asked
    assert call.given[1] == made["prompts"]["validation"] and len(call.given[1]) == 1
    assert call.options == {"max_new_tokens": 9} and made["references"]["validation"] == [["r2", "or"]]
    assert [max(map(len, made["prompts"][name])) for name in ("train", "test")] == [2, 2]  # of two tokens, so kept
    with pytest.raises(ValueError, match="no prompt of train has at most prompt_tokens=1"):
        translation.build(pairs, TranslationConfig(**{**vars(config), "prompt_tokens": 1}), tmp_path / "short")


def test_translations_settings_are_the_tasks(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(translation, "_fit", lambda *_: None)
    rows = [{"prompt": f"p {i}", "reference": f"r {i}"} for i in range(12)]
    path = byo.write_jsonl(tmp_path / "pairs.jsonl", rows)
    sizes = dict(vocabulary=300, hidden=8, heads=2, layers=1, max_new_tokens=9)
    task = load("translation", path=str(path), temperature=0.7, kl_coef=0.2, **sizes)
    assert (task.temperature, task.kl_coef, task.max_new_tokens) == (0.7, 0.2, 9)
    assert [part.column for part in (task.reward.parts[0][1], task.judge.parts[0][1])] == ["reference"] * 2
    assert [(task.reward.parts[0][0]), task.reward.parts[0][1].__name__] == [100.0, "bleu"]
    assert [(task.judge.parts[0][0]), task.judge.parts[0][1].__name__] == [100.0, "chrf"]


def test_reviews(monkeypatch, tmp_path):
    config = dict(
        seed=5, reviews=300, train_prompts=60, validation_prompts=20, test_prompts=20, max_new_tokens=5, hidden=8,
        layers=1, heads=2, sft_steps=3, sft_batch=8, sft_learning_rate=3e-3, pairs=12, held_out_pairs=6, flip=0.1,
        rm_hidden=4, rm_layers=1, rm_heads=1, rm_steps=4, rm_batch=9, rm_learning_rate=7e-4, rm_weight_decay=0.3,
        kl_coef=0.2,
    )  # fmt: skip
    fits = recorded(monkeypatch, sampling, "fit", lambda *given, **options: None)
    drawn, asked = recorded(monkeypatch, sampling, "sample"), recorded(monkeypatch, reviews_build, "annotate")
    units, measured = (
        recorded(monkeypatch, reviews_build, "in_units_of"),
        recorded(monkeypatch, reviews_build, "perplexity"),
    )
    reviews_build.build(tmp_path, **config)
    prompts, demonstrations, held = reviews_build.split(ReviewsConfig(**config), reviews_build.make_tokenizer())
    sft, rm = fits
    assert sft.given[3] == demonstrations
    assert sft.options == {"steps": 3, "batch_size": 8, "learning_rate": 3e-3, "seed": 5}
    assert rm.options == {"steps": 4, "batch_size": 9, "learning_rate": 7e-4, "weight_decay": 0.3, "seed": 5}
    compared, validation = drawn
    assert [call.given[2:] for call in drawn] == [(prompts["train"], 24), (prompts["validation"], 12)]
    for call, first in ((compared, 0), (validation, 24)):
        known = {"repeats": 2, "max_new_tokens": 5, "seed": 5, "first": first}
        assert {name: call.options[name] for name in known} == known
    made, data = json.loads((tmp_path / "task.json").read_text()), reviews_build.files
    assert (made["kl_coef"], made["max_new_tokens"]) == (0.2, 5) and data.damaged(tmp_path) is None
    assert asked[0].options == {"flip": 0.1, "seed": 5}
    assert len(units[0].given[1].prompts) == 12  # the validation prompts' samples
    assert [call.given[1] for call in measured] == [held]
    pairs, ranks = rm.given[3:5]
    assert [text[:8] for text in (pairs[0] + pairs[11])] == [prompts["train"][i] for i in (0, 0, 11, 11)]
    chosen = reviews_build.annotate(*asked[0].given, **asked[0].options)
    assert ranks.tolist() == [[0, 1] if first else [1, 0] for first in chosen]
    first, second = asked[0].given
    margin = (first - second)[first != second]
    assert made["stats"]["annotator_accuracy"] == pytest.approx(np.mean(chosen[first != second] == (margin > 0)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return byo.make(tmp_path_factory.mktemp("own"))


def test_custom(monkeypatch, folders, tmp_path):
    other = byo.llama(len(byo.byte_level_bpe()), seed=5)
    other.save_pretrained(tmp_path / "reference")
    drawn, built = recorded(monkeypatch, custom.sampling, "sample"), recorded(monkeypatch, custom, "build_reward")
    settings = {"max_new_tokens": 5, "min_new_tokens": 2, "samples": 6, "temperature": 0.6, "seed": 7, "batch_size": 3}
    task = load(
        "custom", **folders.options, **settings, reference=str(tmp_path / "reference"), reward_dtype="float64",
        judge=str(folders.root / "judge"),
    )  # fmt: skip
    (sample,) = drawn
    assert sample.given[0] is task.reference and sample.given[2:] == (task.prompts["train"], 6)
    known = {"max_new_tokens": 5, "min_new_tokens": 2, "temperature": 0.6, "seed": 7}
    assert {name: sample.options[name] for name in known} == known
    assert sample.options["eos_token_id"] == task.eos_token_ids
    assert {call.options["batch_size"] for call in built} == {3} == {task.reward.batch_size, task.judge.batch_size}
    dtypes = [model.dtype for model in (task.reference, task.reward.model, task.judge.model)]
    assert dtypes == [torch.float32, torch.float64, torch.float64]
    assert task.temperature == 0.6 and task.kl_coef == 0.05
    assert (task.stats["reward_mean"], task.stats["reward_std"]) == task.reward.normalise


def test_customs_samples_come_with_their_prompts_columns(monkeypatch, folders, tmp_path):
    splits = ["train"] * 4 + ["validation", "test"]
    rows = [{"prompt": f"the old cat {i}", "split": split, "value": i} for i, split in enumerate(splits)]
    path = byo.write_jsonl(tmp_path / "prompts.jsonl", [*rows, {**rows[1], "value": 9}])
    code = tmp_path / "mine.py"
    code.write_text(
        "def f(prompts, completions, value, **_):\n    return [1.0 * v + len(c) for c, v in zip(completions, value)]\n"
    )
    drawn = recorded(monkeypatch, custom.sampling, "sample")
    options = {"policy": folders.options["policy"], "prompts": str(path), "reward": f"standardise({code}:f)"}
    task = load("custom", **options, max_new_tokens=4, samples=5)
    assert task.columns["train"]["value"] == [0, 1, 2, 3, 9]  # equal prompts with other columns are two rows
    assert drawn[0].options["columns"] == task.columns["train"] and task.columns["test"] == {"value": [5]}


def test_samples_are_numbered_from_the_first_and_carry_their_columns():
    """Response k of a stream is a function of k alone, whatever the batch; columns are those of its prompt."""
    from tests import tiny

    model, tokenizer, prompts = tiny.gpt2(), tiny.tokenizer(), [[1], [2, 3], [4, 5, 6]]

    def draw(count, first=0, **options):
        return sampling.sample(
            model, tokenizer, prompts, count, eos_token_id=0, max_new_tokens=4, seed=3, first=first, **options
        )

    whole = draw(12, repeats=2, columns={"n": [10, 20, 30]})
    assert whole.columns == {"n": [10, 10, 20, 20, 30, 30] * 2}
    assert draw(12, repeats=2, batch_size=5).completion_ids == whole.completion_ids
    assert len({tuple(ids) for ids in whole.completion_ids}) > 8
    later = draw(6, first=6, repeats=2)
    assert later.completion_ids == whole.completion_ids[6:]
    numbers = sampling.rng.uniform(3, sampling.rng.TOKEN, 2**40 + np.arange(12)[:, None], np.arange(4))
    index = [i // 2 % 3 for i in range(12)]
    for i in (0, 3, 11):
        response, _ = sampling.generate(
            model, torch.tensor([prompts[index[i]]]), torch.as_tensor(numbers[i : i + 1]), 0, max_new_tokens=4
        )
        assert response[response >= 0].tolist() == whole.completion_ids[i]
