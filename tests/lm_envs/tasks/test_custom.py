"""A task of one's own parts: what is loaded, that it trains, and that what does not fit is refused in one line."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    BertForSequenceClassification,
)

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.loading import load_policy, load_tokenizer
from lm_envs.reward.learned import load_reward_model
from lm_envs.tasks import load
from lm_envs.tasks.custom import read_prompts
from tests.lm_envs import byo

QUICK = {"max_new_tokens": 6, "samples": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> byo.Folders:
    return byo.make(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def task(folders):
    return load("custom", **folders.options, **QUICK, judge=str(folders.root / "judge"), kl_coef=0.2, min_new_tokens=2)


def refused(folders: byo.Folders, **changes) -> str:
    """The message with which these parts are refused; it is one line."""
    with pytest.raises(ValueError) as caught:
        load("custom", **{**folders.options, **QUICK, **changes})
    message = str(caught.value)
    assert "\n" not in message
    return message


def altered(folders: byo.Folders, name: str, tmp_path: Path) -> Path:
    """A copy of one of the folders, to break."""
    return Path(shutil.copytree(folders.root / name, tmp_path / name))


# What is loaded


def test_the_parts_are_the_users(task, folders):
    reference = load_policy(folders.root / "policy")
    assert task.reference.config.model_type == "llama" and task.reference.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(task.reference.parameters(), reference.parameters(), strict=True))
    assert not any(p.requires_grad for p in task.reference.parameters())
    assert task.start is task.reference
    assert (task.max_new_tokens, task.min_new_tokens, task.kl_coef) == (6, 2, 0.2)
    assert task.eos_token_id == task.tokenizer.eos_token_id == 1
    assert task.reward.model.config.model_type == "bert" and task.judge.model.config.model_type == "gpt2"
    assert type(task.reward.tokenizer) is not type(task.tokenizer)


def test_prompts_keep_the_tokenizers_bos_and_fall_into_three_splits(task):
    assert {name: len(prompts) for name, prompts in task.prompts.items()} == {"train": 10, "validation": 1, "test": 1}
    texts = [task.tokenizer.decode(ids) for prompts in task.prompts.values() for ids in prompts]
    assert sorted(texts) == sorted("<s>" + text[:-2] for text in byo.TEXTS)


def test_the_reward_reads_text_with_its_own_tokenizer(task, folders):
    """By hand: word pieces of prompt + completion, the stock forward, the units of the reference's samples."""
    model = BertForSequenceClassification.from_pretrained(folders.root / "reward_model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders.root / "reward_model")
    prompts, completions = ["the old cat", "the grey cat"], [" ate a fish .", " hid"]
    expected = [
        model(**tokenizer(p + c, return_tensors="pt")).logits.item() for p, c in zip(prompts, completions, strict=True)
    ]
    mean, std = task.stats["reward_mean"], task.stats["reward_std"]
    np.testing.assert_allclose(
        task.reward(prompts, completions), [(x - mean) / std for x in expected], rtol=1e-4, atol=1e-5
    )


def test_the_reward_is_in_units_of_the_references_samples(folders):
    task = load("custom", **folders.options, max_new_tokens=6, samples=64)
    env = TextVectorEnv(task, num_envs=64)
    traj = rollout(env, LMPolicy.for_mdp(env.mdp, task.reference), episodes=256, seed=3)
    assert abs(float(traj.score.mean())) < 0.4 and 0.6 < float(traj.score.std()) < 1.6
    plain = load("custom", **folders.options, max_new_tokens=6, normalise=False)
    assert plain.reward.normalise == (0.0, 1.0) and plain.stats == {}


def test_it_steps_and_rolls_out_alike_and_ppo_trains_it(task):
    env = TextVectorEnv(task, num_envs=4, group_size=2)
    model = copy.deepcopy(task.start).requires_grad_(True)
    policy = LMPolicy.for_mdp(env.mdp, model)
    stepped = collect(env, policy, episodes=8, seed=1)
    bulk = rollout(env, policy, episodes=8, seed=1)
    assert torch.equal(stepped.response, bulk.response)
    torch.testing.assert_close(stepped.reward, bulk.reward, atol=1e-4, rtol=1e-4)
    agent = PPO(policy, PPOConfig(episodes=8, group_size=2, iterations=2, epochs=1, minibatches=1, learning_rate=1e-2))
    before = [p.clone() for p in task.reference.parameters()]
    traj, metrics = agent.iteration(env)
    torch.testing.assert_close(traj.logprob, traj.ref_logprob, atol=1e-5, rtol=1e-5)  # KL is 0 at the start
    assert np.isfinite(list(metrics.values())).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, task.reference.parameters(), strict=True))


