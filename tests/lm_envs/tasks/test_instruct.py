"""Instructions: what ships, the user's files, IFEval's columns, and the task with a small model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lm_envs.reward.constraints import KINDS, met
from lm_envs.tasks import instruct, prompted
from tests.lm_envs import byo

ROWS = prompted.read(prompted.SHIPPED / "instruct.jsonl", instruct._row)


def test_what_ships():
    splits = Counter(row["split"] for row in ROWS)
    assert splits == {"train": 216, "validation": 36, "test": 108} and len({row["prompt"] for row in ROWS}) == 360
    kinds = Counter(one["kind"] for row in ROWS for one in row["constraints"])
    assert len(kinds) >= 20 and min(kinds.values()) >= 30 and set(kinds) <= set(KINDS)
    held = Counter(one["kind"] for row in ROWS if row["split"] == "test" for one in row["constraints"])
    assert set(held) == set(kinds) and {len(row["constraints"]) for row in ROWS} == {1, 2, 3}
    for split in ("train", "validation"):  # no topic is in two splits
        named = {tuple(row["topic"]) for row in ROWS if row["split"] == split and row["topic"]}
        assert named and not named & {tuple(row["topic"]) for row in ROWS if row["split"] == "test" and row["topic"]}


def test_an_answer_to_a_shipped_prompt_by_hand():
    row = next(row for row in ROWS if [one["kind"] for one in row["constraints"]] == ["bullets", "avoid"])
    count, word = row["constraints"][0]["least"], row["topic"][-1]
    row = {**row, "constraints": [row["constraints"][0], {"kind": "avoid", "words": ["zebra"]}]}
    text = "".join(f"- a {word}\n" for _ in range(count))
    columns = {"constraints": [row["constraints"]] * 3, "topic": [row["topic"]] * 3}
    assert instruct.judge([text, text.replace(word, "thing"), text + "- zebra"], **columns) == [1.0, 0.0, 0.0]
    assert instruct.judge(["Ja."], constraints=[[{"kind": "no_commas"}]], topic=[None]) == [1.0]


def test_ifeval_columns(tmp_path: Path):
    asked = {
        "length_constraints:number_words": {"num_words": 5, "relation": "less than"},
        "keywords:letter_frequency": {"letter": "a", "let_frequency": 2, "let_relation": "at least"},
        "detectable_format:title": None,
        "detectable_format:constrained_response": {},
        "language:response_language": {"language": "de"},
    }
    given = {"prompt": "Say", "instruction_id_list": list(asked), "kwargs": list(asked.values()), "key": 1}
    row = prompted.read(byo.write_jsonl(tmp_path / "f.jsonl", [{**given, "prompt": p} for p in "abcd"]), instruct._row)[
        0
    ]
    length, letters, title, one_of, language = row["constraints"]
    assert length == {"kind": "words", "most": 4} and letters == {"kind": "letter", "letter": "a", "least": 2}
    assert met("<<A tale>>", title) and met("My answer is yes.", one_of) and language["name"] == "german"
    assert len(instruct._IFEVAL) == 25


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "line 1: 'constraints' must be a list"),
        ({"prompt": "", "constraints": []}, "line 1: 'prompt' must be a text"),
        ({"prompt": "p", "constraints": [{"kind": "rhyme"}]}, "line 1: no kind of constraint 'rhyme'"),
        ({"prompt": "p", "constraints": [{"kind": "json"}], "topic": "bee"}, "'topic' must be a list of texts"),
        ({"prompt": "p", "constraints": [{"kind": "json"}], "split": "dev2"}, "'split' must be one of"),
        ({"prompt": "p", "instruction_id_list": ["a:b"], "kwargs": [{}]}, "no instruction 'a:b' of IFEval"),
        ({"prompt": "p", "instruction_id_list": ["a:b"], "kwargs": []}, "lists of one length"),
        (
            {"prompt": "p", "instruction_id_list": ["startend:end_checker"], "kwargs": [{}]},
            "'startend:end_checker' lack 'end_phrase'",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict, message: str):
    path = byo.write_jsonl(tmp_path / "f.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        prompted.read(path, instruct._row)
