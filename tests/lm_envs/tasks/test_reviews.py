"""Reviews-v0: its shipped files give the committed numbers, a damaged one is refused, and what the annotators do."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lm_envs import files, tasks
from lm_envs.benchmarks.cli import main
from lm_envs.reward.base import call_reward
from lm_envs.reward.learned import LearnedReward
from lm_envs.tasks import reviews, sampling
from lm_envs.tasks.reviews import FOLDER, GoldReview, annotate, ranking_accuracy
from lm_envs.tasks.reviews_grammar import corpus
from tests.house import CHECKOUT, python

VALUES = json.loads((CHECKOUT / "tests/lm_envs/tasks/reviews_values.json").read_text())
TOLERANCE = 1e-4  # float32 on any processor


@pytest.fixture(scope="module")
def task():
    return tasks.load("reviews")


@pytest.fixture
def damaged(tmp_path):
    """A copy of the shipped folder, to be damaged."""
    return shutil.copytree(FOLDER, tmp_path / "copy")


# --- the shipped files ----------------------------------------------------------------------------------------------


def test_the_files_are_those_that_numbers_were_published_for():
    """A change to any of them is a new version of the env, not an edit."""
    manifest = json.loads((FOLDER / files.MANIFEST).read_text())
    listed = json.dumps({name: facts["sha256"] for name, facts in manifest["files"].items()}, sort_keys=True)
    assert hashlib.sha256(listed.encode()).hexdigest() == VALUES["files"]
    found = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert found == {*manifest["files"], files.MANIFEST} and files.damaged(FOLDER) is None
    assert {path.rsplit(".")[-1] for path in found} == {"json", "safetensors"}  # no pickle
    assert sum(facts["bytes"] for facts in manifest["files"].values()) < 4e6
    assert set(manifest["made_from"]) == {"config", "versions", "machine", "threads", "date"}


def measured(task, row):
    """Log-probabilities per token, proxy and gold of a text, by transformers alone where a model is involved."""
    prompt, response = (task.tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
    response = [*response, task.eos_token_id] if row["finish_reason"] == "stop" else response
    with torch.no_grad():
        logits = task.reference(torch.tensor([[*prompt, *response]])).logits[0]
    logprobs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
    given = [row["prompt"]], [row["completion"]], [row["finish_reason"]]
    return {"logprobs": logprobs.tolist(), "proxy": task.reward(*given)[0], "gold": task.judge(*given)[0]}


def same(task):
    return [
        all(found[name] == pytest.approx(row[name], abs=TOLERANCE) for name in ("logprobs", "proxy", "gold"))
        for row in VALUES["texts"]
        for found in [measured(task, row)]
    ]


def test_log_probabilities_and_scores_are_the_committed_ones(task):
    assert len(VALUES["texts"]) == 10 and all(same(task))


@pytest.mark.parametrize("what", ["reference", "reward", "normalise"])
def test_one_changed_number_changes_them(task, what):
    changed = copy.deepcopy(task)
    with torch.no_grad():
        if what == "reference":
            changed.reference.transformer.h[1].mlp.c_fc.weight[3, 5] += 0.1
        elif what == "reward":
            changed.reward.model.score.weight[0, 5] += 0.01
        else:
            changed.reward.normalise = (changed.reward.normalise[0] + 1e-3, changed.reward.normalise[1])
    assert not all(same(changed)) and all(same(task))


def test_greedy_and_sampled_texts_are_the_committed_ones(task):
    """Sampling is by counted uniforms: only a number within rounding of an edge could change a token."""
    told = [row for row in VALUES["texts"] if row["kind"] == "sampled"]
    samples = sampling.sample(
        task.reference,
        task.tokenizer,
        task.prompts["test"],
        len(told),
        eos_token_id=task.eos_token_id,
        max_new_tokens=task.max_new_tokens,
        seed=0,
    )
    assert samples.prompts == [row["prompt"] for row in told]
    assert samples.completions == [row["completion"] for row in told]
    for row in VALUES["texts"]:
        if row["kind"] == "greedy":
            ids = torch.tensor([task.tokenizer(row["prompt"])["input_ids"]])
            for _ in range(task.max_new_tokens):
                ids = torch.cat([ids, task.reference(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
                if ids[0, -1] == task.eos_token_id:
                    break
            text = task.tokenizer.decode(ids[0], skip_special_tokens=True)
            assert text == row["prompt"] + row["completion"]


def test_the_data_is_whole(task):
    sizes = {name: len(prompts) for name, prompts in task.prompts.items()}
    assert sizes == {"train": 4096, "validation": 256, "test": 512}
    assert {len(prompt) for prompts in task.prompts.values() for prompt in prompts} == {8} == {task.prompt_length}
    assert (len(task.demonstrations), len(task.pairs)) == (VALUES["demonstrations"], 8192)
    openings = {name: {tuple(prompt) for prompt in prompts} for name, prompts in task.prompts.items()}
    assert len(set().union(*openings.values())) == 4096 + 256 + 512  # an opening belongs to one split
    trained = {tuple(text[:8]) for text in task.demonstrations}
    assert openings["train"] <= trained and not trained & (openings["validation"] | openings["test"])
    assert all(text[-1] == task.eos_token_id and task.eos_token_id not in text[:-1] for text in task.demonstrations)
    for _, *responses in task.pairs:
        for response in responses:
            assert response[-1] == task.eos_token_id or len(response) == task.max_new_tokens
            assert task.eos_token_id not in response[:-1]
    assert [row for row, _, _ in task.pairs] == list(range(len(task.prompts["train"]))) * 2


def test_the_demonstrations_are_the_grammars(task):
    """Reviews 3,000 to 3,029 of seed 0, but for those that begin like a held-out prompt."""
    held = {tuple(prompt) for name in ("validation", "test") for prompt in task.prompts[name]}
    ids = {word.strip(): number for word, number in task.tokenizer.get_vocab().items()}
    rows = [[ids[word] for word in words] for words in corpus(0, 30, first=3000)]
    kept = [row for row in rows if tuple(row[:8]) not in held]
    first = task.demonstrations.index(kept[0])
    assert len(kept) > 25 and task.demonstrations[first : first + len(kept)] == kept


def test_the_task_is_ready_for_use(task):
    assert task.reference.config.vocab_size == len(task.tokenizer) and not task.reference.training
    assert not any(parameter.requires_grad for parameter in task.reference.parameters())
    assert task.reference.dtype == torch.float32 and task.reference.config.pad_token_id == task.eos_token_id
    assert sum(parameter.numel() for parameter in task.reference.parameters()) == 625_664
    assert isinstance(task.reward, LearnedReward) and isinstance(task.judge, GoldReview)
    assert (task.max_new_tokens, task.kl_coef) == (24, 0.1)


def test_the_folders_are_ordinary_pretrained_folders(task):
    policy = AutoModelForCausalLM.from_pretrained(FOLDER / "policy")
    for name, parameter in task.reference.state_dict().items():
        assert torch.equal(policy.state_dict()[name], parameter)
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER / "reward_model")
    assert torch.equal(model.score.weight, task.reward.model.score.weight)
    for folder in ("policy", "reward_model"):
        tokenizer = AutoTokenizer.from_pretrained(FOLDER / folder)
        assert tokenizer(" the film is great .")["input_ids"] == task.tokenizer(" the film is great .")["input_ids"]


def test_it_is_a_proxy_of_gold_on_new_samples(task):
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
    assert gold.mean() == pytest.approx(task.stats["sft_gold"], abs=0.1)
    assert abs(proxy.mean()) < 0.2 and proxy.std() == pytest.approx(1, abs=0.15)
    assert 0.45 < np.corrcoef(gold, proxy)[0, 1] < 0.8  # it knows something of gold, and far from all


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loading_takes_no_training_no_cache_and_under_two_seconds(tmp_path):
    """Seconds of the processor, beyond importing the libraries, so that a busy machine does not matter."""
    code = (
        "import time, torch, gymnasium\n"
        "from transformers import GPT2LMHeadModel, GPT2ForSequenceClassification, AutoModelForSequenceClassification\n"
        "torch.set_num_threads(1); before = torch.random.get_rng_state(); start = time.process_time()\n"
        "import lm_envs\n"
        "env = gymnasium.make('lm_envs/Reviews-v0')\n"
        "assert torch.equal(torch.random.get_rng_state(), before)\n"
        "print(time.process_time() - start)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
        assert float(python("-c", code, cwd=CHECKOUT)) < 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name", ["policy/model.safetensors", "reward_model/model.safetensors", "data.safetensors", "task.json"]
)
@pytest.mark.parametrize("how", ["flip", "remove"])
def test_a_damaged_file_is_one_clear_line(damaged, name, how):
    path = damaged / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # a number that still reads as one
    path.unlink() if how == "remove" else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^reviews: .*{name} is missing or damaged; build it again") as found:
        reviews.load(damaged)
    assert "\n" not in str(found.value)


def test_a_damaged_package_and_a_folder_of_something_else(damaged, tmp_path, monkeypatch, capsys):
    (damaged / "task.json").unlink()
    monkeypatch.setattr(reviews, "FOLDER", damaged)
    with pytest.raises(ValueError, match="task.json is missing or damaged; install lm-envs again"):
        reviews.load(damaged)
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f'tasks = ["reviews"]\nalgorithms = ["sft"]\nseeds = [0]\n[task.reviews]\noptions = {{path = "{tmp_path}"}}\n'
    )
    with pytest.raises(SystemExit):
        main(["compare", "--suite", str(suite), "--out", str(tmp_path / "out")])
    assert "manifest.json is missing or damaged; build it again" in " ".join(capsys.readouterr().err.split())


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"reviews has no option 'flip', because .* build reviews --out DIR --set"):
        tasks.load("reviews", flip=0.4)


def test_unknown_task_names_the_near_ones():
    with pytest.raises(ValueError, match="no task 'review': did you mean 'reviews'"):
        tasks.load("review")
    with pytest.raises(ValueError, match="no task 'qqq': there are .*reviews"):
        tasks.load("qqq")


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