def test_a_reference_of_its_own(folders, tmp_path):
    other = byo.llama(len(byo.byte_level_bpe()), seed=5)
    other.save_pretrained(tmp_path / "reference")
    task = load("custom", **folders.options, **QUICK, reference=str(tmp_path / "reference"))
    assert torch.equal(task.reference.lm_head.weight, other.lm_head.weight)
    assert torch.equal(task.start.lm_head.weight, load_policy(folders.root / "policy").lm_head.weight)
    assert not any(p.requires_grad for p in task.start.parameters())


def test_split_column(folders, tmp_path):
    rows = [{"prompt": f"p {i}", "split": split} for i, split in enumerate(["train", "dev", "test", "train"])]
    prompts = read_prompts(byo.write_jsonl(tmp_path / "p.jsonl", [*rows, {"prompt": "p 0", "split": "test"}]))
    assert [(p.prompt, p.split) for p in prompts] == [
        ("p 0", "test"),  # also among the training rows, so it is held out
        ("p 1", "validation"),
        ("p 2", "test"),
        ("p 3", "train"),
    ]


# What is refused


def test_prompt_longer_than_the_context(folders, tmp_path):
    path = byo.write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": "a cat"}, {"prompt": "a fish"}, {"prompt": "x" * 60}, {"prompt": "b"}]
    )
    message = refused(folders, prompts=str(path))
    assert f"{path}, line 3" in message and "61 tokens" in message and str(byo.CONTEXT) in message
    message = refused(folders, max_new_tokens=byo.CONTEXT)
    assert "line 1" in message and f"responses up to {byo.CONTEXT}" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": 3}', "'prompt' must be a string, not 3"),
        ('{"text": "a"}', "there is no 'prompt' here"),
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "expected a JSON object"),
        ('{"prompt": "a", "split": "holdout"}', "unlike before"),
        ("\udce9", "not UTF-8"),
    ],
)
def test_bad_rows_name_file_and_line(folders, tmp_path, line, expected):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line.encode("utf-8", "surrogateescape") + b'\n{"prompt": "b"}\n')
    message = refused(folders, prompts=str(path))
    assert f"{path}, line 3" in message and expected in message


def test_bad_rows_are_passed_over_where_that_is_asked_for(folders, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"a cat {i}", "number": i} for i in range(20)]
    byo.write_jsonl(path, [*rows[:10], {"prompt": " "}, {"prompt": "x" * 60, "number": -1}, *rows[10:]])
    path.write_text(path.read_text() + '{"prompt": "cut\n')
    with pytest.warns(
        UserWarning, match=r"3 bad rows were passed over \(line 11: the prompt is empty; line 23: not JSON"
    ):
        found = load("custom", **{**folders.options, **QUICK, "prompts": str(path)}, bad="skip")
    assert "line 11" in refused(folders, prompts=str(path))
    assert "bad must be" in refused(folders, bad="ignore")
    assert found.stats["bad_prompts"] == 3 and "bad_prompts" not in load("custom", **folders.options, **QUICK).stats
    texts = [text for ids in found.prompts.values() for text in found.tokenizer.batch_decode(ids)]
    assert sorted(texts) == sorted(f"<s>a cat {i}" for i in range(20))
    numbers = [number for columns in found.columns.values() for number in columns["number"]]
    assert [f"<s>a cat {number}" for number in numbers] == texts
    only = byo.write_jsonl(
        tmp_path / "only.jsonl",
        [
            {"prompt": "x" * 60, "split": "test"},
            *({"prompt": p, "split": s} for p, s in (("a", "train"), ("b", "validation"))),
        ],
    )
    message = refused(folders, prompts=str(only), bad="skip")
    assert "no prompt is left for test; 1 bad row was passed over (line 1: the prompt has 61 tokens" in message


