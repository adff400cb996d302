"""The translation task: reading pairs, BLEU against references, how it is made, and that algorithms learn on it."""

import json

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lm_envs.algos.engine.demonstrations import demonstrations_of
from lm_envs.algos.policies.adaptation import adapted
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.measure import samples
from lm_envs.benchmarks.measure.samples import evaluation_env, measure_greedy
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.decoding import greedy
from lm_envs.model.kv_cache_cross import rows_of
from lm_envs.reward.base import call_reward
from lm_envs.tasks import load
from lm_envs.tasks.translation import (
    CorpusBLEU,
    TranslationConfig,
    _bleu,
    build,
    initial,
    make_tokenizer,
    read_parallel,
)

WORDS = {"one": "eins", "two": "zwei", "red": "rot", "blue": "blau", "dog": "Hund", "cat": "Katze", "sees": "sieht"}
SMALL = dict(vocabulary=300, hidden=32, layers=1, heads=2, sft_epochs=8, sft_batch=128, prompt_tokens=24)
SMALL |= dict(max_new_tokens=24, sft_learning_rate=1e-2)


def sentences(count):
    """A language whose translation is word by word, in the opposite order."""
    generator = np.random.default_rng(0)
    rows = {tuple(generator.choice(list(WORDS), size=generator.integers(2, 5))) for _ in range(count)}
    return [(" ".join(row), " ".join(WORDS[word] for word in reversed(row))) for row in sorted(rows)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    splits = ["train", "test", "train", "train", "test", "validation", "train", "test"] * 80
    rows = zip(sentences(640), splits, strict=False)
    file.write_text("".join(json.dumps({"prompt": a, "reference": b, "split": c}) + "\n" for (a, b), c in rows))
    return file


@pytest.fixture(scope="module")
def task(path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_ENVS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield load("translation", path=str(path), **SMALL)


# Pairs


def write(tmp_path, *rows):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_prompt_that_comes_again_has_several_references(tmp_path):
    rows = [{"prompt": f"text {i}", "reference": f"Text {i}"} for i in range(9)]
    more = [{"prompt": "text  3 ", "reference": ["Text 3", "der Text 3"]}]
    pairs = {pair.prompt: pair for pair in read_parallel(write(tmp_path, *rows, *more))}
    assert len(pairs) == 9 and pairs["text 3"].completions == ("Text 3", "der Text 3")
    assert {pair.split for pair in pairs.values()} == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reference": "b"}, "line 2: there is no 'prompt' here"),
        ({"prompt": "a"}, "line 2: there is no 'reference' here"),
        ({"prompt": "a", "reference": ["b", 3]}, "line 2: 'reference' must be a string, not 3"),
        ({"prompt": "a", "reference": "  "}, "line 2: 'reference' is empty"),
        ({"prompt": "a", "reference": "b", "split": "test"}, "line 2: a 'split' here"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_parallel(write(tmp_path, {"prompt": "x", "reference": "y"}, row))


def test_too_few_pairs(tmp_path):
    with pytest.raises(ValueError, match="1 different texts leave none for train"):
        read_parallel(write(tmp_path, {"prompt": "x", "reference": "y"}))


# Rewards and figures

REFERENCES = [["der Hund sieht die Katze"], ["zwei rote Hunde", "zwei Hunde , rot"], ["ein Text"]]
OURS = ["der Hund sieht die Katze", "zwei Hunde rot", "der Text"]
THEIRS = ["der Hund sah eine Katze", "drei rote Hunde", "ein Text"]


def test_the_reward_is_sentence_bleu_against_the_prompts_own_references(task, path):
    """Out of 100, and the judge chrF; every split's references stand beside its prompts."""
    known = {pair.prompt: list(pair.completions) for pair in read_parallel(path)}
    for split, prompts in task.prompts.items():
        names = task.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        assert task.columns[split] == {"reference": [known[name] for name in names]}
    prompts = task.prompts["test"][:3]
    references = task.columns["test"]["reference"][:3]
    texts = [references[0][0], "Hund rot", references[2][0] + " eins"]
    given = (task.tokenizer.batch_decode(prompts), texts, [[1]] * 3, ["stop"] * 3)
    for reward, metric in ((task.reward, BLEU(effective_order=True)), (task.judge, CHRF())):
        expected = [metric.sentence_score(text, row).score for text, row in zip(texts, references, strict=True)]
        assert call_reward(reward, *given, reference=references).tolist() == pytest.approx(expected)
        assert expected[0] == pytest.approx(100) and 0 < expected[2] < 100


def test_the_gain_and_its_error_are_those_of_resampled_test_sets():
    """The counts of sentences add up to sacreBLEU's corpus score, so resampling them is resampling sentences."""
    metric = CorpusBLEU()
    references, ours, theirs = REFERENCES * 5, OURS * 5, THEIRS * 5
    gain, error = metric.gain(ours, theirs, references, samples=200, seed=3)
    assert gain == pytest.approx(metric.corpus(ours, references) - metric.corpus(theirs, references))
    assert _bleu(metric._counts(ours, references).sum(axis=0)) == pytest.approx(metric.corpus(ours, references))
    generator, gains = np.random.default_rng(3), []
    for _ in range(200):
        rows = generator.integers(15, size=15)
        drawn = [[texts[i] for i in rows] for texts in (references, ours, theirs)]
        gains.append(metric.corpus(drawn[1], drawn[0]) - metric.corpus(drawn[2], drawn[0]))
    assert error == pytest.approx(np.std(gains, ddof=1)) and error > 0
    assert metric.gain(ours, ours, references) == (0.0, 0.0)


def test_texts_begin_without_a_space():
    tokenizer = make_tokenizer(["ein roter Hund", "zwei Katzen"], 300)
    for text in ("ein roter Hund", "zwei Bären , nah"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


# The task


def test_it_is_made_once_and_holds_its_parts(task, path, monkeypatch):
    monkeypatch.setattr("lm_envs.tasks.translation.build", lambda *_: pytest.fail("made again"))
    from lm_envs.tasks.translation import load as again

    other = again(path, **SMALL)
    assert other.prompts == task.prompts and other.stats == task.stats
    assert all(
        torch.equal(a, b) for a, b in zip(other.reference.parameters(), task.reference.parameters(), strict=True)
    )
    assert not (set(map(tuple, task.prompts["train"])) & set(map(tuple, task.prompts["test"])))
    assert len(task.responses) == len(task.prompts["train"])
    assert all(response[-1] == task.eos_token_id for _, response in task.responses)


def test_references_without_room_for_their_end_are_left_out_of_training(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_envs.tasks.translation._fit", lambda *_: None)
    splits = ["train", "train", "validation", "test"]
    rows = zip(("one", "two", "dog", "cat"), ("zz", "zzzz", "z", "z"), splits, strict=True)
    file = write(tmp_path, *({"prompt": a, "reference": b, "split": c} for a, b, c in rows))
    sizes = {**SMALL, "vocabulary": 257}  # bytes alone: " zzzz" is five tokens
    responses = [
        build(read_parallel(file), TranslationConfig(**{**sizes, "max_new_tokens": most}), tmp_path / str(most))[
            "responses"
        ]
        for most in (5, 6)
    ]
    assert [[len(response) for _, response in found] for found in responses] == [[4], [4, 6]]


def test_maximum_likelihood_learned_something(task):
    fresh = initial(TranslationConfig(**SMALL), task.tokenizer)
    references = task.columns["test"]["reference"]
    figures = []
    for model in (fresh, task.reference):
        found = greedy(model, task.prompts["test"], task.eos_token_id, max_new_tokens=24)
        texts = task.tokenizer.batch_decode(found, skip_special_tokens=True)
        figures.append(task.corpus_metric.corpus(texts, references))
    assert figures[0] < 1 and figures[1] > 5


def test_demonstrations_are_the_pairs_whatever_the_prompts_length(task):
    data = demonstrations_of(task)
    assert len(data) == len(task.responses) and data.prompt.shape[1] == task.prompt_length
    for row in (0, len(data) - 1):
        prompt, response = task.responses[row]
        assert data.prompt[row][data.prompt[row] >= 0].tolist() == prompt
        assert data.response[row][data.response[row] >= 0].tolist() == response


def test_greedy_is_what_transformers_generates_from_what_is_saved(task, tmp_path):
    task.reference.save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompts = task.prompts["test"][:8]
    ours = task.tokenizer.batch_decode(
        greedy(task.reference, prompts, task.eos_token_id, max_new_tokens=24), skip_special_tokens=True
    )
    inputs = tokenizer(task.tokenizer.batch_decode(prompts), return_tensors="pt", padding=True)
    theirs = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=24, do_sample=False
    )
    assert tokenizer.batch_decode(theirs, skip_special_tokens=True) == ours


@pytest.mark.slow
def test_reinforce_with_the_references_likelihood_raises_bleu_on_test_prompts(task):
    env, test = TextVectorEnv(task, group_size=4), evaluation_env(task, "test")
    policy = LMPolicy.for_mdp(env.mdp, adapted(task.reference))
    before = samples.sample_policy(test, policy, None, 0)
    assert np.isnan(before.corpus)  # the task has a metric, of greedy responses
    settings = dict(iterations=20, episodes=64, alpha=1.0, demonstrations=16, learning_rate=2e-3, group_size=4)
    agent = make_agent("reinforce", policy, task, **settings)
    for _ in range(20):
        assert agent.iteration(env)[1]["demonstration_nll"] > 0
    after = samples.sample_policy(test, policy, None, 0)
    gains = after.proxy - before.proxy
    assert gains.mean() > 2 * samples.standard_error(gains)
    found = measure_greedy(test.mdp, policy, None)
    still = measure_greedy(test.mdp, LMPolicy.for_mdp(env.mdp, task.reference), None)
    assert (
        still["corpus_greedy"] + found["corpus_gain"] == pytest.approx(found["corpus_greedy"])
        and still["corpus_gain"] == 0
    )
    assert found["corpus_gain_se"] > 0 and len(found["greedy"]) == 8


@pytest.mark.slow
def test_the_command(path, tmp_path, monkeypatch, capsys):
    """Compare makes the task, trains on it, reports BLEU, and saves a model that transformers loads."""
    out = tmp_path / "out"
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
    suite = tmp_path / "suite.toml"
    options = ", ".join(f"{name} = {value}" for name, value in {**SMALL, "sft_epochs": 1}.items())
    suite.write_text(f"""
        name = "quick"
        tasks = ["translation"]
        algorithms = ["sft", "best-of-2", "reinforce"]
        budget = {{ iterations = 2 }}
        evaluation = {{ test_prompts = 8, validation_prompts = 4 }}
        [task.translation]
        options = {{ {options} }}
        [algorithm.reinforce]
        episodes = 8
        alpha = 1.0
        """)
    main(f"compare --suite {suite} --parallel {path} --out {out}".split())
    lines = (out / "results.csv").read_text().splitlines()
    assert lines[0].endswith("corpus_greedy,corpus_gain,corpus_gain_se")
    cells = {line.split(",")[1]: line.split(",")[-3:] for line in lines[1:]}
    assert cells["sft"][1:] == ["0", "0"] and cells["best-of-2"] == ["", "", ""] and float(cells["reinforce"][0]) >= 0
    assert "greedy" in capsys.readouterr().out
    saved = next(out.glob("translation/reinforce/seed-0/model"))
    assert AutoModelForSeq2SeqLM.from_pretrained(saved).config.model_type == "bart"


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give path=FILE.jsonl"):
        load("translation")
    with pytest.raises(ValueError, match="did you mean 'hidden'"):
        load("translation", path="x", hiden=3)
    for changes, message in (
        (dict(architecture="lstm"), "'bart' or 't5'"),
        (dict(hidden=30), "multiple of heads"),
        (dict(sft_epochs=0), "sft_epochs must be at least 1"),
        (dict(vocabulary=100), "at least 257"),
        (dict(label_smoothing=1.0), "label_smoothing"),
    ):
        with pytest.raises(ValueError, match=message):
            TranslationConfig(**changes)


def test_a_t5_instead():
    model = initial(TranslationConfig(architecture="t5", **SMALL), make_tokenizer(["ein Hund"], 300))
    assert model.config.model_type == "t5" and model.config.decoder_start_token_id == 0
    assert rows_of(model) is not None
