"""Examples as token ids, chat messages as text, and the store on disk that keeps them."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Examples, Rejected
from lm_envs.data.packed import PackedExamples, info_of, pack, tokenise
from lm_envs.model.chat import render_messages, split_answer
from lm_envs.model.text import Codec
from lm_envs.reward.learned import LearnedReward
from lm_envs.tasks.custom import by_split, encode_prompts, read_prompts
from tests.lm_envs import byo

# As ChatML, with the tokenizer's EOS where a turn ends.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
USER, SAID = {"role": "user", "content": "the old cat"}, {"role": "assistant", "content": "ate a fish ."}
OTHER = {"role": "assistant", "content": "hid"}


@pytest.fixture(scope="module")
def plain():
    return byo.byte_level_bpe()


@pytest.fixture(scope="module")
def chat():
    tokenizer = byo.byte_level_bpe()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def items(*examples: Example) -> list[Example]:
    return [replace(example, where=f"line {i}") for i, example in enumerate(examples, 1)]


def rejected(on_bad: str = "raise") -> Rejected:
    return Rejected("f.jsonl", on_bad)


def encoded(tokenizer, *examples, **options):
    return list(tokenise(items(*examples), Codec(tokenizer), rejected(), **options))


def test_prompt_and_completion_are_the_ids_of_their_joined_text_and_an_eos(plain):
    """By hand: the tokenizer begins every text with <s> (0); </s> is 1."""
    (found,) = encoded(plain, Example("the old cat", (" ate a fish .", " hid"), (0, 1)))
    assert found.prompt == plain("the old cat")["input_ids"] and found.prompt[0] == 0
    whole = plain("the old cat ate a fish .")["input_ids"]
    assert [found.prompt + ids for ids in found.completions] == [
        [*whole, 1],
        [*plain("the old cat hid")["input_ids"], 1],
    ]


def test_a_merge_over_the_border_leaves_the_prompt_as_a_policy_gets_it(plain):
    (found,) = encoded(plain, Example("the old c", ("at hid",)))
    assert plain("the old cat hid")["input_ids"][: len(found.prompt)] != found.prompt  # negative control: they do merge
    assert found.prompt == plain("the old c")["input_ids"]
    assert found.completions == [[*plain("at hid", add_special_tokens=False)["input_ids"], 1]]


def test_a_completion_ends_at_its_first_eos(plain):
    (found,) = encoded(plain, Example("the old cat", (" hid</s> and more",)))
    assert found.completions == [[*plain(" hid", add_special_tokens=False)["input_ids"], 1]]


def test_a_text_as_a_whole_is_learned_but_for_its_first_token(plain):
    (found,) = encoded(plain, Example("", ("the old cat",)))
    assert (found.prompt, found.completions[0]) == ([0], [*plain("the old cat")["input_ids"][1:], 1])


def test_many_at_a_time_are_as_one_by_one(plain):
    examples = [Example(text[:9], (text[9:],)) for text in byo.TEXTS] * 20
    many = encoded(plain, *examples)
    assert [(e.prompt, e.completions) for e in many] == [
        (found.prompt, found.completions) for example in examples for found in encoded(plain, example)
    ]


def test_prompt_and_completion_together_are_too_long(plain):
    (found,) = encoded(plain, Example("the cat saw", (" the fish .",)))
    prompt, completion = len(found.prompt), len(found.completions[0])
    for most in (prompt + completion - 1, prompt + completion):
        said = rejected("skip")
        list(tokenise(items(found.example), Codec(plain), said, max_length=most))
        assert said.count == (most < prompt + completion) and min(prompt, completion) > 1


def test_what_makes_no_tokens_or_too_many_is_a_bad_row(plain):
    examples = [Example("the", (" cat",)), Example("the", ("</s>",)), Example("the", (" cat" * 9,))]
    with pytest.raises(ValueError, match=r"f.jsonl, line 2: a completion is empty"):
        encoded(plain, *examples)
    said = rejected("skip")
    assert len(list(tokenise(items(*examples), Codec(plain), said, max_length=8))) == 1
    assert [bad.where for bad in said.rows] == ["line 2", "line 3"] and "more than the 8 that fit" in said.rows[
        1
    ].reason


# Chat


def test_messages_are_written_by_the_template(chat):
    assert render_messages(chat, [USER], True) == "<s>user\nthe old cat</s>\n<s>assistant\n"
    assert split_answer(chat, [USER], [SAID]) == (
        "<s>user\nthe old cat</s>\n<s>assistant\n",
        "ate a fish .</s>\n",
    )
    (found,) = encoded(chat, Example([USER], ([SAID], [OTHER]), (0, 1)))
    # no second <s>, the turn's end is the EOS, and the line break behind it can never be written
    assert found.prompt == chat("user\nthe old cat</s>\n<s>assistant\n")["input_ids"]
    assert [chat.decode(ids) for ids in found.completions] == ["ate a fish .</s>", "hid</s>"]
    assert [Codec(chat).encode(prompt)[0] for prompt in ([USER], "the")] == [found.prompt, chat("the")["input_ids"]]


def test_no_template_is_said_with_what_to_do(plain):
    for call in (
        lambda: render_messages(plain, [USER], True),
        lambda: encoded(plain, Example([USER], ([SAID],))),
        lambda: Codec(plain).encode([USER]),
    ):
        with pytest.raises(ValueError, match="no chat template.*set tokenizer.chat_template"):
            call()


def test_what_the_template_refuses_is_a_bad_row():
    tokenizer = byo.byte_level_bpe()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('users come first') }}{% endif %}" + TEMPLATE
    )
    said = rejected("skip")
    system = {"role": "system", "content": "be kind"}
    found = list(tokenise(items(Example([system], ([SAID],)), Example([USER], ([SAID],))), Codec(tokenizer), said))
    assert (
        len(found) == 1 and [bad.where for bad in said.rows] == ["line 1"] and "users come first" in said.rows[0].reason
    )


def test_a_reward_model_is_trained_on_what_it_will_read(plain, chat):
    """The same ids as the reward makes of prompt and completion in training."""
    reward = LearnedReward(byo.bert(len(plain)), plain)
    (found,) = tokenise(
        items(Example("the old cat", (" hid", " ate"), (0, 1))), Codec(plain), rejected(), reward_eos=True
    )
    assert found.completions == [[*plain(text)["input_ids"], 1] for text in ("the old cat hid", "the old cat ate")]
    (found,) = tokenise(
        items(Example("the old cat", (" hid", " ate"), (0, 1))), Codec(plain), rejected(), reward_eos=False
    )
    assert found.completions[0] == reward.encode("the old cat hid", stopped=True)  # an encoder's text has no EOS
    # chats: the policy's ids of prompt and response decoded without special tokens, as the env does
    (policy,) = encoded(chat, Example([USER], ([SAID],)))
    texts = chat.batch_decode([policy.prompt, policy.completions[0]], skip_special_tokens=True)
    (found,) = tokenise(items(Example([USER], ([SAID],))), Codec(chat), rejected(), reward_eos=True)
    assert chat.decode(found.completions[0]).rstrip("</s>").strip() == ("<s>" + "".join(texts)).strip()


def test_prompts_of_a_task_may_be_messages_of_a_csv_file(chat, plain, tmp_path):
    path = tmp_path / "p.csv"
    cell = json.dumps([USER]).replace('"', '""')
    path.write_text(f'prompt,split\n"{cell}",train\nthe cat,validation\na fish,test\n')
    prompts = read_prompts(path)
    found = by_split(encode_prompts(prompts, Codec(chat), 4, [], Rejected(path, "raise")))
    assert found["train"] == [chat("user\nthe old cat</s>\n<s>assistant\n")["input_ids"]]
    assert found["test"] == [chat("a fish")["input_ids"]]
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompts(prompts, Codec(plain), 4, [], Rejected(path, "skip"))


# On disk


def test_what_is_packed_is_read_back(plain, tmp_path):
    rows = [{"prompt": text[:9], "completions": [text[9:], " hid", " saw"], "ranks": [2, 1, 1]} for text in byo.TEXTS]
    data = Examples(byo.write_jsonl(tmp_path / "p.jsonl", rows))
    expected = list(tokenise(data, Codec(plain), data.rejected))
    pack(tokenise(data, Codec(plain), data.rejected), tmp_path / "packed", lambda: {"rows": data.read})
    packed = PackedExamples(tmp_path / "packed")
    assert info_of(tmp_path / "packed") == {"rows": 12} and len(packed) == 36
    flat = [(found.prompt, ids) for found in expected for ids in found.completions]
    assert [(p.tolist(), r.tolist()) for p, r in map(packed.read, range(36))] == flat
    assert packed.column("group").tolist() == np.repeat(np.arange(12), 3).tolist()
    assert packed.column("rank").tolist() == [1, 0, 0] * 12
    (tmp_path / "packed" / "tokens.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="is damaged"):
        PackedExamples(tmp_path / "packed")


def test_held_out_rows_are_whole_prompts_and_do_not_depend_on_the_order(plain, tmp_path):
    rows = [{"prompt": f"the {i % 20}", "completion": f" cat {i}"} for i in range(60)]

    def held(rows, share=0.1):
        data = Examples(byo.write_jsonl(tmp_path / "p.jsonl", rows))
        pack(tokenise(data, Codec(plain), data.rejected), tmp_path / "packed", dict)
        train, out = PackedExamples(tmp_path / "packed").divide(share)
        parts = [part.column("group") for part in (out, train)]
        assert sorted(np.concatenate(parts)) == list(range(len(rows)))
        return tuple({rows[i]["prompt"] for i in part} for part in parts)

    out, train = held(rows)
    assert len(out) == 2 and not out & train
    assert len(held(rows, 0.9999)[1]) == 1 and not held(rows, 0.0)[0]
    assert held(rows[::-1])[0] == out
    split = [row | {"split": "test" if i < 4 else "validation" if i < 7 else "train"} for i, row in enumerate(rows)]
    with pytest.warns(UserWarning, match="has 7 prompts in training and held-out rows alike"):
        assert held(split)[0] == {f"the {i}" for i in range(7)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held(split[:20])[0] == {f"the {i}" for i in range(7)}
