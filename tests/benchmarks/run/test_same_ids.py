"""Law: what `train` feeds a model is what `sft`, `dpo` and `reward-model` trained it on, token by token."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from lm_envs.benchmarks.run.data_problem import DataProblem, DataSpec
from lm_envs.data.packed import PackedExamples
from lm_envs.env.mdp import TextMDP
from lm_envs.env.vector import cut_after_eos
from lm_envs.model.tokens import right_pad
from lm_envs.reward.learned import LearnedReward, raw_scores
from lm_envs.tasks import load
from tests.lm_envs import byo
from tests.lm_envs.tokenizers import KINDS
from tests.marks import slow_unless

CHATML = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
TEMPLATES = {
    "newline behind the turn": CHATML + OPENED,
    "no newline": CHATML.replace("</s>\n", "</s>") + OPENED,
    "never opened": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[ {{ m.content }} ]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "no special tokens": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "opened with thoughts": CHATML + "{% if add_generation_prompt %}<s>assistant\n(no thoughts)\n{% endif %}",
}
TEXTS = [
    ("the drama was", " weak", " good"),
    ("Answer: ", "blue", "the cat"),
    ("the stor", "y was weak", "ies"),
    ("<s>user\nthe old cat</s>\n<s>assistant\n", "hid", "ate"),
    ("the old cat</s>", " saw a fish .", " hid"),
    ("<s>the old cat", " saw a zebra ?", " hid </s>"),
]


def wide(kind, made, **more):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return kind(LlamaConfig(vocab_size=len(made), max_position_embeddings=256, **sizes, **more))


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def rows(conversational: bool) -> list[dict]:
    said = [(p.strip("<s>"), c.strip("<s> /"), r.strip("<s> /")) for p, c, r in TEXTS] if conversational else TEXTS
    return [
        {
            "prompt": chat(prompt) if conversational else prompt,
            "chosen": [{"role": "assistant", "content": chosen}] if conversational else chosen,
            "rejected": [{"role": "assistant", "content": rejected}] if conversational else rejected,
        }
        for prompt, chosen, rejected in said
    ]


def packed(root, algorithm: str) -> PackedExamples:
    spec = DataSpec(algorithm, str(root / "model"), str(root / "rows.jsonl"), held_out=0.0)
    DataProblem(spec, root / algorithm)
    return PackedExamples(root / algorithm / "data")


def with_rows(task, prompts: list[list[int]]) -> tuple[TextMDP, np.ndarray]:
    """A MDP of the prompts of all splits, and the rows of these."""
    known = [list(ids) for split in task.prompts.values() for ids in split]
    names = next(iter(task.columns.values()), {})
    columns = {name: [value for split in task.columns.values() for value in split[name]] for name in names}
    whole = replace(task, prompts={"train": known}, columns={"train": columns})
    return TextMDP(whole), np.array([known.index(list(ids)) for ids in prompts])


def check(root, made, model, data, monkeypatch) -> None:
    """Every row of the three folders against what an env of the task `custom` reads."""
    model.save_pretrained(root / "model")
    made.save_pretrained(root / "model")
    byo.write_jsonl(root / "rows.jsonl", data)
    wide(LlamaForSequenceClassification, made, num_labels=1).save_pretrained(root / "reward")
    made.save_pretrained(root / "reward")
    place = {"policy": str(root / "model"), "reward_model": str(root / "reward"), "prompts": str(root / "rows.jsonl")}
    task = load("custom", **place, max_new_tokens=24, normalise=False)
    seen: list[list[int]] = []
    monkeypatch.setattr(LearnedReward, "_fitted", lambda self, ids: seen.append(ids) or ids)
    prompts = {tuple(ids) for split in task.prompts.values() for ids in split}
    assert len(prompts) == len(data)
    for algorithm in ("sft", "dpo"):
        learned = packed(root, algorithm)
        pairs = [[ids.tolist() for ids in learned.read(row)] for row in range(len(learned))]
        assert {tuple(prompt) for prompt, _ in pairs} == prompts
    mdp = TextMDP(task)
    for _, response in pairs:  # as an env would cut what a policy writes
        assert response == [token for token in cut_after_eos(np.array([response]), task.eos_token_ids)[0] if token >= 0]
        assert mdp.finish_reasons(np.array([response])) == ["stop"]
    whole, index = with_rows(task, [prompt for prompt, _ in pairs])
    whole.score(index, right_pad([r for _, r in pairs]).numpy())
    if not task.reference.config.is_encoder_decoder:
        read = packed(root, "reward-modelling")
        assert [read.read(row)[1].tolist() for row in range(len(read))] == seen


@pytest.mark.parametrize("kind", KINDS)
def test_law_of_texts(kind, tmp_path, monkeypatch):
    made = KINDS[kind]()
    check(tmp_path, made, wide(LlamaForCausalLM, made), rows(False), monkeypatch)


@pytest.mark.parametrize(
    ("kind", "template"),
    slow_unless(
        lambda case: case[0] == "metaspace" or case[1] == "newline behind the turn",
        product(["byte_level", "metaspace", "word_piece", "unigram"], TEMPLATES),
    ),
)
def test_law_of_chats(kind, template, tmp_path, monkeypatch):
    made = KINDS[kind]()
    made.chat_template = TEMPLATES[template]
    check(tmp_path, made, wide(LlamaForCausalLM, made), rows(True), monkeypatch)


@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "chats"])
@pytest.mark.parametrize("kind", slow_unless({"metaspace", "word_piece"}.__contains__, KINDS))
def test_law_of_an_encoder_decoder(kind, conversational, tmp_path, monkeypatch):
    made = KINDS[kind]()
    made.chat_template = TEMPLATES["newline behind the turn"]
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=len(made), d_model=16, max_position_embeddings=256, **heads, **layers, **ids)
    check(tmp_path, made, BartForConditionalGeneration(config), rows(conversational)[:3], monkeypatch)


def test_a_reward_model_orders_pairs_in_the_env_as_on_their_texts(tmp_path):
    """Right on held-out pairs by their texts, right on them in the env; and not if responses are decoded alone."""
    made = KINDS["metaspace"]()
    wide(LlamaForCausalLM, made).save_pretrained(tmp_path / "model")
    made.save_pretrained(tmp_path / "model")
    names = [
        f"{the} {what} {number}" for the in ("the", "a") for what in ("drama", "story", "cat") for number in range(8)
    ]
    data = [{"prompt": f"{name} was", "chosen": " good", "rejected": " weak"} for name in names]
    byo.write_jsonl(tmp_path / "rows.jsonl", data)
    settings = {"iterations": 30, "learning_rate": 3e-3, "episodes": 16}
    spec = DataSpec(
        "reward-modelling", str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), held_out=0.25, overrides=settings
    )
    problem = DataProblem(spec, tmp_path / "run")
    for _ in range(30):
        problem.agent.iteration()
    assert problem.evaluate()[0]["held_out_accuracy"] == 1
    problem.save_model(tmp_path / "reward")
    place = {"policy": str(tmp_path / "model"), "reward_model": str(tmp_path / "reward")}
    task = load("custom", **place, prompts=str(tmp_path / "rows.jsonl"), max_new_tokens=4, normalise=False)
    reward = task.reward
    prompts = [ids for split in task.prompts.values() for ids in split for _ in range(2)]
    words = [made(f"a {word}", add_special_tokens=False)["input_ids"][1:] for word in ("good", "weak")]
    responses = [[*word, made.eos_token_id] for word in words] * (len(prompts) // 2)
    whole, index = with_rows(task, prompts)
    scores = whole.score(index, right_pad(responses).numpy()).sum(axis=1).reshape(-1, 2)
    texts = made.batch_decode(prompts, skip_special_tokens=True)
    by_text = [
        reward.encode(text + word, True) for text, word in zip(texts, [" good", " weak"] * len(scores), strict=True)
    ]
    with torch.no_grad():
        expected = raw_scores(reward.model, right_pad(by_text)).numpy().reshape(-1, 2)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (scores[:, 0] > scores[:, 1]).all()
    glued = reward(texts, made.batch_decode(responses, skip_special_tokens=True))
    assert not np.allclose(np.array(glued).reshape(-1, 2), expected, atol=1e-3)
