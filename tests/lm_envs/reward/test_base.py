"""Rewards: what is passed and checked, TRL's conventions, compositions."""

from __future__ import annotations

import asyncio
import functools
import re
import sys
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from lm_envs.reward.base import (
    Clip,
    Conversational,
    Standardise,
    WeightedSum,
    call_reward,
    dense_part,
    is_dense,
    leaves,
    reward_name,
)

PROMPTS, COMPLETIONS = ["a b", "c"], [" d", " e e"]
IDS, REASONS = [[4, 0], [5, 5, 0]], ["stop", "stop"]


def call(reward, /, **columns):
    return call_reward(reward, PROMPTS, COMPLETIONS, IDS, REASONS, **columns)


# --- the convention -------------------------------------------------------------------------------------------------


def test_a_reward_gets_what_it_names():
    seen = {}

    def trl_style(completions, **kwargs):
        seen.update(kwargs)
        return [1, 2]

    def short(prompts, completions):
        return [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]

    assert call(trl_style, label=[7, 8]).tolist() == [1.0, 2.0]
    assert seen == {"prompts": PROMPTS, "completion_ids": IDS, "finish_reasons": REASONS, "label": [7, 8]}
    assert call(short).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, requires_grad=True)])
def test_any_sequence_of_numbers_will_do(kind):
    found = call(lambda completions: kind([0.5, -1.0]))
    assert found.dtype == np.float64 and found.tolist() == [0.5, -1.0]


def test_dense_rewards_stop_with_their_response():
    for given in ([[1, 2, np.nan], [3, 4, 5]], [[1, 2], [3, 4, 5]], torch.tensor([[1, 2, 9], [3, 4, 5]])):
        assert call(lambda completions, given=given: given).tolist() == [[1, 2, 0], [3, 4, 5]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "'judge' returned 1 rewards for 2 samples"),
        ([1.0, 2.0, 3.0], "'judge' returned 3 rewards for 2 samples"),
        (1.0, "'judge' returned a float, not a list"),
        ([1.0, float("nan")], r"'judge' returned nan for sample 1 \(prompt 'c', completion ' e e'\)"),
        ([-float("inf"), 1.0], r"'judge' returned -inf for sample 0 \(prompt 'a b', completion ' d'\)"),
        ([None, 1.0], r"'judge' returned None for sample 0 \(prompt 'a b'"),
        (["good", 1.0], r"'judge' returned 'good' for sample 0 .* not a number"),
        ([1.0, [1.0, 2.0]], r"shape \(2,\) for sample 1 .* expected one number per sample"),
        ([[1.0, 2.0], [1.0, 2.0]], "returned 2 values for the 3 tokens of sample 1"),
        ([[1.0, 2.0], [1.0, float("inf"), 2.0]], "returned inf for sample 1"),
    ],
)
def test_bad_results_name_the_reward_and_the_sample(returned, message):
    def judge(completions):
        return returned

    with pytest.raises(ValueError, match=message) as found:
        call(judge)
    assert "\n" not in str(found.value)


def stream(completions):
    yield 1.0
    yield 1 / 0


