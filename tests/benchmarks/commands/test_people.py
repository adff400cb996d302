"""``lm-envs people`` from a study to a reward model's data, by commands alone."""

from __future__ import annotations

import http.client
import io
import json
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.feedback.store import Store
from lm_envs.feedback.study import read_settings
from tests.house import CHECKOUT
from tests.lm_envs import byo

pytest.importorskip("krippendorff")


def texts(path: Path, count: int = 40) -> Path:
    rows = [
        {
            "prompt": f"prompt {k}",
            "completions": [f"{name} {k}" for name in "abc"],
            "sources": ["weak", "middle", "strong"],
        }
        for k in range(count)
    ]
    return byo.write_jsonl(path, rows)


def test_from_texts_to_ratings_and_rows_of_data(tmp_path: Path, capsys: Any) -> None:
    study = tmp_path / "study"
    main(
        [
            "people",
            "new",
            "--out",
            str(study),
            "--texts",
            str(texts(tmp_path / "t.jsonl")),
            "--mode",
            "rank",
            "--overlap",
            "2",
        ]
    )
    simulate = [
        "people",
        "simulate",
        str(study),
        "--annotators",
        "2",
        "--strength",
        "weak=-2",
        "--strength",
        "strong=2",
    ]
    main(simulate)
    capsys.readouterr()
    main(["people", "results", str(study), "--json"])
    told = capsys.readouterr().out
    found = json.loads(told)
    assert "NaN" not in told  # which is no JSON
    assert [row["source"] for row in found["Ratings"]] == ["strong", "middle", "weak"]
    assert [row["answers"] for row in found["Annotators"]] == [40, 40]
    agreement = {row["measure"]: row["value"] for row in found["Agreement between annotators"]}
    assert 0.6 < agreement["raw agreement of two people"] < 1
    main(["people", "results", str(study)])
    told = capsys.readouterr().out
    assert "Bradley-Terry" in told and "nan" not in told
    main(["people", "export", str(study), str(tmp_path / "out.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n") if line]
    assert len(rows) == 80 and sorted(rows[0]["ranks"]) == [0, 1, 2]
    main(["data", "check", str(study), "--use", "preferences"])
    assert "80" in capsys.readouterr().out


def test_pairs_of_two_policies_are_sampled_by_counted_numbers(tmp_path: Path) -> None:
    policy = byo.make(tmp_path / "byo").options["policy"]
    prompts = byo.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the old cat"}, {"prompt": "a bird saw the"}])
    new = ["people", "new", "--policy", policy, "--prompts", str(prompts), "--max-new-tokens", "5"]
    for name in ("one", "two"):
        main([*new, "--out", str(tmp_path / name), "--temperature", "1.0", "0.5"])
    stores = [Store(tmp_path / name, read_settings(tmp_path / name)) for name in ("one", "two")]
    items = [[store.items()[number] for number in (1, 2)] for store in stores]
    assert items[0] == items[1]
    assert [r.source for r in items[0][0].responses] == [f"{policy} at temperature {t}" for t in ("1", "0.5")]
    assert all(response.text for item in items[0] for response in item.responses)


def test_the_terminal_gives_the_page_s_answers(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    study = tmp_path / "study"
    main(["people", "new", "--out", str(study), "--texts", str(texts(tmp_path / "t.jsonl", 3)), "--mode", "rank"])
    monkeypatch.setattr("sys.stdin", io.StringIO("xyz\nc(ab)\ns no idea\nu\nabc\nq\n"))
    main(["people", "rank", str(study), "--annotator", "ann"])
    assert "'xyz' is no ranking of 3 responses" in capsys.readouterr().out
    store = Store(study, read_settings(study))
    first, second = store.judgments()
    shown = {place: rank for place, rank in zip(first.order, (1, 1, 0), strict=True)}
    assert first.answer.ranks == tuple(shown[place] for place in range(3))
    assert not second.answer.skipped and len(second.answer.ranks) == 3  # "u" went back to what was skipped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["new", "--out", "OUT"], "say where responses come from"),
        (["new", "--out", "OUT", "--policy", "x"], "--policy needs --prompts"),
        (["new", "--out", "OUT", "--texts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["new", "--out", "OUT", "--comparison", "nowhere"], "found runs of none"),
        (["serve", "OUT"], "is no study"),
        (["results", "OUT"], "is no study"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: Any, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["people", *[str(tmp_path / "OUT") if word == "OUT" else word for word in words]])
    assert caught.value.code not in (0, None)
    told = capsys.readouterr().err.strip()
    assert message in told and len(told.split("\n")) == 1


@pytest.mark.slow
def test_twenty_people_at_once_and_twenty_kills(tmp_path: Path) -> None:
    """Nothing acknowledged is lost or doubled, and 95 of 100 answers take less than 50 ms while nobody kills.

    An answer takes a person half a second here: 40 answers a second.
    """
    study, people, each, kills = tmp_path / "study", 20, 200, 20
    path = texts(tmp_path / "t.jsonl", people * each // 4)
    main(["people", "new", "--out", str(study), "--texts", str(path), "--mode", "rank", "--overlap", "4"])
    store = Store(study, read_settings(study))
    links = {name: f"/a/{store.key(store.annotator(name))}/" for name in (f"p{k}" for k in range(people))}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "lm_envs.benchmarks.cli", "people", "serve", str(study), "--port", str(port)]
    acknowledged: list[tuple[str, int]] = []
    times: list[float] = []

    def work(name: str, limit: int, thinking: float) -> None:
        web = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

        def ask(method: str, path: str, body: str | None = None) -> Any:
            while True:
                try:
                    web.request(method, links[name] + path, body, {"Content-Type": "application/json"})
                    reply = web.getresponse()
                    told = reply.read()
                    assert reply.status == 200, told
                    return json.loads(told)
                except (OSError, http.client.HTTPException):
                    web.close()
                    time.sleep(0.05)

        choose = random.Random(name)
        task = ask("GET", "next")
        for _ in range(limit):
            time.sleep(choose.uniform(0, 2 * thinking))
            item, begin = task["item"], time.monotonic()
            body = json.dumps({"answer": {"ranks": [0, 1, 2]}, "version": task["version"]})
            task = ask("POST", f"items/{item}", body)
            times.append(time.monotonic() - begin)
            acknowledged.append((name, item))

    def working(limit: int, thinking: float) -> list[threading.Thread]:
        threads = [threading.Thread(target=work, args=(name, limit, thinking)) for name in links]
        for thread in threads:
            thread.start()
        return threads

    server = subprocess.Popen(serve, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    work("p0", 1, 0.0)  # waits until the server is up
    times.clear()
    for thread in working(each // 2, 0.5):
        thread.join()
    quiet = sorted(times)
    print(f"an answer: median {1000 * quiet[len(quiet) // 2]:.0f}, p95 {1000 * quiet[int(0.95 * len(quiet))]:.0f} ms")
    threads, moment = working(each // 2 - 1, 0.5), random.Random(0)
    for _ in range(kills):
        before = len(acknowledged)
        while len(acknowledged) == before:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 1))
        assert any(thread.is_alive() for thread in threads)
        server.kill()
        server.wait()
        server = subprocess.Popen(serve, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    for thread in threads:
        thread.join()
    work("p0", 0, 0.0)
    server.kill()
    found = [(judgment.annotator, judgment.item) for judgment in store.judgments()]
    assert len(found) == len(set(found)) == len(acknowledged) == len(set(acknowledged)) == people * (each - 1) + 1
    assert set(acknowledged) == set(found)
    versions = sqlite3.connect(store.path).execute("SELECT count(*), max(version) FROM answers").fetchone()
    assert versions == (len(found), 1)  # a request that was sent again made no second version
    assert quiet[int(0.95 * len(quiet))] < 0.05
