"""Tokens at the ends: one BOS and not two, the end of an assistant's turn, several EOS in every way through an env."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv, cut_after_eos
from lm_envs.exact.solver import Exact
from lm_envs.model.decoding import forbid_early_eos
from lm_envs.model.endings import end_of_turn, eos_tokens
from lm_envs.model.text import Codec
from lm_envs.tasks import load
from tests import tiny
from tests.lm_envs import byo

# As the families write them: BOS spelled out or not, the end of a turn a token of its own, the EOS or nothing.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|h|>{{ m['role'] }}<|/h|>\n\n{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
WITH_EOS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[I] {{ m['content'] }} [/I]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
CHAT = [{"role": "user", "content": "the old cat"}]


def tokenizer(template=None, *more):
    made = byo.byte_level_bpe()
    made.add_special_tokens({"additional_special_tokens": list(more)})
    made.chat_template = template
    return made


def model(made, eos=1):
    lm = byo.llama(len(made))
    lm.generation_config.eos_token_id = eos
    lm.config.eos_token_id = eos
    return lm


@pytest.mark.parametrize(
    ("template", "more", "expected"),
    [
        (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        (LLAMA3, ("<|h|>", "<|/h|>", "<|eot|>"), "<|eot|>"),
        (WITH_EOS, (), "</s>"),
        (BARE, (), None),
    ],
)
def test_the_end_of_turn_is_the_templates(template, more, expected):
    made = tokenizer(template, *more)
    assert end_of_turn(made) == (None if expected is None else made.convert_tokens_to_ids(expected))


def test_eos_are_the_tokenizers_the_turns_and_the_configs():
    made = tokenizer(LLAMA3, "<|h|>", "<|/h|>", "<|eot|>", "<|eom|>")
    eot, eom = made.convert_tokens_to_ids(["<|eot|>", "<|eom|>"])
    assert eos_tokens(model(made), made) == (1,)
    assert eos_tokens(model(made), made, chat=True) == (eot, 1)
    assert eos_tokens(model(made, [1, eom, eot]), made) == (1, eom, eot)
    assert eos_tokens(model(made, [eom, 1]), made, chat=True) == (eot, 1, eom)
    # What no tokenizer marks as special is a word, whatever an untouched default says; and None is nothing.
    assert eos_tokens(model(made, 77), made) == eos_tokens(model(made, None), made) == (1,)


def test_one_bos():
    made = tokenizer(LLAMA3, "<|h|>", "<|/h|>", "<|eot|>")
    bos = made.bos_token_id

    def ids(prompt):
        return Codec(made).encode(prompt)[0]

    plain, twice = ids("the cat"), ids("<s>the cat")
    assert plain == twice and plain.count(bos) == 1 and plain[0] == bos
    rendered = ids(CHAT)
    known = made.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert rendered == known and rendered.count(bos) == 1
    made.chat_template = CHATML  # a template without a BOS means it
    assert bos not in ids(CHAT)
    made.chat_template = WITH_EOS  # the end that a template writes stays: it is not ours
    turns = [*CHAT, {"role": "assistant", "content": "hid"}, *CHAT]
    known = made.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert ids(turns) == known and made.eos_token_id in known
    assert ids("the cat</s>") == [*plain, made.eos_token_id]  # written in the text: the end of a turn


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = byo.make(tmp_path_factory.mktemp("chat"))
    made = tokenizer(LLAMA3, "<|h|>", "<|/h|>", "<|eot|>")
    lm = byo.llama(len(made))
    lm.config.max_position_embeddings = 96
    lm.save_pretrained(folders.root / "policy")
    made.save_pretrained(folders.root / "policy")
    return folders


def chats(folders, *rows):
    return str(byo.write_jsonl(folders.root / "chats.jsonl", list(rows)))


def test_a_task_of_messages(folders):
    system = {"role": "system", "content": "rhyme"}
    prompts = chats(
        folders,
        {"prompt": CHAT},
        {"prompt": [system, *CHAT]},
        {"prompt": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
        {"prompt": "as text"},
    )
    options = {**folders.options, "prompts": prompts, "max_new_tokens": 4, "normalise": False}
    task = load("custom", **options)
    made = task.tokenizer
    texts = {made.decode(ids) for split in task.prompts.values() for ids in split}
    assert texts == {
        "<s><|h|>user<|/h|>\n\nthe old cat<|eot|><|h|>assistant<|/h|>\n\n",
        "<s><|h|>system<|/h|>\n\nrhyme<|eot|><|h|>user<|/h|>\n\nthe old cat<|eot|><|h|>assistant<|/h|>\n\n",
        "<s><|h|>user<|/h|>\n\na<|eot|><|h|>assistant<|/h|>\n\nb<|eot|><|h|>user<|/h|>\n\nc<|eot|>"
        "<|h|>assistant<|/h|>\n\n",
        "<s>as text",
    }
    eot = made.convert_tokens_to_ids("<|eot|>")
    assert task.eos_token_ids == (eot, 1)
    env = TextVectorEnv(task, 4)
    stepped, bulk = (way(env, LMPolicy.for_mdp(env.mdp, task.start), episodes=24, seed=1) for way in (collect, rollout))
    assert torch.equal(stepped.response, bulk.response)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": []}, "must be a list of messages, not []"),
        ({"prompt": [*CHAT, {"role": "assistant", "content": "x"}]}, "ends in a message of the assistant's"),
        ({"prompt": ["hello"]}, "must be {'role': ..., 'content': ...}, not 'hello'"),
        ({"prompt": [{"role": "user"}]}, "'content' must be a string"),
    ],
)
def test_bad_messages_name_file_and_line(folders, row, message):
    path = chats(folders, {"prompt": CHAT}, row)
    with pytest.raises(ValueError) as caught:
        load("custom", **{**folders.options, "prompts": path})
    assert f"{path}, line 2" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"), [(None, "has no chat template"), (STRICT, "refuses the conversation: no system role")]
)
def test_templates_that_cannot(folders, tmp_path, template, message):
    byo.make(tmp_path)
    made = tokenizer(template)
    byo.llama(len(made)).save_pretrained(tmp_path / "policy")
    made.save_pretrained(tmp_path / "policy")
    path = chats(folders, *({"prompt": [{"role": "system", "content": text}, *CHAT]} for text in "xyz"))
    with pytest.raises(ValueError) as caught:
        load("custom", **{**folders.options, "policy": str(tmp_path / "policy"), "prompts": path})
    assert f"{path}, line 1" in str(caught.value) and message in str(caught.value)


# Several EOS


MORE = (3, 7)
EVERY = (0, *MORE)


@pytest.mark.parametrize("early", [0, 2])
def test_responses_end_on_any_of_them_on_every_path(early):
    task = tiny.task(more_eos_token_ids=MORE, min_new_tokens=early)
    assert task.eos_token_ids == EVERY
    env = TextVectorEnv(task, 4)
    policy = LMPolicy.for_mdp(env.mdp, tiny.gpt2(seed=1))
    stepped, bulk = (way(env, policy, episodes=40, seed=1) for way in (collect, rollout))
    assert torch.equal(stepped.response, bulk.response)
    torch.testing.assert_close(stepped.reward, bulk.reward, rtol=0, atol=1e-9)
    ends = set()
    for row in bulk.response:
        row = row[row >= 0].tolist()
        assert not set(row[:-1]) & set(EVERY) and len(row) > early
        assert row[-1] in EVERY or len(row) == task.max_new_tokens
        ends.add(row[-1])
    assert ends > set(EVERY)  # each of them, and the length
    torch.testing.assert_close(policy.evaluate(bulk).logprob, bulk.logprob, check_dtype=False)
    bandit = TextBanditVectorEnv(task, 4)
    whole = rollout(bandit, LMPolicy.for_mdp(bandit.mdp, tiny.gpt2(seed=1), bandit=True), episodes=40, seed=1)
    torch.testing.assert_close(whole.reward[:, 0], bulk.reward.sum(dim=1), rtol=0, atol=1e-9)
    stepped = collect(bandit, LMPolicy.for_mdp(bandit.mdp, tiny.gpt2(seed=1), bandit=True), episodes=40, seed=1)
    torch.testing.assert_close(stepped.reward, whole.reward, rtol=0, atol=1e-9)
    trained = LMPolicy.for_mdp(env.mdp, tiny.gpt2().requires_grad_(True))
    _, metrics = PPO(trained, PPOConfig(episodes=16, iterations=1)).iteration(env)
    assert metrics["logprob_gap_max"] < 1e-9


def test_the_env_knows_how_a_response_ended():
    env = TextVectorEnv(tiny.task(more_eos_token_ids=MORE, max_new_tokens=3, min_new_tokens=1, kl_coef=0.0), 4)
    _, info = env.reset(seed=0)
    assert not info["action_mask"][:, EVERY].any() and info["action_mask"].sum() == 4 * 7
    with pytest.raises(ValueError, match="row 1 ended after 0 tokens"):
        env.step(np.array([1, 3, 1, 1]))
    env.step(np.array([1, 1, 1, 1]))
    *_, terminated, _, info = env.step(np.array([0, 3, 7, 2]))
    assert terminated.tolist() == [True, True, True, False]
    assert list(info["final_info"]["lm"]["finish_reason"][:3]) == ["stop"] * 3
    rows = cut_after_eos(np.array([[1, 7, 3, 0], [1, 2, 4, 5], [3, 3, 3, 3]]), EVERY)
    assert rows.tolist() == [[1, 7, -1, -1], [1, 2, 4, 5], [3, -1, -1, -1]]
    masked = forbid_early_eos(torch.zeros(2, 10), torch.tensor([0, 5]), EVERY, 2)
    assert masked[0].isinf().nonzero().flatten().tolist() == list(EVERY) and not masked[1].isinf().any()


def test_exact_solutions_take_one():
    with pytest.raises(ValueError, match="one EOS token"):
        Exact(TextVectorEnv(tiny.task(more_eos_token_ids=MORE, max_new_tokens=2), 1).mdp)