async def streamed(completions):
    yield 1.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("12", "'judge' returned a str, not a list"),
        (b"12", "returned a bytes"),
        ({1.0, 2.0}, "returned a set, not a list"),
        ({0: 1.0, 1: 2.0}, "returned a dict"),
        (None, "returned a NoneType"),
        (np.float64(1.0), "returned a float64"),
        (["0.5", "1.0"], "returned '0.5' for sample 0 .* not a number"),
        ([b"1", 2.0], "returned b'1' for sample 0"),
        ([1.0 + 2j, 1.0], r"returned \(1\+2j\) for sample 0"),
        (np.array([1j, 2]), "for sample 0 .* not a number"),
        (np.array(["2020-01-01", "2021-01-01"], "datetime64[D]"), "for sample 0 .* not a number"),
        ([[1, 2, 3], [[1], [2, 3]]], "for sample 1 .* not a number"),
        ([[["1"], ["2"]], 1.0], "for sample 0 .* not a number"),
        (np.ones((2, 3, 4)), r"shape \(3, 4\) for sample 0"),
        (torch.ones(2, 1), "returned 1 values for the 2 tokens of sample 0"),
        ([np.ones((50, 50)), 1.0], r"shape \(50, 50\) for sample 0"),
        ([[1.0, None], [1.0, 2.0, 3.0]], "returned nan for sample 0"),
        ([10**400, 1.0], "for sample 0 .* not a number"),
        ([object(), 1.0], "returned <object object.* for sample 0 .* not a number"),
        ([np.array([["a"] * 40] * 40), 1.0], "for sample 0 .* not a number"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_in_one_line(returned, message):
    def judge(completions):
        return returned

    with pytest.raises(ValueError, match=message) as found:
        call(judge)
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


@pytest.mark.parametrize(
    "returned",
    [
        [torch.tensor(0.5, requires_grad=True), torch.tensor(-1.0, dtype=torch.bfloat16)],
        torch.tensor([0.5, -1.0], dtype=torch.bfloat16),
        [np.float32(0.5), Fraction(-1)],
        (x for x in (0.5, -1.0)),
        [np.array(0.5), Decimal(-1)],
    ],
)
def test_numbers_of_other_libraries_count(returned):
    assert call(lambda completions: returned).tolist() == [0.5, -1.0]


def test_a_function_that_raises_is_told_with_file_line_function_and_sample():
    def inner(text):
        if text == " e e":
            raise KeyError("two\nlines \x1b[2J")
        return 1.0

    def judge(completions):
        return [inner(text) for text in completions]

    async def later(completions):
        return [inner(text) for text in completions]

    def generated(completions):
        for text in completions:
            yield inner(text)

    class Made:
        def __call__(self, completions):
            return [inner(text) for text in completions]

    for reward in (judge, later, generated, Made(), functools.partial(judge)):
        with pytest.raises(
            ValueError, match=r"raised KeyError: .*two.*test_base.py, line \d+, in inner\) for sample 1"
        ) as found:
            call(reward)
        assert str(found.value).isprintable() and reward_name(reward) in str(found.value)
    with pytest.raises(ValueError, match="'streamed' returned a async_generator"):
        call(streamed)
    with pytest.raises(ValueError, match=r"'stream' raised ZeroDivisionError: division by zero .*in stream\) for"):
        call(stream)


def test_only_the_sample_that_fails_is_blamed():
    calls = []

    def judge(completions):
        calls.append(len(completions))
        assert "bad" not in completions
        return [1.0] * len(completions)

    texts = ["good"] * 37 + ["bad"] + ["good"] * 62
    with pytest.raises(ValueError, match=r"for sample 37 \(prompt 'p', completion 'bad'\)"):
        call_reward(judge, ["p"] * 100, texts, [[1]] * 100, ["stop"] * 100)
    assert sum(calls) <= 400

    def together(completions):
        if len(completions) > 99:
            raise ValueError("too many")
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match="raised ValueError: too many .* for a batch of 100 samples"):
        call_reward(together, ["p"] * 100, texts, [[1]] * 100, ["stop"] * 100)

    def away(completions):
        calls.append(len(completions))
        raise ConnectionError("no network")

    calls.clear()
    with pytest.raises(ValueError, match="no network .* for a batch of 100 samples"):
        call_reward(away, ["p"] * 100, texts, [[1]] * 100, ["stop"] * 100)
    assert calls == [100]


@pytest.mark.parametrize("code", [0, None, "bye"])
def test_a_reward_that_exits_is_an_error(code):
    def judge(completions):
        sys.exit(code)

    async def later(completions):
        sys.exit(code)

    for reward in (judge, later):
        with pytest.raises(ValueError, match=r"called sys.exit: .*in (judge|later)\) for sample 0"):
            call(reward)


def test_columns_of_any_name_reach_rewards_and_compositions():
    seen = {}

    def judge(completions, **columns):
        seen.update(columns)
        return [1.0] * len(completions)

    class Judge:
        def __call__(self, completions, **columns):
            seen.update(columns)
            return [1.0] * len(completions)

    columns = {"self": [1, 2], "reward": [3, 4], "given": [5, 6], "name": [7, 8], "low": [9, 9]}
    for reward in (
        judge,
        Clip(judge, 0, 2),
        Standardise(judge, 0, 1),
        WeightedSum([(1, judge)]),
        Conversational(judge),
    ):
        seen.clear()
        assert call(reward, **columns).tolist() == [1.0, 1.0] and columns.items() <= seen.items()
    seen.clear()
    assert call(Judge(), **columns).tolist() == [1.0, 1.0]  # a method has a `self` already
    assert {name: seen[name] for name in columns if name != "self"}.items() <= seen.items() and "self" not in seen


def test_a_setting_of_a_partial_is_not_replaced_by_a_column():
    def judge(completions, factor=1.0, **columns):
        return [factor] * len(completions)

    assert call(functools.partial(judge, factor=2.0), factor=[5.0, 6.0]).tolist() == [2.0, 2.0]
    assert call(lambda completions, factor: factor, factor=[5.0, 6.0]).tolist() == [5.0, 6.0]


