"""What a study shows to whom, and what its files hold, computed here a second time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_envs import rng
from lm_envs.feedback import exchange
from lm_envs.feedback.store import Judgment, Store
from lm_envs.feedback.study import Answer, Item, Response, StudySettings, dense_ranks, read_answer

CHAT = [{"role": "user", "content": "Hi"}]


def item(number: int, known: tuple[int, ...] = (), responses: int = 3) -> Item:
    given = tuple(Response(f"text {k} of {number}", f"policy {k}") for k in range(responses))
    return Item(f"p{number}", given, known=known, columns={"n": number})


def store(folder: Path, *items: Item, now: list[float] | None = None, **settings: Any) -> Store:
    found = Store(folder, StudySettings("s", "rank", **settings), (lambda: now[0]) if now else (lambda: 0.0))
    found.add_items(items)
    return found


def test_items_are_kept_whole_and_once(tmp_path: Path) -> None:
    given = [item(1), item(2, known=(0, 1, 1)), Item("p1", (Response("other", "a"), Response("texts", "b")))]
    found = store(tmp_path, *given)
    assert found.add_items([*given, item(3)]) == 4
    assert list(found.items().values()) == [*given, item(3)]


def test_the_order_shown_is_that_of_counted_numbers(tmp_path: Path) -> None:
    found, orders = store(tmp_path, *map(item, range(20)), seed=7), set()
    people = [found.annotator(name) for name in ("ann", "ben")]
    for person in people:
        while (task := found.next(person)) is not None:
            keys = [
                float(rng.uniform(7, rng.ORDER, np.array([task.item]), np.array([1000 * person + k]))[0])
                for k in range(3)
            ]
            assert task.order == tuple(sorted(range(3), key=lambda k: keys[k]))
            orders.add((person, task.item, task.order))
            found.answer(person, task.item, Answer(ranks=(0, 1, 2)), task.version)
    for judgment in found.judgments():
        person = people[["ann", "ben"].index(judgment.annotator)]
        assert (person, judgment.item, judgment.order) in orders
    assert len({order for *_, order in orders}) == 6 and len({key[:2] for key in orders}) == 20


def test_the_next_item_is_the_one_that_fewest_answered_or_hold(tmp_path: Path) -> None:
    now = [0.0]
    found = store(tmp_path, *map(item, range(1, 5)), item(9, known=(0, 1, 2)), now=now, overlap=2, hold_minutes=10)
    ann, ben, cy, dan, eve = (found.annotator(name) for name in ("ann", "ben", "cy", "dan", "eve"))

    def do(person: int, until: int) -> list[int]:
        """The items that a person is given and answers, the last one only given."""
        given = []
        while (task := found.next(person)) is not None:
            given.append(task.item)
            if len(given) == until:
                break
            found.answer(person, task.item, Answer(ranks=(0, 1, 2)), task.version)
        return given

    assert do(ann, 3) == [5, 1, 2]  # the gold item, then in their order; 2 is held
    assert do(ben, 3) == [5, 3, 4]
    assert do(cy, 4) == [5, 1, 2, 3]  # each had one; now 1 has two answers, 2 and 3 one answer or hold and one hold
    now[0] = 9 * 60
    assert do(dan, 2) == [5, 4]
    assert found.next(eve).item == 5 and do(eve, 99) == [5]  # all have two
    now[0] = 11 * 60
    assert found.next(eve).item == 2 and found.next(ann).item == 2  # what was held too long is free, and still ann's
    assert [found.progress(person) for person in (ann, eve)] == [(2, 3), (1, 3)]
    found.answer(ann, 2, Answer(ranks=(0, 1, 2)), 0)
    found.answer(ann, 2, None, 1)  # taken back: comes before the other one that waits
    now[0] += 60
    found.answer(eve, 2, Answer(ranks=(0, 1, 2)), 0)
    assert found.next(eve).item == 3
    assert found.next(ann).item == 2


def test_what_was_taken_back_is_asked_for_before_what_was_never_answered(tmp_path: Path) -> None:
    now = [0.0]
    found = store(tmp_path, *map(item, range(1, 5)), now=now)
    ann = found.annotator("ann")
    assert found.next(ann).item == 1
    found.answer(ann, 1, Answer(ranks=(0, 1, 2)), 0)
    assert found.next(ann).item == 2
    now[0] = 5.0
    found.take(item(4), "ann", Answer(ranks=(0, 0, 1)))
    found.answer(ann, 4, None, 1)
    assert found.next(ann).item == 4  # although 2 was shown before


def test_answers_that_are_read(tmp_path: Path) -> None:
    rate, pair = StudySettings("s", "rate", scale=5, flags={"bad": "b", "sad": "s"}), StudySettings("s", "pair")
    body = {"ratings": [2, 5, 2], "flags": [["bad"], [], ["sad", "sad"]], "reasons": ["x", "", "y"], "notes": "n"}
    assert read_answer({**body, "seconds": 3}, rate, 3) == Answer(
        (1, 0, 1), (2, 5, 2), False, (("bad",), (), ("sad",)), ("x", "", "y"), "n", "", 3.0
    )
    assert read_answer({"skipped": "why", "seconds": 2.5}, rate, 2).seconds == 2.5
    for ratings in ([0, 1], [1, 6]):
        with pytest.raises(ValueError, match="from 1 to 5"):
            read_answer({"ratings": ratings}, rate, 2)
    with pytest.raises(ValueError, match="from 0 to 1"):
        read_answer({"ranks": [0, 2]}, pair, 2)
    assert read_answer({"both_bad": True, "ranks": [0, 1]}, pair, 2).ranks == (0, 0)
    assert read_answer({"ranks": [1, 1]}, pair, 2).ranks == (0, 0) and dense_ranks([5, 2, 2, 9]) == (1, 0, 0, 2)


def judged() -> list[Judgment]:
    answers = {
        ("ann", 1): Answer((0, 1, 2), (7, 4, 2), False, (("bad",), (), ()), ("x", "", "z"), "hm", "", 4.5),
        ("ben", 1): Answer((0, 2, 1), reasons=("", "", "")),
        ("cy", 1): Answer((1, 0, 0), reasons=("", "", "")),
        ("ann", 2): Answer((0, 0), both_bad=True, reasons=("", "")),
        ("ben", 2): Answer(skipped="why", seconds=3.0),
    }
    return [
        Judgment(who, number, item(number, responses=4 - number), ((2, 0, 1) if number == 1 else (1, 0)), answer, 0.0)
        for (who, number), answer in answers.items()
    ]


def test_rows_say_everything_once(tmp_path: Path) -> None:
    rows = list(exchange.kwise(judged()))
    assert [row["annotator"] for row in rows] == ["ann", "ben", "cy", "ann"]
    first = {
        "prompt": "p1",
        "completions": [f"text {k} of 1" for k in range(3)],
        "ranks": [0, 1, 2],
        "annotator": "ann",
    }
    first |= {"reasons": ["x", "", "z"], "sources": [f"policy {k}" for k in range(3)], "shown": [2, 0, 1]}
    # ann and ben say 0 before 1 and 0 before 2; of 1 and 2 each says something else
    first |= {"seconds": 4.5, "ratings": (7, 4, 2), "flags": (("bad",), (), ()), "notes": "hm"}
    first |= {"agreement": round((2 / 3 + 2 / 3 + 1 / 3) / 3, 4)}
    assert rows[0] == first and rows[2]["agreement"] == round(1 / 3, 4)
    assert rows[3]["both_bad"] is True and rows[3]["agreement"] == 1
    assert not {"both_bad", "flags", "notes", "ratings"} & set(rows[1])
    tied = Judgment("dan", 3, item(3), (0, 1, 2), Answer((0, 0, 0)), 0.0)
    assert "both_bad" not in next(exchange.kwise([tied]))
    pairs = [(row["annotator"], row["chosen"][5], row["rejected"][5]) for row in exchange.pairs(judged())]
    expected = [("ann", *"01"), ("ann", *"02"), ("ann", *"12"), ("ben", *"01"), ("ben", *"02"), ("ben", *"21")]
    assert pairs == [*expected, ("cy", *"10"), ("cy", *"20")]
    assert [row["annotator"] for row in exchange.preferences(tmp_path, judged())] == ["ann", "ben", "cy"]
    assert exchange.write(tmp_path / "rows.csv", judged(), "csv") == 4
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert set(read[0]) == {*first, "both_bad"}
    for row, found in zip(rows, read, strict=True):
        for name, cell in found.items():
            told = row.get(name, "")
            assert cell == (json.dumps(told) if isinstance(told, list | tuple) else str(told))


def test_empty_responses_take_all_that_was_said_of_them_along() -> None:
    answer = Answer((1, 0, 2), (4, 6, 2), False, (("bad",), ("sad",), ()), ("x", "y", "z"))
    given = Item(CHAT, tuple(Response(text, text or "none") for text in ("a", "", "c")))
    (row,) = map(exchange._without_empty, exchange.kwise([Judgment("ann", 1, given, (1, 2, 0), answer, 0.0)]))
    assert [each[-1]["content"] for each in row["completions"]] == ["a", "c"] and row["sources"] == ["a", "c"]
    assert (row["ranks"], row["ratings"], row["flags"], row["reasons"]) == ([1, 2], [4, 2], [("bad",), ()], ["x", "z"])
    assert row["shown"] == [1, 0]  # the last one was shown before the first


@pytest.mark.parametrize(("selected", "ranks"), [("left", (0, 1)), ("right", (1, 0)), ("same", (0, 0))])
def test_what_label_studio_says(tmp_path: Path, selected: str, ranks: tuple[int, int]) -> None:
    pair = {"type": "pairwise", "to_name": "x, y", "value": {"selected": selected}}
    ranked = {"type": "ranker", "to_name": "l", "value": {"ranker": {"best": ["c", "a"]}}}
    listed = [{"id": "a", "html": "1"}, {"id": "b", "title": "2", "html": "h", "body": "B"}, {"id": "c", "title": "3"}]
    people: list[Any] = [7, {"id": 3}, {"id": 4, "email": "e"}]
    rows = [
        {"data": data, "annotations": [{"completed_by": who, "result": [result]} for who in people]}
        for data, result in (({"question": "q", "y": "Y", "x": "X"}, pair), ({"context": "c", "list": listed}, ranked))
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = exchange.read(tmp_path / "a.json")
    assert [who for _, who, _ in found] == ["7", "3", "e"] * 2 and {answer.seconds for *_, answer in found} == {0.0}
    assert [response.text for response in found[0][0].responses] == ["X", "Y"] and found[0][2].ranks == ranks
    assert [response.text for response in found[3][0].responses] == ["1", "B", "3"]
    assert found[3][2].ranks == (1, 2, 0)  # what was left out is behind the rest
    assert (found[0][0].prompt, found[3][0].prompt) == ("q", "c")


def test_judges_of_battles_and_rankings(tmp_path: Path) -> None:
    battle = {"model_a": "m", "model_b": "n", "prompt": "p", "response_a": "x", "response_b": "y", "winner": "tie"}
    ranking = {"fields": {"instruction": "i", "b": "B", "a": "A", "c": "C"}}
    ranking["responses"] = {"r": [{"value": ["c", "a", "b"]}, {"value": ["a", "b"], "user_id": "u"}]}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [battle, battle | {"judge": "j"}, ranking])))
    found = exchange.read(tmp_path / "a.jsonl")
    assert [who for _, who, _ in found] == ["unknown", "j", "unknown", "u"]
    assert [answer.both_bad for *_, answer in found] == [False] * 4
    assert [(response.text, response.source) for response in found[2][0].responses] == [
        ("B", "b"),
        ("A", "a"),
        ("C", "c"),
    ]
    assert found[2][2].ranks == (2, 1, 0) and found[3][2].ranks == (1, 0)


def test_the_page_gives_and_takes_each_list_in_the_order_shown(tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    from starlette.testclient import TestClient

    from lm_envs.feedback.server import application

    found = Store(tmp_path, StudySettings("s", "rate", scale=9, flags={"bad": "b", "sad": "s"}, markdown=False, seed=2))
    found.add_items(map(item, range(4)))
    ann = found.annotator("ann")
    web, base = TestClient(application(found, ["testserver"])), f"/a/{found.key(ann)}/"
    told, moved = web.get(base + "next").json(), 0
    for number in range(4):
        assert (told["done"], told["left"]) == (number, 4 - number)
        order = found.task(ann, told["item"]).order
        texts = [found.items()[told["item"]].responses[place].text for place in order]
        assert told["responses"] == [f'<div class="plain">{text}</div>' for text in texts]
        said = {"ratings": [3, 1, 8], "flags": [["bad"], [], ["sad", "bad"]], "reasons": ["x", "y", ""]}
        web_item, moved = told["item"], moved + (order not in ((0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)))
        told = web.post(f"{base}items/{web_item}", json={"answer": said, "version": 0}).json()
        answer = found.task(ann, web_item).answer
        assert answer is not None
        for name, values in (*said.items(), ("ranks", [1, 2, 0])):
            stored = [getattr(answer, name)[place] for place in order]
            assert [list(each) if isinstance(each, tuple) else each for each in stored] == values
        again = web.get(f"{base}items/{web_item}").json()["answer"]
        assert {name: again[name] for name in said} == said and again["ranks"] == [1, 2, 0]
    assert moved and (told["done"], told["left"], told["item"]) == (4, 0, None)  # an order that is no exchange of two
    first, second = web.get(base + "before").json()["item"], web.get(f"{base}before?item={web_item}").json()["item"]
    assert first == web_item != second
