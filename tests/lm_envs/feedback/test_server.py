"""The store and the server of a study, asked directly: what is lost, doubled, leaked or forged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lm_envs.feedback import database, server
from lm_envs.feedback.store import StaleAnswer, Store
from lm_envs.feedback.study import Answer, BadAnswer, Item, Response, StudySettings, read_answer, read_settings

pytest.importorskip("starlette")
import anyio
from starlette.testclient import TestClient

from lm_envs.feedback.server import application

EVIL = "<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) ![b](http://x/y) **bold**"


def study(folder: Path, count: int = 3, responses: int = 2, gold: int = 0, **settings: Any) -> Store:
    store = Store(folder, StudySettings("Study", **{"mode": "pair", **settings}))
    items = [
        Item(f"prompt {k}", tuple(Response(f"text {k} {r}", f"policy {r}") for r in range(responses)),
             known=tuple(range(responses)) if k >= count - gold else ())
        for k in range(count)
    ]  # fmt: skip
    store.add_items(items)
    return store


class Page:
    """What the page does, without the page."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.annotator = store, store.annotator(name)
        self.base = f"/a/{store.key(self.annotator)}/"
        self.web = TestClient(application(store, ["testserver"]), raise_server_exceptions=True)

    def get(self, path: str, status: int = 200) -> dict[str, Any]:
        reply = self.web.get(self.base + path)
        assert reply.status_code == status, reply.text
        return reply.json()  # type: ignore[no-any-return]

    def post(self, item: int, answer: Any, version: int = 0, status: int = 200, **options: Any) -> dict[str, Any]:
        reply = self.web.post(f"{self.base}items/{item}", json={"answer": answer, "version": version}, **options)
        assert reply.status_code == status, reply.text
        return reply.json()  # type: ignore[no-any-return]


def test_an_answer_comes_back_in_the_order_of_the_item_whatever_was_shown(tmp_path: Path) -> None:
    store = study(tmp_path, count=12, responses=3, mode="rank")
    page = Page(store, "me")
    orders = set()
    task = page.get("next")
    while task["item"] is not None:
        shown = [text.removeprefix("<p>").removesuffix("</p>\n") for text in task["responses"]]
        # Rank by the last digit of the text, which is the response's place in the item.
        answer = {"ranks": [int(text[-1]) for text in shown], "reasons": [f"because {text}" for text in shown]}
        task = page.post(task["item"], answer)
    for judgment in store.judgments():
        orders.add(judgment.order)
        assert judgment.answer.ranks == (0, 1, 2)
        assert judgment.answer.reasons == tuple(f"because {response.text}" for response in judgment.content.responses)
    assert len(store.judgments()) == 12 and len(orders) > 3


def test_an_answer_is_shown_again_in_the_order_in_which_it_was_given(tmp_path: Path) -> None:
    """Orders of four responses include some that are no swap, whose inverse is another order."""
    page = Page(study(tmp_path, count=12, responses=4, mode="rank"), "me")
    given: dict[int, Any] = {}
    task = page.get("next")
    while task["item"] is not None:
        given[task["item"]] = {"ranks": [2, 0, 1, 3], "reasons": [f"about {text}" for text in task["responses"]]}
        task = page.post(task["item"], given[task["item"]])
    orders = {judgment.order for judgment in page.store.judgments()}
    assert any(order[order[place]] != place for order in orders for place in range(4))
    for item, answer in given.items():
        shown = page.get(f"items/{item}")["answer"]
        assert {name: shown[name] for name in answer} == answer


def test_who_wrote_what_stays_hidden(tmp_path: Path) -> None:
    page = Page(study(tmp_path), "me")
    assert "policy" not in page.web.get(page.base + "next").text + page.web.get(page.base + "study").text


