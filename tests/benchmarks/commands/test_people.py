"""``lm-envs people`` from a study to a reward model's data, by commands alone."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
import urllib.request
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
    items = [[store.item(number) for number in (1, 2)] for store in stores]
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
    """Nothing acknowledged is lost or doubled, and 95 of 100 answers take less than 50 ms while nobody kills."""
    study, people, each = tmp_path / "study", 20, 200
    path = texts(tmp_path / "t.jsonl", people * each // 4)
    main(["people", "new", "--out", str(study), "--texts", str(path), "--mode", "rank", "--overlap", "4"])
    store = Store(study, read_settings(study))
    base = "http://127.0.0.1:8641"
    links = {name: f"{base}/a/{store.key(store.annotator(name))}/" for name in (f"p{k}" for k in range(people))}
    serve = [sys.executable, "-m", "lm_envs.benchmarks.cli", "people", "serve", str(study), "--port", "8641"]

    def ask(address: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.loads(reply.read())

    def patiently(address: str, body: Any = None) -> Any:
        while True:
            try:
                return ask(address, body)
            except urllib.error.HTTPError:
                raise
            except OSError:
                time.sleep(0.05)

    acknowledged: list[tuple[str, int]] = []
    times: list[float] = []

    def work(name: str, limit: int) -> None:
        task = patiently(links[name] + "next")
        for _ in range(limit):
            if task["item"] is None:
                return
            item, begin = task["item"], time.monotonic()
            task = patiently(f"{links[name]}items/{item}", {"answer": {"ranks": [0, 1, 2]}, "version": task["version"]})
            times.append(time.monotonic() - begin)
            acknowledged.append((name, item))

    server = subprocess.Popen(serve, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    threads = [threading.Thread(target=work, args=(name, each // 2)) for name in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quiet = sorted(times)
    print(f"p95 of an answer: {1000 * quiet[int(0.95 * len(quiet))]:.0f} ms")
    threads = [threading.Thread(target=work, args=(name, each)) for name in links]
    for thread in threads:
        thread.start()
    for _ in range(20):
        time.sleep(0.4)
        server.kill()
        server.wait()
        server = subprocess.Popen(serve, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    for thread in threads:
        thread.join()
    server.kill()
    found = [(judgment.annotator, judgment.item) for judgment in store.judgments()]
    assert len(found) == len(set(found)) == people * each
    assert set(acknowledged) <= set(found)
