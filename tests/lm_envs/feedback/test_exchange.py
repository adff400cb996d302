"""Answers as files, and other tools' exports as a study."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lm_envs.data.dataset import Examples
from lm_envs.feedback import exchange
from lm_envs.feedback.store import Judgment
from lm_envs.feedback.study import Answer, Item, Response

CHAT = [{"role": "user", "content": "Hi"}]


def judgment(prompt: Any, ranks: tuple[int, ...], **said: Any) -> Judgment:
    item = Item(prompt, tuple(Response(f"text {k}", f"policy {k}") for k in range(3)))
    return Judgment("ann", 1, item, (2, 0, 1), Answer(ranks=ranks, reasons=("x", "", ""), **said), 0.0)


def test_kwise_rows_are_what_the_data_room_reads(tmp_path: Path) -> None:
    found = [
        judgment("Say it", (1, 0, 1)),
        judgment(CHAT, (0, 1, 2), notes="n"),
        judgment("skip me", (), skipped="why"),
    ]
    assert exchange.write(tmp_path / "a.jsonl", found, "kwise") == 2
    read = list(Examples(tmp_path / "a.jsonl", "preferences"))
    assert [example.ranks for example in read] == [(1, 0, 1), (0, 1, 2)]
    assert read[0].completions == ("text 0", "text 1", "text 2")
    assert read[1].prompt == CHAT and read[1].completions[0] == [{"role": "assistant", "content": "text 0"}]


def test_nothing_learns_from_empty_responses(tmp_path: Path) -> None:
    """A policy may end at once: the others are still ranked."""
    item = Item("p", tuple(Response(text, "x") for text in ("one", " \n", "two")))
    found = [
        Judgment("ann", 1, item, (2, 1, 0), Answer(ranks=ranks, reasons=("a", "b", "c")), 0.0)
        for ranks in ((2, 0, 1), (0, 1, 0))
    ]
    (row,) = exchange.preferences(tmp_path, found)
    assert (row["completions"], row["ranks"], row["reasons"], row["shown"]) == (
        ["one", "two"],
        [2, 1],
        ["a", "c"],
        [1, 0],
    )


def test_pairs_are_the_decided_comparisons(tmp_path: Path) -> None:
    assert exchange.write(tmp_path / "p.jsonl", [judgment("Say it", (1, 0, 1))], "pairs") == 2
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().split("\n") if line]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("text 1", "text 0"), ("text 1", "text 2")]
    assert len(list(Examples(tmp_path / "p.jsonl", "preferences"))) == 2


def test_csv_holds_everything(tmp_path: Path) -> None:
    exchange.write(tmp_path / "c.csv", [judgment('a "quoted",\nprompt', (0, 1, 2), both_bad=True)], "csv")
    (row,) = csv.DictReader((tmp_path / "c.csv").open(newline=""))
    assert row["prompt"] == 'a "quoted",\nprompt' and json.loads(row["ranks"]) == [0, 1, 2]
    assert json.loads(row["sources"]) == ["policy 0", "policy 1", "policy 2"]


def label_studio(result: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": 7,
        "data": data,
        "annotations": [
            {
                "completed_by": {"id": 3, "email": "a@b.c"},
                "was_cancelled": False,
                "lead_time": 12.5,
                "result": [result],
            },
            {"completed_by": 4, "was_cancelled": True, "result": [result]},
        ],
    }


def test_label_studio(tmp_path: Path) -> None:
    pair = {"type": "pairwise", "from_name": "pw", "to_name": "text1,text2", "value": {"selected": "right"}}
    ranked = {"type": "ranker", "from_name": "r", "to_name": "l", "value": {"ranker": {"rank": ["b", "a"]}}}
    items = [{"id": "a", "title": "A", "body": "first"}, {"id": "b", "title": "B", "body": "second"}]
    rows = [
        label_studio(pair, {"prompt": "p", "text1": "one", "text2": "two"}),
        label_studio(ranked, {"prompt": "q", "items": items}),
    ]
    (path := tmp_path / "ls.json").write_text(json.dumps(rows))
    first, second = exchange.read(path)
    assert first[0].prompt == "p" and [r.text for r in first[0].responses] == ["one", "two"]
    assert first[1] == "a@b.c" and first[2].ranks == (1, 0) and first[2].seconds == 12.5
    assert [r.text for r in second[0].responses] == ["first", "second"] and second[2].ranks == (1, 0)


def test_drafts_and_what_was_discarded_are_no_answers(tmp_path: Path) -> None:
    said = [{"value": ["a", "b"], "user_id": k, "status": k} for k in ("draft", "discarded", "submitted")]
    row = {"fields": {"prompt": "p", "a": "one", "b": "two"}, "responses": {"preference": said}}
    (path := tmp_path / "a.json").write_text(json.dumps([row]))
    assert [who for _, who, _ in exchange.read(path)] == ["submitted"]


@pytest.mark.parametrize(
    "value", [["response-2", "response-1"], [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}]]
)
def test_argilla(tmp_path: Path, value: Any) -> None:
    row = {
        "id": "1",
        "fields": {"prompt": "p", "response-1": "one", "response-2": "two"},
        "responses": {"preference": [{"value": value, "user_id": "u"}], "comment": [{"value": "fine", "user_id": "u"}]},
    }
    (path := tmp_path / "a.json").write_text("\ufeff" + json.dumps([row]), encoding="utf-8")
    ((item, who, answer),) = exchange.read(path)
    assert who == "u" and answer.ranks == (1, 0) and [r.source for r in item.responses] == ["response-1", "response-2"]


def test_battles(tmp_path: Path) -> None:
    def talk(text: str) -> list[dict[str, str]]:
        return [*CHAT, {"role": "assistant", "content": text}]

    row = {"model_a": "m1", "model_b": "m2", "judge": "j", "conversation_a": talk("one"), "conversation_b": talk("two")}
    lines = [json.dumps(row | {"winner": winner}) for winner in ("model_b", "tie (bothbad)", "model_a", "tie")]
    (path := tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    found = exchange.read(path)
    assert [answer.ranks for _, _, answer in found] == [(1, 0), (0, 0), (0, 1), (0, 0)]
    assert [answer.both_bad for _, _, answer in found] == [False, True, False, False]
    # Later ones have messages in parts, and a name of their own for two bad answers.
    parts = {name: [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in row[name]]
             for name in ("conversation_a", "conversation_b")}  # fmt: skip
    path.write_text(json.dumps(row | parts | {"winner": "both_bad"}))
    (later,) = exchange.read(path)
    assert later[0] == found[0][0] and later[2].both_bad and later[2].ranks == (0, 0)
    assert found[0][0].prompt == CHAT and [r.source for r in found[0][0].responses] == ["m1", "m2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "neither JSON nor JSONL"),
        ("[1]", "row 1: not an object"),
        ('[{"a": 1}]', "row 1: neither Label Studio's"),
        (
            '[{"model_a": "a", "model_b": "b", "winner": "c", "prompt": "p", "response_a": "x", "response_b": "y"}]',
            "'c'",
        ),
        ('[{"data": {"prompt": "p"}, "annotations": [{"result": [{"type": "pairwise"}]}]}]', "there is no 'value'"),
        ('[{"fields": {"prompt": "p"}, "responses": {"r": [{"value": ["z", "y"]}]}}]', "not among the fields"),
    ],
)
def test_broken_exports_are_one_line_with_the_row(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        exchange.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