def test_overlap_gold_and_no_item_twice(tmp_path: Path) -> None:
    store = study(tmp_path, count=6, gold=2, overlap=2)
    seen: dict[str, list[int]] = {}
    for name in ("a", "b", "c", "d"):
        number = store.annotator(name)
        while (task := store.next(number)) is not None:
            seen.setdefault(name, []).append(task.item)
            store.answer(number, task.item, Answer(ranks=(0, 1)), 0)
    assert all(items[:2] == [5, 6] for items in seen.values())  # gold items first, for everybody
    assert all(len(set(items)) == len(items) for items in seen.values())
    counts = {item: sum(item in items for items in seen.values()) for item in range(1, 7)}
    assert counts == {1: 2, 2: 2, 3: 2, 4: 2, 5: 4, 6: 4}


def test_gold_items_are_left_to_everybody_and_others_until_enough_have_answered(tmp_path: Path) -> None:
    store = study(tmp_path, count=3, gold=1, overlap=1)
    first, second = Page(store, "first"), Page(store, "second")
    while (task := first.get("next"))["item"] is not None:
        first.post(task["item"], {"ranks": [0, 1]})
    assert store.progress(first.annotator) == (3, 0) and store.progress(second.annotator) == (0, 1)


def test_an_item_that_is_held_is_not_given_to_others_until_it_is_old(tmp_path: Path) -> None:
    now = [1000.0]
    store = study(tmp_path, count=1)
    store.clock = lambda: now[0]
    first, second = store.annotator("a"), store.annotator("b")
    assert store.next(first) is not None and store.next(second) is None
    now[0] += 60 * store.settings.hold_minutes + 1
    assert store.next(second) is not None


def test_two_windows_do_not_collide_and_a_repeated_request_is_no_second_answer(tmp_path: Path) -> None:
    store = study(tmp_path)
    one = Page(store, "me")
    other = Page(store, "me")
    item = one.get("next")["item"]
    assert other.get("next")["item"] == item
    one.post(item, {"ranks": [0, 1], "seconds": 1.0})
    other.post(item, {"ranks": [1, 0], "seconds": 2.0}, status=409)
    one.post(item, {"ranks": [0, 1], "seconds": 1.0})  # the network broke before the reply: the same again
    assert len(store.judgments()) == 1
    with sqlite3.connect(store.path) as database:
        assert database.execute("SELECT count(*) FROM answers").fetchone() == (1,)


def test_back_changes_an_answer_and_taking_it_back_opens_the_item(tmp_path: Path) -> None:
    store = study(tmp_path)
    page = Page(store, "me")
    first = page.get("next")["item"]
    second = page.post(first, {"ranks": [0, 1], "notes": "hm"})["item"]
    back = page.get(f"before?item={second}")
    assert back["item"] == first and back["answer"]["notes"] == "hm" and back["version"] == 1
    page.post(first, {"ranks": [0, 0]}, version=1)
    assert store.judgments()[0].answer.ranks == (0, 0)
    assert page.post(first, None, version=2)["item"] == first
    assert store.judgments() == []


def test_annotators_cannot_reach_each_others_items_or_guess_links(tmp_path: Path) -> None:
    store = study(tmp_path, count=2)
    mine, yours = Page(store, "me"), Page(store, "you")
    item = mine.get("next")["item"]
    yours.post(item, {"ranks": [0, 1]}, status=404)
    yours.get(f"items/{item}", status=404)
    yours.get("items/999", status=404)
    key = store.key(mine.annotator)
    for wrong in (
        key[:-1],
        key[:-1] + ("0" if key[-1] != "0" else "1"),
        "1",
        "1-",
        f"{yours.annotator}-{key[2:]}",
        "é-1",
        "1-%00",
    ):
        assert mine.web.get(f"/a/{wrong}/next").status_code == 404, wrong
    other = tmp_path / "other"
    other.mkdir()
    assert study(other).key(1) != store.key(1)
    assert store.path.stat().st_mode & 0o077 == 0