def test_unknown_split_and_too_few_prompts(folders, tmp_path):
    path = byo.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "split": "holdout"}])
    assert "'split' must be one of train" in refused(folders, prompts=str(path))
    path = byo.write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a"}, {"prompt": "a"}])
    assert "leave none for" in refused(folders, prompts=str(path))
    with pytest.raises(FileNotFoundError):
        load("custom", **{**folders.options, "prompts": str(tmp_path / "none.jsonl")})


def test_missing_parts_and_options(folders, tmp_path):
    assert "missing: reward_model, prompts" in _message(lambda: load("custom", policy=folders.options["policy"]))
    assert "did you mean 'kl_coef'" in refused(folders, kl_coeff=0.1)
    assert "max_new_tokens must be at least 1" in refused(folders, max_new_tokens=0)
    assert "min_new_tokens=7 must be at most max_new_tokens=" in refused(folders, min_new_tokens=7)
    for name in ("policy", "reward_model"):
        assert "there is no such folder" in refused(folders, **{name: str(tmp_path / "nowhere")})
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(folders, policy=str(tmp_path / "empty"))


def test_policy_and_reference_of_different_vocabularies(folders, tmp_path):
    byo.llama(len(byo.byte_level_bpe()) + 8).save_pretrained(tmp_path / "reference")
    message = refused(folders, reference=str(tmp_path / "reference"))
    assert "one vocabulary" in message and str(tmp_path / "reference") in message


def test_a_reference_of_another_vocabulary_of_equal_size(folders, tmp_path):
    """It comes with a tokenizer whose words have other ids; other names of special tokens are no difference."""
    text = (folders.root / "policy" / "tokenizer.json").read_text()
    swapped = text.replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":')
    for name, content in (("same", text), ("swapped", swapped), ("renamed", text.replace("</s>", "<|end|>"))):
        folder = Path(shutil.copytree(folders.root / "policy", tmp_path / name))
        (folder / "tokenizer.json").write_text(content)
        if name == "renamed":
            config = folder / "tokenizer_config.json"
            config.write_text(config.read_text().replace("</s>", "<|end|>"))
        if name == "swapped":
            message = refused(folders, reference=str(folder))
            assert "have different vocabularies: token 66 is 'a' and 'b'" in message and str(folder) in message
        else:
            assert load("custom", **folders.options, **QUICK, reference=str(folder)).reference is not None


def test_tokenizer_larger_than_the_model(folders, tmp_path):
    folder = altered(folders, "policy", tmp_path)
    byo.llama(200).save_pretrained(folder)
    assert "resize_token_embeddings" in refused(folders, policy=str(folder))
    folder = altered(folders, "reward_model", tmp_path)
    byo.bert(20).save_pretrained(folder)
    assert "resize_token_embeddings" in refused(folders, reward_model=str(folder))


def test_tokenizer_without_eos_and_no_tokenizer(folders, tmp_path):
    folder = altered(folders, "policy", tmp_path)
    byo.byte_level_bpe(eos=None).save_pretrained(folder)
    assert "no EOS" in refused(folders, policy=str(folder))
    for name in ("policy", "reward_model"):
        folder = tmp_path / f"bare_{name}"
        shutil.copytree(folders.root / name, folder, ignore=shutil.ignore_patterns("*token*", "*vocab*"))
        assert "holds no tokenizer" in refused(folders, **{name: str(folder)})