def test_long_texts_are_shortened_in_messages():
    with pytest.raises(ValueError, match=r"\.\.\.'") as found:
        call_reward(lambda completions: [np.nan], ["p" * 500], ["c"], [[1]], ["stop"])
    assert len(str(found.value)) < 300


# --- compositions ---------------------------------------------------------------------------------------------------


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def per_token(completion_ids, **columns):
    return [[1.0] * len(ids) for ids in completion_ids]


def test_weighted_sum():
    both = WeightedSum([(2.0, length), (-0.5, length)])
    assert both.__name__ == "2*length + -0.5*length"
    assert call(both).tolist() == [3.0, 6.0]


def test_in_a_weighted_sum_with_a_dense_part_the_score_lands_on_the_last_token():
    assert call(WeightedSum([(1.0, length), (10.0, per_token)])).tolist() == [[10, 12, 0], [10, 10, 14]]


def test_clip():
    reward = Clip(length, -1, 3)
    assert reward.__name__ == "clip(length, -1, 3)" and call(reward).tolist() == [2.0, 3.0]
    assert call(Clip(per_token, -1, 0.5)).tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0.5]]
    with pytest.raises(ValueError, match="low < high"):
        Clip(length, 1, 1)


def test_the_part_of_a_composition_that_pays_before_the_end():
    """Clipped or given messages as the whole is, without what is paid once."""

    def by_message(prompts, completions, completion_ids):
        return [[float(prompts[i][0]["role"] == "user") * 3] * len(ids) for i, ids in enumerate(completion_ids)]

    def steady(completion_ids):
        return per_token(completion_ids)

    steady.dense = by_message.dense = True
    parts = [(1.0, length), (2.0, Clip(steady, -1, 0.5)), (1.0, Conversational(by_message))]
    whole, paid = WeightedSum(parts), dense_part(WeightedSum(parts))
    assert is_dense(whole) and not is_dense(length)
    assert call(paid).tolist() == [[4, 4, 0], [4, 4, 4]] and call(whole).tolist() == [[4, 6, 0], [4, 4, 8]]


def test_more_values_than_tokens_are_cut_at_the_end():
    assert call(lambda completion_ids: [[1.0, 2.0, 3.0, 4.0]] * 2).tolist() == [[1, 2, 0], [1, 2, 3]]


def test_standardise_refuses_dense_rewards():
    with pytest.raises(ValueError, match="'per_token' is dense"):
        call(Standardise(per_token, 0, 1))


def test_a_fault_inside_a_composition_names_the_part():
    def broken(completions):
        return [float("nan"), 0.0]

    with pytest.raises(ValueError, match="reward 'broken' returned nan"):
        call(Clip(WeightedSum([(1.0, length), (1.0, broken)]), -1, 1))


def test_compositions_know_their_leaves():
    made = Clip(WeightedSum([(1.0, length), (0.5, Standardise(Conversational(per_token), 0, 1))]), -1, 1)
    assert list(leaves(made)) == [length, per_token] and list(leaves(length)) == [length]
    with pytest.raises(ValueError, match="'length' has the weight nan"):
        WeightedSum([(float("nan"), length)])


def test_no_samples_are_no_rewards():
    nothing = dict(prompts=[], completions=[], completion_ids=[], finish_reasons=[])
    for reward in (length, per_token, WeightedSum([(1.0, length), (1.0, Clip(length, 0, 1))])):
        assert call_reward(reward, **nothing).shape == (0,)


# --- functions written for TRL --------------------------------------------------------------------------------------

DIGITS = ["12", "7 7"]


def in_tags(completions, **kwargs):
    """A format: the whole completion stands between tags."""
    return [1.0 if re.fullmatch(r"<a>.*</a>", text, re.DOTALL) else 0.0 for text in completions]


def right_answer(completions, ground_truth, **kwargs):
    """A column of the data, by its name."""
    found = [re.search(r"\d+", text) for text in completions]
    return [1.0 if m and m.group() == truth else 0.0 for m, truth in zip(found, ground_truth, strict=True)]


def few_tokens(completion_ids, **kwargs):
    return [-float(len(ids)) for ids in completion_ids]


def maths_only(prompts, completions, task, **kwargs):
    """None where it does not apply."""
    return [float(len(c)) if kind == "maths" else None for c, kind in zip(completions, task, strict=True)]


def code_only(completions, task, **kwargs):
    return [10.0 if kind == "code" else None for kind in task]