def test_other_origins_hosts_and_forms_are_refused(tmp_path: Path) -> None:
    page = Page(study(tmp_path), "me")
    item = page.get("next")["item"]
    page.post(item, {"ranks": [0, 1]}, status=403, headers={"origin": "http://evil.example"})
    page.post(item, {"ranks": [0, 1]}, status=403, headers={"origin": "null"})
    form = page.web.post(f"{page.base}items/{item}", content='{"version": 0}', headers={"content-type": "text/plain"})
    assert form.status_code == 415
    assert page.web.get(page.base + "next", headers={"host": "evil.example"}).status_code == 400
    page.post(item, {"ranks": [0, 1]}, headers={"origin": "http://testserver"})
    headers = page.web.get(page.base).headers
    assert "default-src 'none'" in headers["content-security-policy"] and headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in headers


def test_texts_of_others_are_escaped(tmp_path: Path) -> None:
    for markdown in (True, False):
        folder = tmp_path / str(markdown)
        folder.mkdir()
        store = Store(folder, StudySettings("x", markdown=markdown))
        store.add_items([Item([{"role": "user", "content": EVIL}], (Response(EVIL, "a"), Response(EVIL + "2", "b")))])
        task = Page(store, "me").get("next")
        for html in [task["prompt"][0]["html"], *task["responses"]]:
            assert "<script" not in html and "<img" not in html and "<a" not in html and "&lt;script&gt;" in html
            assert ("<strong>bold</strong>" in html) == markdown


def test_paths_lead_nowhere_else(tmp_path: Path) -> None:
    page = Page(study(tmp_path), "me")
    for path in ("/static/../study.py", "/static/%2e%2e/study.py", "/static/page.html", "/", "/a/", "/study.sqlite"):
        assert page.web.get(path).status_code in (404, 405), path


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"ranks": [0]}, {"ranks": [0, 2]}, {"ranks": [0, None]}, {"ranks": [0, True]}, {"ranks": "01"},
        {"ranks": [0.0, 1]},
        {"ranks": [0, 1], "seconds": -1}, {"ranks": [0, 1], "seconds": "1"}, {"ranks": [0, 1], "reasons": ["a"]},
        {"ranks": [0, 1], "flags": [["nope"], []]},
        {"ranks": [0, 1], "notes": "x" * 20_001}, {"ranks": [0, 1], "annotator": "you"},
        {"both_bad": "yes"}, [0, 1], "a", 7, {"ranks": [0, 1], "flags": [[1], []]},
    ],
)  # fmt: skip
def test_broken_answers_are_refused(tmp_path: Path, answer: Any) -> None:
    page = Page(study(tmp_path, count=1), "me")
    page.post(page.get("next")["item"], answer, status=422)
    assert page.store.judgments() == []


def test_strange_bodies_are_refused(tmp_path: Path) -> None:
    page = Page(study(tmp_path, count=1), "me")
    address, kind = f"{page.base}items/{page.get('next')['item']}", {"content-type": "application/json"}
    for body, status in ((b"{", 400), (b"[" * 100_000, 400), (b"x" * 600_000, 413), (b"7", 422), (b"\xff", 400)):
        assert page.web.post(address, content=body, headers=kind).status_code == status, body[:10]
    page.post(1, {"ranks": [0, 1], "notes": "'); DROP TABLE answers; --"})
    assert page.store.judgments()[0].answer.notes == "'); DROP TABLE answers; --"


def test_a_body_in_parts_is_as_long_as_they_are_together() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 300_000, "more_body": True}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()

    with pytest.raises(server._TooLong):
        asyncio.run(server._Guarded(application)({}, receive, receive))


def test_rating_orders_the_responses_and_both_bad_is_a_tie() -> None:
    rate = StudySettings("x", "rate", flags={"harmful": "It harms."})
    answer = read_answer({"ratings": [3, 7, 3], "flags": [["harmful"], [], []]}, rate, 3)
    assert answer.ranks == (1, 0, 1) and answer.flags == (("harmful",), (), ())
    with pytest.raises(BadAnswer, match="1 to 7"):
        read_answer({"ratings": [0, 1, 1]}, rate, 3)
    assert read_answer({"both_bad": True}, StudySettings("x"), 2) == Answer(
        ranks=(0, 0), both_bad=True, flags=((), ()), reasons=("", "")
    )
    assert read_answer({"skipped": "why"}, StudySettings("x"), 2).ranks == ()


