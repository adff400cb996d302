"""Rows, columns, splits and packed tables, with each value written out."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from lm_envs.data.conventions import Example, as_kind, text_of
from lm_envs.data.dataset import Examples, Rejected
from lm_envs.data.packed import EncodedExample, PackedExamples, pack, tokenise
from lm_envs.data.sources import fingerprint
from lm_envs.data.splits import SPLIT_NAMES, divide, share
from lm_envs.model.text import Codec
from tests.lm_envs import byo

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "what"}


def read(tmp_path, *rows, kind=None, end="jsonl", **options):
    path = tmp_path / f"rows.{end}"
    if end == "csv":
        path.write_text("\n".join(rows) + "\n")
    else:
        byo.write_jsonl(path, rows)
    return Examples(path, kind, **options)


def shares(text):
    return int.from_bytes(hashlib.sha256(f"split\0{text}".encode()).digest()[:8], "big") / 2**64


@pytest.mark.parametrize(
    ("info", "prompt"),
    [
        ({"post": "p", "article": "a"}, "POST: p\n\nTL;DR:"),
        ({"article": "a", "title": "t"}, "TITLE: t\n\nPOST: a\n\nTL;DR:"),
        ({"post": "", "article": "a", "subreddit": "r"}, "SUBREDDIT: r/r\n\nPOST: a\n\nTL;DR:"),
        ({"post": "p", "title": None, "subreddit": ""}, "POST: p\n\nTL;DR:"),
    ],
)
def test_comparisons_of_summaries(tmp_path, info, prompt):
    row = {"info": info, "summaries": [{"text": "x"}, {"text": "y"}, {"text": "z"}], "choice": 2}
    assert list(read(tmp_path, row)) == [Example(prompt, ("x", "y", "z"), (1, 1, 0))]


def test_ranks_and_labels_of_csv(tmp_path):
    """Any whole numbers rank, the lowest first; labels are read without regard to case and spaces."""
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [5, -2, 5]}
    assert list(read(tmp_path, row)) == [Example("p", ("a", "b", "c"), (1, 0, 1))]
    again = {"prompt": "p", "completions": ["a", "b", "a"], "ranks": [0, 1, 2]}
    assert list(read(tmp_path, again)) == [Example("p", ("a", "b", "a"), (0, 1, 2))]  # of three, two may be alike
    labels = [" TRUE ", "False", "1", " 0"]
    found = list(read(tmp_path, "prompt,completion,label", *(f"p,c,{label}" for label in labels), end="csv"))
    assert [example.label for example in found] == [1, 0, 1, 0]
    with_text = list(read(tmp_path, {"text": " a b ", "label": True}, {"text": "c", "label": 0}, kind="labelled"))
    assert with_text == [Example("", (" a b ",), label=1), Example("", ("c",), label=0)]


def test_single_texts_and_whole_conversations_become_messages(tmp_path):
    mixed = {"prompt": "hi", "chosen": [SAID], "rejected": "what"}
    rows = [mixed, {"prompt": [USER], "chosen": "hello", "rejected": "what"}]
    expected = Example([USER], ([SAID], [OTHER]), (0, 1))
    assert list(read(tmp_path, *rows)) == [expected] * 2
    system = {"role": "system", "content": "be kind"}
    long = {"chosen": [system, USER, SAID, USER, SAID], "rejected": [system, USER, SAID, USER, OTHER]}
    assert list(read(tmp_path, long)) == [Example([system, USER, SAID, USER], ([SAID], [OTHER]), (0, 1))]
    # What all say alike belongs to the prompt, but never a conversation's last message.
    same = {"chosen": [USER, SAID], "rejected": [USER, SAID]}
    data = read(tmp_path, same, on_bad="skip")
    assert not list(data) and data.rejected.rows[0].reason == "the preferred completion and the other are the same text"
    assert text_of({"prompt": USER}, "prompt") == [USER]


def test_a_kind_that_needs_less(tmp_path):
    ranked = Example("p", ("a", "b", "c"), (1, 0, 0))
    assert as_kind(ranked, "demonstrations") == Example("p", ("b",))  # the first of the best
    assert as_kind(ranked, "prompts") == Example("p") and as_kind(ranked, "preferences") == ranked
    assert Example("p").key == "p" and Example("", ("whole",)).key == "whole"
    assert Example([USER], ([SAID],)).key == json.dumps([USER], sort_keys=True)


def test_columns_for_rewards_are_the_others(tmp_path):
    """What becomes prompt and answer is spent, but for the columns that a reward may compare with."""
    row = {"prompt": "p", "completion": "c", "split": "dev", "reference": "r", "n": 3}
    (found,) = read(tmp_path, row)
    assert found.columns == {"completion": "c", "reference": "r", "n": 3} and found.split == "validation"
    assert found.place == f"{tmp_path / 'rows.jsonl'}, line 1"
    (ranked,) = read(tmp_path, {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], "messages": 3, "x": None})
    assert ranked.columns == {"ranks": [0, 1], "x": None}
    cells = list(read(tmp_path, "prompt,tools,n", 'p,"[{""name"": ""f""}]",1', 'q,"[1, 2]",x', end="csv"))
    assert [cell.columns for cell in cells] == [{"tools": [{"name": "f"}], "n": "1"}, {"tools": "[1, 2]", "n": "x"}]


def test_counts_are_of_the_last_pass(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "label": i % 2} for i in range(6)]
    bad = [{"prompt": "", "completion": "c", "label": 1}, {"prompt": "p", "completion": "c", "label": 7}]
    data = read(tmp_path, *rows, *bad, kind="demonstrations", on_bad="skip")
    for _ in range(2):
        assert len(list(data)) == 3
        assert (data.read, data.unwanted, data.rejected.count, len(data.rejected.rows)) == (8, 3, 2, 2)
    few = read(tmp_path, *rows, kind="demonstrations", on_bad="skip", max_rows=3)
    assert len(list(few)) == 1 and (few.read, few.unwanted) == (3, 2)


def test_most_of_the_first_rows_decide(tmp_path):
    other = [{"prompt": "p", "completion": "c", "n": i} for i in range(2)]
    rows = [other[0], {"text": "a", "m": 1}, other[1], {"text": "b"}, {"text": "c"}]
    data = read(tmp_path, *rows, on_bad="skip")
    assert data.convention.name == "text" and data.columns == ("text", "m") and len(list(data)) == 3


# Splits


def test_splits_names_shares_and_a_tenth():
    assert SPLIT_NAMES == {
        "train": "train", "training": "train", "validation": "validation", "dev": "validation", "val": "validation",
        "test": "test",
    }  # fmt: skip
    texts = [f"text {i}" for i in range(43)]
    assert [share(text, "split") for text in texts] == [shares(text) for text in texts]
    assert share("a", "half") != share("a", "split")
    order = sorted(texts, key=shares)
    found = divide([(text, "") for text in texts], "f")
    held = {"validation": order[:4], "test": order[4:8]}
    for name, expected in held.items():
        assert sorted(text for text in texts if found[text] == name) == sorted(expected)
    given = [(text, "test" if i < 3 else "") for i, text in enumerate(texts)]
    rest = [text for text in order if text not in texts[:3]]
    found = divide(given, "f")
    assert {text for text in texts if found[text] == "validation"} == set(rest[:4])
    assert [found[text] for text in texts[:3]] == ["test"] * 3


def test_a_text_in_several_splits_is_held_out():
    rows = [("a", "train"), ("a", "validation"), ("b", "test"), ("b", "train"), ("c", "validation"), ("c", "test")]
    found = divide([*rows, ("d", "train"), ("e", "validation")], "f")
    assert found == {"a": "validation", "b": "test", "c": "test", "d": "train", "e": "validation"}


# On disk


def test_the_table_of_a_packed_folder(tmp_path):
    ranked = Example("p", ("x", "y"), (1, 0), split="test")
    wanted, unwanted, plain = (Example(f"q{i}", ("x",), label=i) for i in (1, 0, -1))
    encoded = [
        EncodedExample(ranked, [5, 6], [[7, 1], [8]], 0.25),
        EncodedExample(wanted, [5], [[7, 1]]),
        EncodedExample(unwanted, [5], [[8, 1]]),
        EncodedExample(plain, [5], [[8, 2]], 0.0),
    ]
    pack(encoded, tmp_path / "made", lambda: {})
    packed = PackedExamples(tmp_path / "made", preferences=True)
    table = {name: packed.column(name).tolist() for name in ("prompt", "response", "group", "rank", "split")}
    assert table == {
        "prompt": [2, 2, 1, 1, 1], "response": [2, 1, 2, 2, 2], "group": [0, 0, 1, 2, 3], "rank": [1, 0, 0, 1, 0],
        "split": [2, 2, -1, -1, -1],
    }  # fmt: skip
    assert packed.column("weight").view(np.float64).tolist() == [0.25, 0.25, 1, 1, 0]
    expected = [int(shares(key) * 2**53) for key in ("p", "p", "q1", "q0", "q-1")]
    assert packed.column("share").tolist() == expected
    assert packed.ends == (1, 8, 2) and packed.longest == (2, 2)
    twice = PackedExamples(tmp_path / "made", preferences=True, mismatched=True)
    assert [twice.read(row)[1].tolist() for row in range(5, 10)] == [[7, 1], [8, 1], [8, 2], [7, 1], [8]]
    assert [twice.read(row)[0].tolist() for row in range(5, 10)] == [[5, 6], [5, 6], [5], [5], [5]]
    assert twice.column("rank").tolist()[5:] == [-1] * 5


def test_a_share_of_the_prompts_is_held_out_whatever_their_rows(tmp_path):
    """Seven prompts of one to seven rows: 30 % are two prompts, those of the smallest shares."""
    names = [f"p{i}" for i in range(7)]
    rows = [EncodedExample(Example(name, ("x",)), [5 + i], [[1]]) for i, name in enumerate(names) for _ in range(i + 1)]
    pack(rows, tmp_path / "made", lambda: {})
    packed = PackedExamples(tmp_path / "made")
    order = sorted(range(7), key=lambda i: shares(names[i]))
    for held, count in ((0.3, 2), (0.01, 1), (0.99, 6), (0.0, 0), (0.36, 3)):
        train, out = packed.divide(held)
        assert {int(out.read(row)[0][0]) - 5 for row in range(len(out))} == set(order[:count])
        assert len(train) + len(out) == 28


def test_as_many_tokens_as_fit_are_taken(tmp_path):
    tokenizer, example = byo.byte_level_bpe(), Example("the old cat", (" hid",), columns={"w": "0"})
    (found,) = tokenise([example], Codec(tokenizer), Rejected("f", "raise"), weight="w")
    length = len(found.prompt) + len(found.completions[0])
    assert found.weight == 0.0  # a row may be left out by its weight
    for most in (length, length - 1):
        rejected = Rejected("f", "skip")
        assert (
            len(list(tokenise([example], Codec(tokenizer), rejected, most))) == (most == length) == 1 - rejected.count
        )


def test_fingerprints_tell_splits_and_names_apart(tmp_path):
    for folder, names in (("a", ("x", "y")), ("b", ("x", "z"))):
        (tmp_path / folder).mkdir()
        for name, text in zip(names, ("one", "two"), strict=True):
            (tmp_path / folder / f"{name}.jsonl").write_text(text)
    whole = [fingerprint(str(tmp_path / folder)) for folder in ("a", "b")]
    parts = [fingerprint(f"{tmp_path}/a:{split}") for split in ("train", "test")]
    assert len({*whole, *parts}) == 4  # the same contents under other names are other data