def tidy_message(prompts, completions, **kwargs):
    """Of conversations: the assistant's reply, and the last thing the user said."""
    replies = [completion[0]["content"] for completion in completions]
    asked = [messages[-1]["content"] for messages in prompts]
    return [float(reply == reply.strip()) + len(question) for reply, question in zip(replies, asked, strict=True)]


async def asynchronous(completions, **kwargs):
    async def score(text):
        await asyncio.sleep(0.001 * len(text))
        return float(len(text))

    return await asyncio.gather(*(score(text) for text in completions))


def test_functions_of_text_ids_and_columns():
    tagged = call_reward(in_tags, PROMPTS, ["<a>\nx</a>", "x"], IDS, REASONS, other=[1, 2])
    assert tagged.tolist() == [1.0, 0.0]
    assert call_reward(right_answer, PROMPTS, DIGITS, IDS, REASONS, ground_truth=["12", "8"]).tolist() == [1.0, 0.0]
    assert call(few_tokens).tolist() == [-2.0, -3.0]


def test_a_column_that_the_data_lack_is_named():
    with pytest.raises(ValueError, match="'right_answer' needs 'ground_truth'.* they have solution, split"):
        call(right_answer, solution=["1", "2"], split=["train"] * 2)
    with pytest.raises(ValueError, match="they have none beside the prompt"):
        call(right_answer)


def test_none_leaves_a_function_out_of_the_sum():
    both = WeightedSum([(2.0, maths_only), (1.0, code_only)])
    assert call(both, task=["maths", "code"]).tolist() == [4.0, 10.0]
    three = WeightedSum([(1.0, both), (1.0, few_tokens)])
    assert call(three, task=["maths", "prose"]).tolist() == [2.0, -3.0]
    assert call(WeightedSum([(1.0, maths_only), (1.0, per_token)]), task=["x", "maths"]).tolist() == [
        [1, 1, 0],
        [1, 1, 5],
    ]
    some_dense = lambda completions: [None, [1.0, 2.0, 3.0]]  # noqa: E731
    assert call(WeightedSum([(1.0, some_dense), (1.0, few_tokens)])).tolist() == [[0, -2, 0], [1, 2, 0]]


def test_where_no_function_applies_it_is_an_error():
    with pytest.raises(
        ValueError, match=r"every part of reward '1\*maths_only \+ 1\*code_only' returned None for sample 1"
    ):
        call(WeightedSum([(1.0, maths_only), (1.0, code_only)]), task=["code", "prose"])
    with pytest.raises(ValueError, match="reward 'maths_only' returned None for sample 0"):
        call(maths_only, task=["code", "maths"])


def test_clip_and_standardise_keep_none():
    parts = [(1.0, Clip(maths_only, 0, 1)), (1.0, Standardise(code_only, 4.0, 2.0))]
    assert call(WeightedSum(parts), task=["maths", "code"]).tolist() == [1.0, 3.0]


def test_conversations():
    assert call(Conversational(tidy_message)).tolist() == [3.0, 1.0]
    messages = [[{"role": "system", "content": "s"}, {"role": "user", "content": "four"}]] * 2
    assert call(Conversational(tidy_message), messages=messages).tolist() == [4.0, 4.0]
    assert Conversational(tidy_message).__name__ == "tidy_message"

    def broken(completions):
        return [0.0, float("nan")]

    with pytest.raises(ValueError, match=r"'broken' returned nan for sample 1 \(prompt \[\{'role': 'user'"):
        call(Conversational(broken))


def test_async_functions_run_also_where_a_loop_is_running():
    assert call(asynchronous).tolist() == [2.0, 4.0]
    assert call(WeightedSum([(1.0, asynchronous), (1.0, few_tokens)])).tolist() == [0.0, 1.0]

    async def notebook():
        return call(asynchronous).tolist()

    assert asyncio.run(notebook()) == [2.0, 4.0]
    loops = []

    async def which(completions):
        loops.append((asyncio.get_running_loop(), threading.current_thread()))
        return [0.0, 0.0]

    call(which), call(which)
    assert loops[0] == loops[1]  # what a client keeps between calls belongs to one loop

    async def fails(completions):
        raise RuntimeError("the service is away")

    with pytest.raises(ValueError, match=r"reward .fails. raised RuntimeError: the service is away .*test_base.py"):
        call(fails)


def test_names():
    class Judge:
        def __call__(self, completions):
            return [None, 1.0]

    assert reward_name(Judge()) == "Judge" and reward_name(functools.partial(length, x=1)) == "length"
    named = Judge()
    named.__name__ = "strict"
    with pytest.raises(ValueError, match="reward 'strict' returned None"):
        call(named)