def test_forgetting_a_person_takes_all_of_it_away(tmp_path: Path) -> None:
    store = study(tmp_path, count=2)
    page = Page(store, "Jane Doe")
    page.post(page.get("next")["item"], {"ranks": [0, 1], "notes": "a private remark"})
    assert store.forget("Jane Doe") == 1
    assert store.names() == [] and store.judgments() == []
    left = b"".join(path.read_bytes() for path in tmp_path.glob("study.sqlite*"))
    assert b"Jane Doe" not in left and b"a private remark" not in left
    assert page.web.get(page.base + "next").status_code == 404
    with pytest.raises(KeyError, match="no annotator"):
        store.forget("Jane Doe")


def test_settings_are_checked_and_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no study"):
        read_settings(tmp_path)
    path = tmp_path / "study.toml"
    for text, message in (
        ("name = 'x'\nmode = 'pairs'", "mode"),
        ("name = 'x'\noverlaps = 2", "did you mean 'overlap'"),
        ("name = ", "study.toml"),
        ("mode = 'pair'", "name"),
        ("name = 'x'\noverlap = 0", "at least 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_settings(tmp_path)
    path.write_text("\ufeffname = 'x'\nmode = 'rank'\n[flags]\nharmful = 'It harms.'\n", encoding="utf-8")
    assert read_settings(tmp_path) == StudySettings("x", "rank", flags={"harmful": "It harms."})


def test_an_answer_on_an_old_version_is_refused_by_the_store_too(tmp_path: Path) -> None:
    store = study(tmp_path)
    number = store.annotator("a")
    task = store.next(number)
    assert task is not None
    store.answer(number, task.item, Answer(ranks=(0, 1)), 0)
    with pytest.raises(StaleAnswer):
        store.answer(number, task.item, Answer(ranks=(1, 0)), 0)


@pytest.mark.parametrize(("mode", "count"), [("pair", 1), ("pair", 3), ("rank", 1), ("rank", 27)])
def test_an_item_has_as_many_responses_as_can_be_shown(tmp_path: Path, mode: Any, count: int) -> None:
    with pytest.raises(ValueError, match=f"not {count}$"):
        study(tmp_path, responses=count, mode=mode)


def test_the_link_of_a_person_who_was_deleted_is_never_another_s(tmp_path: Path) -> None:
    store = study(tmp_path)
    gone = Page(store, "ann")
    store.forget("ann")
    ben = Page(store, "ben")
    assert gone.base != ben.base and gone.web.get(gone.base + "next").status_code == 404


def test_all_files_of_a_study_are_their_owner_s_alone(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        store = study(tmp_path)
        store.annotator("ann")
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("study.sqlite*")}
    finally:
        os.umask(mask)
    assert "study.sqlite-wal" in modes and set(modes.values()) == {0o600}, modes


def test_numbers_that_no_database_holds_are_refused(tmp_path: Path) -> None:
    page = Page(study(tmp_path), "me")
    item = page.get("next")["item"]
    for wrong in ("99999999999999999999", "-1", "1.0", "٣", "1%00"):
        page.get(f"items/{wrong}", status=404)
        page.get(f"before?item={wrong}", status=404)
    page.post(10**30, {"ranks": [0, 1]}, status=404)
    page.post(item, {"ranks": [0, 1], "seconds": 10**400}, status=422)
    page.post(item, {"ranks": [0, 1]}, version=10**30, status=409)
    assert page.store.judgments() == []


def test_an_answer_that_cannot_be_written_is_not_acknowledged_and_may_be_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database, "_WAIT_S", 0.05)
    page = Page(study(tmp_path), "me")
    item, long = page.get("next")["item"], {"ranks": [0, 1], "notes": "x" * 20_000}
    with contextlib.closing(sqlite3.connect(page.store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        told = page.post(item, long, status=503)["error"]
        other.execute("ROLLBACK")
    assert str(tmp_path) not in told and "another program writes to it" in caplog.text
    with page.store._open(write=True) as full:
        full.execute("PRAGMA max_page_count = 1")  # as many as there are: it does not go below
    page.post(item, long, status=503)
    assert "free some space" in caplog.text and page.store.judgments() == []
    with page.store._open(write=True) as full:
        full.execute("PRAGMA max_page_count = 1000000")
    page.post(item, long)
    assert len(page.store.judgments()) == 1


def test_back_follows_the_order_of_answers_when_the_clock_does_not(tmp_path: Path) -> None:
    store = study(tmp_path, count=4)
    now = iter(range(1000, 0, -1))
    store.clock = lambda: float(next(now))
    page = Page(store, "me")
    task, order = page.get("next"), []
    while task["item"] is not None:
        order.append(task["item"])
        task = page.post(task["item"], {"ranks": [0, 1]})
    found = [page.get("before")["item"]]
    while (earlier := page.get(f"before?item={found[-1]}")["item"]) is not None:
        found.append(earlier)
    assert len(order) == 4 and found == order[::-1]


def test_behind_a_proxy_the_page_s_own_origin_is_taken(tmp_path: Path) -> None:
    page = Page(study(tmp_path), "me")
    page.web = TestClient(application(page.store, ["testserver"], "study.example"))
    item = page.get("next")["item"]
    page.post(item, {"ranks": [0, 1]}, status=403, headers={"origin": "https://evil.example"})
    page.post(item, {"ranks": [0, 1]}, headers={"origin": "https://study.example"})


@pytest.mark.parametrize(
    "text",
    ["*" * 20_000, "[" * 20_000, "_a " * 7_000, "> " * 5_000, "`" * 20_001 + "a", "- " * 5_000, "|a" * 5_000 + "\n|-"],
)
def test_no_text_takes_long_to_show(tmp_path: Path, text: str) -> None:
    page = Page(study(tmp_path, count=0), "me")
    page.store.add_items([Item(text, (Response(text, "a"), Response("b", "b")))])
    begin = time.process_time()
    assert page.get("next")["item"] == 1
    assert time.process_time() - begin < 5


def test_connections_that_break_in_an_answer_stop_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SLOWEST_S", 1.0)
    page = Page(study(tmp_path), "me")
    app, item = page.web.app, page.get("next")["item"]
    statuses: dict[str, list[int]] = {"POST": [], "GET": []}

    async def ask(method: str, path: str) -> None:
        async def receive() -> dict[str, Any]:
            if method == "POST":
                await anyio.sleep_forever()  # the headers came, the rest never does
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses[method].append(message["status"])
                assert method == "POST" or statuses["POST"] == []

        headers = [(b"host", b"testserver"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": page.base + path, "headers": headers, "query_string": b""}
        await app(scope, receive, send)

    async def all_at_once() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(ask, "POST", f"items/{item}")
            await anyio.sleep(0.1)
            await ask("GET", "next")

    anyio.run(all_at_once)
    assert statuses == {"POST": [408] * 100, "GET": [200]}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"])
def test_other_methods_do_nothing(tmp_path: Path, method: str) -> None:
    page = Page(study(tmp_path), "me")
    item = page.get("next")["item"]
    for path in ("", "next", "study", f"items/{item}"):
        reply = page.web.request(method, page.base + path, content='{"answer": {"ranks": [0, 1]}, "version": 0}')
        assert reply.status_code == 405 and "access-control-allow-origin" not in reply.headers
    assert page.store.judgments() == []


def test_of_two_answers_at_the_same_moment_one_counts(tmp_path: Path) -> None:
    page = Page(study(tmp_path), "me")
    item = page.get("next")["item"]
    address, found = f"{page.base}items/{item}", []

    def post(k: int) -> None:
        body = {"answer": {"ranks": [0, 1], "notes": f"from window {k}"}, "version": 0}
        found.append(page.web.post(address, json=body).status_code)

    threads = [threading.Thread(target=post, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200] + [409] * 7 and len(page.store.judgments()) == 1
