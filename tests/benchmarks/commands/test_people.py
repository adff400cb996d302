"""``lm-envs people`` from a study to a reward model's data, by commands alone."""

from __future__ import annotations

import http.client
import io
import itertools
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_envs.algos.engine.judged_pairs import fresh
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.commands.people_items import sampled
from lm_envs.benchmarks.commands.people_loop import Loop, scores_of
from lm_envs.benchmarks.report.human import add_people, correlation
from lm_envs.benchmarks.report.series import gather
from lm_envs.benchmarks.run.results import collect_results
from lm_envs.feedback import exchange, ratings
from lm_envs.feedback.annotators import Annotator, work
from lm_envs.feedback.store import Store, open_study
from lm_envs.feedback.study import Answer, read_settings
from lm_envs.reward.learned import load_reward_model
from lm_envs.tasks import load, sampling
from lm_envs.tasks.reviews import ranking_accuracy
from tests.benchmarks.run.ordeals import everybody_answers, study_in_rounds
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


def ranked(tmp_path: Path, rows: Path, *more: str) -> Path:
    """A study of these texts, to be ranked."""
    study = tmp_path / "study"
    main(["people", "new", "--out", str(study), "--texts", str(rows), "--mode", "rank", *more])
    return study


def test_from_texts_to_ratings_and_rows_of_data(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_envs.feedback.agreement.RESAMPLES", 50)
    study = ranked(tmp_path, texts(tmp_path / "t.jsonl"), "--overlap", "2")
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


def test_responses_are_sampled_at_their_temperature(tmp_path: Path) -> None:
    policy = byo.make(tmp_path / "byo").options["policy"]
    prompts = byo.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the old cat"}])
    (item,) = sampled([policy], str(prompts), 8, (1e-6, 1.0), 5, 0)
    cold, warm = ({response.text for response in item.responses[k : k + 4]} for k in (0, 4))
    assert len(cold) == 1 < len(warm)


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


@pytest.mark.parametrize(("typed", "ranks"), [("a", (0, 1)), ("b", (1, 0)), ("t", (0, 0)), ("x", (0, 0))])
def test_a_letter_typed_prefers_the_response_that_is_shown_by_it(
    tmp_path: Path, monkeypatch: Any, typed: str, ranks: tuple[int, int]
) -> None:
    study = tmp_path / "study"
    main(["people", "new", "--out", str(study), "--texts", str(texts(tmp_path / "t.jsonl", 4))])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{typed}\n" * 4 + "q\n"))
    main(["people", "rank", str(study), "--annotator", "ann"])
    found = Store(study, read_settings(study)).judgments()
    assert len({judgment.order for judgment in found}) == 2
    for judgment in found:
        assert tuple(judgment.answer.ranks[place] for place in judgment.order) == ranks
        assert judgment.answer.both_bad == (typed == "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["new", "--out", "OUT"], "say where responses come from"),
        (["new", "--out", "OUT", "--policy", "x"], "--policy needs --prompts"),
        (["new", "--out", "OUT", "--texts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["new", "--out", "OUT", "--comparison", "nowhere"], "holds no finished run"),
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


def test_ties_are_no_data_and_rows_may_be_weighed(tmp_path: Path) -> None:
    study = tmp_path / "study"
    main(["people", "new", "--out", str(study), "--texts", str(texts(tmp_path / "t.jsonl", 2)), "--mode", "rank"])
    store = Store(study, read_settings(study))
    for name, ranks in (("a", (0, 1, 2)), ("b", (0, 1, 2)), ("c", (0, 2, 1)), ("d", (0, 0, 0))):
        store.take(store.items()[1], name, Answer(ranks=ranks))
    rows = [json.loads(line) for line in Path(exchange.rows_of(str(study))).read_text().split("\n") if line]
    # Of four people three put 0 before 1, and 0 before 2; two (c and d for themselves) agree that 1 is before 2.
    agreed = {row["annotator"]: row["agreement"] for row in rows}
    assert agreed == pytest.approx({"a": (0.75 + 0.75 + 0.5) / 3, "b": 2 / 3, "c": (0.75 + 0.75 + 0.25) / 3}, abs=1e-4)
    model = byo.make(tmp_path / "byo").options["policy"]
    learn = ["reward-model", "--model", model, "--data", str(study), "--iterations", "1", "--held-out", "0"]
    main([*learn, "--out", str(tmp_path / "one"), "--weight", "agreement"])
    with pytest.raises(SystemExit):
        main([*learn, "--out", str(tmp_path / "two"), "--weight", "annotator"])


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    """A study in rounds that is ready for ``people next``."""
    study_in_rounds(tmp_path, tmp_path / "study")
    return tmp_path / "study"


def test_rounds_wait_for_people_and_go_on(rounds: Path, capsys: Any) -> None:
    main(["people", "next", str(rounds)])
    assert "round 0 waits for 9 answers" in capsys.readouterr().err
    everybody_answers(rounds)
    main(["people", "next", str(rounds)])
    told = capsys.readouterr()
    assert "round 1 waits for 9 answers" in told.err and "Elo" in told.out
    items = list(Store(rounds, read_settings(rounds)).items().values())
    assert len(items) == 18 and {r.source for r in items[9].responses} == {"policy 1", items[0].responses[0].source}
    # The next prompts, and behind the last one the first again.
    assert [item.prompt for item in items[9:12]] == [f"the red cat {verb} a" for verb in ("saw", "ate", "hid")]
    assert items[12].prompt == items[0].prompt
    rows = [json.loads(line) for line in (rounds / "round-0" / "answers.jsonl").read_text().split("\n") if line]
    splits = {row["prompt"]: row["split"] for row in rows}
    assert "train" in splits.values()
    loop = Loop(rounds, Store(rounds, read_settings(rounds)))
    scores = scores_of(str(loop.reward_model(0) / "model"), items[:9])
    right = [  # by hand: of pairs of unequal length on held-out prompts, the longer one scores higher
        float((a > b) == (len(item.responses[0].text) > len(item.responses[1].text)))
        for item, (a, b) in zip(items[:9], scores, strict=True)
        if loop.splits()[str(item.prompt)] != "train" and len({len(r.text) for r in item.responses}) == 2
    ]
    known = json.loads((rounds / "round-0" / "accuracy.json").read_text())
    assert (known["accuracy"][0] if right else known.get("accuracy")) == (np.mean(right) if right else None)
    everybody_answers(rounds)
    loop.write_answers(1, rounds / "answers.jsonl")
    both = [json.loads(line) for line in (rounds / "answers.jsonl").read_text().split("\n") if line]
    assert all(row in both for row in rows) and len(both) > len(rows)  # the next reward model learns from all rounds


def test_a_reply_does_not_wait_for_an_acknowledgment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and body are sent apart, so a connection that delays small parts takes 40 ms for each answer."""
    uvicorn = pytest.importorskip("uvicorn")
    undelayed: list[int] = []

    def served(self: Any, sockets: list[socket.socket]) -> None:
        with socket.create_connection(sockets[0].getsockname()), sockets[0].accept()[0] as accepted:
            undelayed.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(uvicorn.Server, "run", served)
    rows = byo.write_jsonl(tmp_path / "t.jsonl", [{"prompt": "p", "completions": ["a", "b"]}])
    main(["people", "new", "--out", str(tmp_path / "study"), "--texts", str(rows)])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    main(["people", "serve", str(tmp_path / "study"), "--port", str(port)])
    assert undelayed and undelayed[0]


def test_items_of_a_file_keep_the_columns_for_rewards(tmp_path: Path) -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1, 1], "split": "train", "topic": ["x"]}
    rows = byo.write_jsonl(tmp_path / "t.jsonl", [row])
    main(["people", "new", "--out", str(tmp_path / "study"), "--texts", str(rows)])
    items = open_study(tmp_path / "study").items().values()
    assert len(items) == 3 and all(item.columns == {"topic": ["x"]} for item in items)


@pytest.mark.slow
def test_twenty_people_at_once_and_twenty_kills(tmp_path: Path) -> None:
    """Nothing acknowledged is lost or doubled, and 95 of 100 answers take less than 50 ms while nobody kills.

    An answer takes a person half a second here: 40 answers a second.
    """
    study, people, each, kills = tmp_path / "study", 20, 200, 20
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    path = texts(tmp_path / "t.jsonl", people * each // 4 + people)  # the last open items may all be known to somebody
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
    web, empty = http.client.HTTPConnection("127.0.0.1", port), []
    for _ in range(100):
        begin = time.monotonic()
        web.request("GET", "/nowhere")
        web.getresponse().read()
        empty.append(time.monotonic() - begin)
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
    if busy or np.median(empty) > 0.01:
        pytest.skip("nothing was lost, but times mean nothing here: others keep the processors busy")
    assert quiet[int(0.95 * len(quiet))] < 0.05


@pytest.mark.slow
def test_six_hundred_simulated_comparisons_order_the_demo_s_methods(tmp_path: Path) -> None:
    """Annotators that see what the judge sees put SFT last, and two methods in the demo's order if it tells them apart
    by three standard errors; those that are nearer each other take more comparisons."""
    out, study = tmp_path / "demo", tmp_path / "study"
    main(["compare", "--suite", "demo", "--out", str(out)])
    limit = ["--limit", "86"]  # prompts, with seven methods beside SFT: 602 comparisons
    main(["people", "new", "--out", str(study), "--comparison", str(out), "--task", "reviews", *limit])
    series = gather(out, rows := collect_results(out))
    gold = {(s.label, r["prompt"], r["response"]): r["gold"] for s in series for r in s.test_samples()}
    store = Store(study, read_settings(study))
    person = Annotator(lambda item: [gold[r.source, item.prompt, r.text] for r in item.responses], temperature=0)
    assert work(store, "ann", person) == 602
    rated = ratings.bradley_terry(ratings.battles(store.judgments()))
    assert min(rated, key=lambda name: rated[name].value) == "sft"
    wins = {s.label: np.array(s.results[0]["wins"], dtype=float) for s in series if s.label != "sft"}
    told: list[tuple[float, bool]] = []
    for one, other in itertools.combinations(wins, 2):
        apart = wins[one] - wins[other]
        if apart.any():
            errors = apart.mean() / (apart.std(ddof=1) / len(apart) ** 0.5)
            told.append((abs(errors), (rated[one].value - rated[other].value) * errors > 0))
    for least in (2, 3):
        right = [same for errors, same in told if errors > least]
        print(
            f"{sum(right)} of {len(right)} pairs that the demo tells apart by {least} standard errors are in its order"
        )
    assert len(right) >= 3 and all(right)
    add_people(out, rows, store.judgments())
    order = correlation(gather(out, rows))
    assert order is not None
    print(f"rank correlation of simulated and human win-rates: {order}")
    assert order.value > 0.5


@pytest.mark.slow
def test_a_reward_model_from_a_thousand_rankings_is_as_good_as_the_pipeline_s(tmp_path: Path) -> None:
    """1,000 rankings of 4 through the page's interface, by annotators that follow the judge at temperature 1, make a
    reward model that is as right on held-out pairs as the one that comes with Reviews, to two points."""
    from starlette.testclient import TestClient

    from lm_envs.feedback.server import application

    task = load("reviews")

    def sampled(split: str, prompts: int, each: int, seed: int) -> Any:
        return sampling.sample(
            task.reference,
            task.tokenizer,
            task.prompts[split][:prompts],
            prompts * each,
            eos_token_id=task.eos_token_ids,
            max_new_tokens=task.max_new_tokens,
            seed=seed,
            batch_size=512,
            repeats=each,
        )

    found = sampled("train", 1000, 4, 7)
    rows = [{"prompt": found.prompts[4 * k], "completions": found.completions[4 * k : 4 * k + 4]} for k in range(1000)]
    study, fresh_model = tmp_path / "study", tmp_path / "fresh"
    path = byo.write_jsonl(tmp_path / "t.jsonl", rows)
    main(["people", "new", "--out", str(study), "--texts", str(path), "--mode", "rank"])
    store = Store(study, read_settings(study))
    gold = dict(zip(zip(found.prompts, found.completions, strict=True), found.score(task.judge), strict=True))
    person = Annotator(lambda item: [gold[item.prompt, r.text] for r in item.responses], seed=1)
    web, number = TestClient(application(store, ["testserver"])), store.annotator("ann")
    base = f"/a/{store.key(number)}/"
    told = web.get(base + "next").json()
    while told["item"] is not None:
        shown = store.task(number, told["item"])
        ranks = person(shown).ranks
        body = {"answer": {"ranks": [ranks[place] for place in shown.order]}, "version": 0}
        told = web.post(f"{base}items/{shown.item}", json=body).json()
    assert len(store.judgments()) == 1000
    fresh(task.reward.model, 0).save_pretrained(fresh_model)
    task.tokenizer.save_pretrained(fresh_model)
    options = ["--iterations", "150", "--batch-size", "32", "--learning-rate", "2e-3", "--set", "micro_batch=128"]
    learn = ["reward-model", "--model", str(fresh_model), "--data", str(study), "--out", str(tmp_path / "rm")]
    main([*learn, *options, "--held-out", "0"])
    held = sampled("validation", 256, 8, 99)
    pairs = np.array(held.score(task.judge)).reshape(-1, 2)
    accuracy = {}
    for name, reward in (("pipeline", task.reward), ("people", load_reward_model(tmp_path / "rm" / "model"))):
        scores = np.array(held.score(reward)).reshape(-1, 2)
        accuracy[name] = ranking_accuracy(pairs, scores[:, 0] - scores[:, 1])
    print(accuracy)
    assert accuracy["people"] > accuracy["pipeline"] - 0.02


def told_by(capsys: Any, *words: str) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 1
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "say by --public what others open"),
        (["--host", "::"], "say by --public what others open"),
        (["--public", "study.example.org"], "--public is an address such as"),
        (["--public", "https://x.example:99999"], "--public is an address such as"),
        (["--annotator", " "], "a name that is not empty"),
        (["--port", "PORT"], "give another --port"),
        (["--host", "1.2.3.4.5"], "cannot listen on 1.2.3.4.5"),
    ],
)
def test_what_cannot_be_served_is_one_line(tmp_path: Path, capsys: Any, words: list[str], message: str) -> None:
    pytest.importorskip("uvicorn")
    main(["people", "new", "--out", str(tmp_path / "s"), "--texts", str(texts(tmp_path / "t.jsonl", 1))])
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        said = told_by(capsys, "people", "serve", str(tmp_path / "s"), *[port if w == "PORT" else w for w in words])
    assert message in said.split("warning")[-1]


@pytest.mark.parametrize(
    ("words", "base", "host"),
    [
        ([], "http://127.0.0.1:PORT", "127.0.0.1:PORT"),
        (["--host", "::1"], "http://[::1]:PORT", "[::1]:PORT"),
        (["--public", "https://study.example/x/"], "https://study.example/x", "study.example"),
    ],
)
def test_the_links_that_are_printed_are_the_ones_that_are_answered(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], base: str, host: str
) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    from starlette.testclient import TestClient

    servers: list[Any] = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: servers.append((self.config.app, sockets[0].getsockname()[0]))
    )
    main(["people", "new", "--out", str(tmp_path / "s"), "--texts", str(texts(tmp_path / "t.jsonl", 1))])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    capsys.readouterr()
    try:
        main(["people", "serve", str(tmp_path / "s"), "--port", port, *words, *["--annotator", "a\x1b[2Jb"] * 2])
    except SystemExit:
        pytest.skip("no IPv6 here")
    (line,) = capsys.readouterr().out.strip().split("\n")  # a name that is given twice is one person
    name, link = line.split(": ", 1)
    assert name == "a\\x1b[2Jb" and link.startswith(base.replace("PORT", port) + "/a/")
    ((app, address),) = servers
    assert address == ("::1" if "::1" in words else "127.0.0.1")  # loopback, unless told otherwise
    web = TestClient(app)
    place = "/a/" + link.split("/a/")[1]
    page = web.get(place, headers={"host": host.replace("PORT", port)})
    assert page.status_code == 200 and "../../static/page.js" in page.text
    assert web.get(place, headers={"host": "evil.example"}).status_code == 400


def test_a_study_whose_settings_no_longer_fit_is_one_line(tmp_path: Path, capsys: Any) -> None:
    study = tmp_path / "s"
    new = ["people", "new", "--out", str(study), "--texts", str(texts(tmp_path / "t.jsonl", 1)), "--mode", "rank"]
    main(new)
    path = study / "study.toml"
    path.write_text(path.read_text().replace('mode = "rank"', 'mode = "pair"'))
    assert "mode 'pair' shows two responses, and item 1 has" in told_by(capsys, "people", "results", str(study))
    path.unlink()
    assert "study.sqlite is there without study.toml" in told_by(capsys, *new)
    assert (study / "study.sqlite").exists()


def test_what_people_said_is_private_and_goes_when_they_go(tmp_path: Path) -> None:
    study = tmp_path / "s"
    main(["people", "new", "--out", str(study), "--texts", str(texts(tmp_path / "t.jsonl", 2))])
    main(["people", "simulate", str(study), "--annotators", "2"])
    rows = Path(exchange.rows_of(str(study)))
    assert rows.exists() and study.stat().st_mode & 0o777 == 0o700
    main(["people", "forget", str(study), "simulated-1"])
    assert not rows.exists()


def test_a_study_without_answers_and_a_source_that_nobody_has_are_one_line(tmp_path: Path, capsys: Any) -> None:
    study = str(tmp_path / "s")
    main(["people", "new", "--out", study, "--texts", str(texts(tmp_path / "t.jsonl", 1))])
    assert "nobody has answered yet" in told_by(capsys, "people", "results", study)
    line = told_by(capsys, "people", "simulate", study, "--strength", "stong=2")
    assert "no response is of 'stong'; the sources are middle, strong, weak" in line


def test_rankings_of_another_tool_are_shown_as_rankings_or_as_pairs(tmp_path: Path, capsys: Any) -> None:
    fields = {"prompt": "p", **{f"response-{k}": f"text {k}" for k in range(3)}}
    value = [{"value": f"response-{k}", "rank": rank} for k, rank in ((0, 2), (1, 1), (2, 1))]
    row = {"fields": fields, "responses": {"preference": [{"value": value, "user_id": "u"}]}}
    path = byo.write_jsonl(tmp_path / "a.jsonl", [row])
    for mode, ranks in (("rank", [(1, 0, 0)]), ("pair", [(1, 0), (0, 0), (0, 1)])):
        main(["people", "new", "--out", str(tmp_path / mode), "--judged", str(path), "--mode", mode])
        store = Store(tmp_path / mode, read_settings(tmp_path / mode))
        assert [judgment.answer.ranks for judgment in store.judgments()] == ranks


def test_in_the_terminal_responses_get_flags_and_reasons_too(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    study = ranked(tmp_path, texts(tmp_path / "t.jsonl", 2), "--flags")
    path = study / "study.toml"
    path.write_text(path.read_text().replace("reasons = false", "reasons = true"))
    lines = [
        "flag b harmful, violent",
        "flag d harmful",
        "flag a nonsense",
        "reason c it is long",
        "note hm",
        "abc",
        "u",
        "bac",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    main(["people", "rank", str(study), "--annotator", "ann"])
    told = capsys.readouterr().out
    assert "Read all responses" in told and "flag harmful: " in told
    assert "'d' is no response" in told and "flags are lists of" in told
    (judgment,) = Store(study, read_settings(study)).judgments()
    order, answer = judgment.order, judgment.answer
    assert answer.flags[order[1]] == ("harmful", "violent") and answer.flags[order[0]] == ()
    assert answer.reasons[order[2]] == "it is long" and answer.notes == "hm"
    assert [answer.ranks[place] for place in order] == [1, 0, 2]


def test_an_answer_on_the_page_meanwhile_stays(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    study = tmp_path / "study"
    main(["people", "new", "--out", str(study), "--texts", str(texts(tmp_path / "t.jsonl", 1)), "--mode", "rank"])
    store = Store(study, read_settings(study))
    ann = store.annotator("ann")

    def typed(prompt: str) -> str:
        store.answer(ann, 1, Answer(ranks=(0, 0, 0)), 0)
        return "abc"

    monkeypatch.setattr("builtins.input", typed)
    main(["people", "rank", str(study), "--annotator", "ann"])
    assert "answered in another window" in capsys.readouterr().out
    assert [judgment.answer.ranks for judgment in store.judgments()] == [(0, 0, 0)]