def test_wrong_heads(folders, tmp_path):
    options = folders.options
    message = refused(folders, reward_model=options["policy"])
    assert "LlamaForCausalLM" in message and "expected a sequence-classification model" in message
    assert "expected a causal language model" in refused(folders, policy=str(folders.root / "judge"))
    folder = altered(folders, "reward_model", tmp_path)
    byo.bert(len(AutoTokenizer.from_pretrained(folder)), labels=3).save_pretrained(folder)
    assert "3 labels" in refused(folders, reward_model=str(folder))
    assert "judge" in refused(folders, judge=options["policy"])


def test_a_folder_without_the_heads_weights(folders, tmp_path):
    """A config that promises a classifier over a trunk's weights: transformers would make up the head."""
    folder = altered(folders, "reward_model", tmp_path)
    config = (folder / "config.json").read_text()
    load_reward_model(folder).model.bert.save_pretrained(folder)
    (folder / "config.json").write_text(config)
    assert "its weights lack classifier.bias" in refused(folders, reward_model=str(folder))


def test_damaged_weights_and_pickles(folders, tmp_path):
    folder = altered(folders, "policy", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be read" in refused(folders, policy=str(folder))
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "safetensors" in refused(folders, policy=str(folder))


def test_a_reward_that_cannot_tell_samples_apart(folders, tmp_path):
    folder = altered(folders, "reward_model", tmp_path)
    reward = load_reward_model(folder)
    with torch.no_grad():
        reward.model.classifier.weight.zero_()
    reward.model.save_pretrained(folder)
    assert "nothing to learn" in refused(folders, reward_model=str(folder))


def test_hub_names_go_through_the_same_code(monkeypatch):
    """Without a network a name that is no folder is refused in one line too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (load_policy, load_tokenizer, load_reward_model):
        message = _message(lambda read=read: read("some-owner/no-such-model"))
        assert "some-owner/no-such-model" in message and "\n" not in message


def test_a_name_in_a_folder_that_is_there_is_no_hub_name(monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for read in (load_policy, load_tokenizer, load_reward_model):
        assert "there is no such folder" in _message(lambda read=read: read("runs/nope"))


def _message(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_an_encoder_decoder_of_ones_own(folders, tmp_path):
    """It comes with its encoder, whose texts keep their EOS; saved without the decoder's head it is refused."""
    tokenizer = byo.byte_level_bpe()
    wrap = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = wrap
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=byo.CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        decoder_start_token_id=1,
    )
    for name, kind in (("policy", BartForConditionalGeneration), ("trunk", BartModel)):
        kind(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    made = load("custom", **{**folders.options, **QUICK, "policy": str(tmp_path / "policy")})
    assert isinstance(made.reference, BartForConditionalGeneration)
    assert all(prompt[0] == 0 and prompt[-1] == 1 for prompt in made.prompts["train"])
    traj = rollout(TextVectorEnv(made), LMPolicy.for_mdp(TextVectorEnv(made).mdp, made.reference), episodes=4)
    torch.testing.assert_close(traj.logprob, traj.ref_logprob)
    assert "saved from BartModel" in refused(folders, policy=str(tmp_path / "trunk"))


def test_a_task_with_few_test_prompts_says_so(folders, tmp_path):
    with pytest.warns(UserWarning, match=r"prompts.jsonl: 1 test prompt \(10 train, 1 validation, 1 test\): too few"):
        task = load("custom", **folders.options, **QUICK, seed=77)
    assert [len(task.prompts[name]) for name in ("train", "validation", "test")] == [10, 1, 1]
    rows = [{"prompt": f"cat {i}", "split": "test" if i < 100 else "train"} for i in range(102)]
    path = byo.write_jsonl(tmp_path / "enough.jsonl", [*rows, {"prompt": "the", "split": "validation"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("custom", **folders.options | QUICK | {"prompts": str(path)})
