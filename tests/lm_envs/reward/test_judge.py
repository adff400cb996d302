"""The remote judge against a server on this machine that fails, lies, stalls and counts."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log

import pytest

from lm_envs.reward.base import WeightedSum, call_reward
from lm_envs.reward.chat_endpoint import ChatEndpoint, EndpointError, _seconds
from lm_envs.reward.judge import RemoteJudge, load_judge, make_judge, without_thoughts
from lm_envs.reward.waiting import finished

KEY = "sk-very-secret"


def chat(text: str, **more):
    """The body of a completion."""
    message = {"role": "assistant", "content": text}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop", **more}]}


class Server:
    """Answers what `reply(number, body)` says: (status, JSON or bytes[, headers]); keeps what it was asked."""

    def __init__(self, reply) -> None:
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.busy = self.most = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append({"path": self.path, **body})
                    server.headers.append(dict(self.headers))
                    server.times.append(time.monotonic())
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                    number = len(server.asked)
                try:
                    found = reply(number, body)
                finally:
                    with lock:
                        server.busy -= 1
                if found is None:  # hang up
                    self.close_connection = True
                    return
                status, content, *headers = found
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # of clients that hang up
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("LM_ENVS_JUDGE_API_KEY", raising=False)


def judge(server, **settings) -> RemoteJudge:
    return make_judge(server.url, "tiny", **{"cache": False, "backoff": 0.01, "timeout": 5.0, **settings})


def grade(made: RemoteJudge, *completions: str, **columns):
    return made(["p"] * len(completions), list(completions), **columns)


# --- what is asked, and how answers are read ------------------------------------------------------------------------


def test_prompt_and_response_are_sent_and_the_number_comes_back(serve):
    server = serve(lambda number, body: chat("7"))
    made = judge(server, prompt="{prompt} -> {completion} ({low} to {high}; {source})", system="Grade for {source}.")
    found = call_reward(made, ["say {low}"], ["{prompt} 100% \\1"], [[1]], ["stop"], source=["news"])
    assert found.tolist() == [7.0]
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "tiny"
    assert asked["messages"] == [
        {"role": "system", "content": "Grade for news."},
        {"role": "user", "content": "say {low} -> {prompt} 100% \\1 (1 to 10; news)"},  # filled in once, and only once
    ]
    assert asked["temperature"] == 0 and asked["max_tokens"] == 64
    with pytest.raises(
        ValueError, match=r"asks for \{source\}; there are \{prompt\}, \{completion\}, \{low\}, \{high\}"
    ):
        grade(made, "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", 8), (" 8.5\n", 8.5), ("**9**", 9), ("8/10", 8), ("I give 7 out of 10.", 7), ("Score: 3", 3),
        ("Of 5 aims it meets 2. Rating: 4", 4), ("The score is **6**, since 2 + 2 = 4", 6),
        ("<think>2? no, 9</think>5", 5), ("4. Yes, 4", 4),
        ("Score (1-10): 7", 7), ("On a scale of 1 to 10, I give it 8.", 8), ("Grade (from 1 to 10): 6", 6),
        ("2? no, 9</think>5", 5), ("<think>a 3</think>\n<think>a 4</think>Score: 6", 6), ("7, since 7 is fair", 7),
        ("7,5", None), ("Score: 7,5", None), ("7-8", None), ("Score: 7-8", None), ("Rating: 7 to 8", None),
        ("Score: 17,5", None), ("<think>it is a 9", None), ("Grade: 7 or 8", None),
        ("good", None), ("", None), ("3 or 4", None), ("11", None), ("-2", None), ("0", None),
        ("4/5", None), ("Score: 4/5", None), ("4 out of 5", None), ("7%", None), ("Score: 7 %", None), ("1e1", None),
        ("Score: -2", None), ("Score - 7", 7), ("7.5.3", None), ("Score: 7.5", 7.5),
    ],
)  # fmt: skip
def test_a_grade_is_found_in_the_answer(serve, text, expected):
    server = serve(lambda number, body: chat(text))
    assert grade(judge(server, unreadable="none"), "x") == [expected]
    assert grade(judge(server, unreadable=-1), "x") == [-1.0 if expected is None else expected]
    if expected is None:
        with pytest.raises(EndpointError, match="'judge', sample 0 .*(without one number|not from 1 to 10)"):
            grade(judge(server), "x")


def test_a_pattern_of_ones_own_and_another_scale(serve):
    server = serve(lambda number, body: chat("helpful=2 harmless=-3"))
    assert grade(judge(server, pattern=r"harmless=(\S+)", scale=(-5, 5)), "x") == [-3.0]
    percent = serve(lambda number, body: chat("Score: 70%"))
    assert grade(judge(percent, scale=(0, 100)), "x") == [70.0]
    with pytest.raises(EndpointError, match="'helpful', which is not a number"):
        grade(judge(server, pattern=r"(\w+)="), "x")
    assert grade(judge(server, pattern=r"honest=(\d)", unreadable="none"), "x") == [None]


def test_the_ends_of_the_scale_and_the_last_of_several_grades(serve):
    for text, expected in (("1", 1), ("10", 10), ("Score: 3. On reflection, final score: 8", 8), ("10/10", 10)):
        assert grade(judge(serve(lambda number, body, text=text: chat(text))), "x") == [expected]
    for text, scale, expected in (("7/10", (0, 100), None), ("70 %", (0, 100), 70), ("3/5", (1, 5), 3)):
        server = serve(lambda number, body, text=text: chat(text))
        assert grade(judge(server, scale=scale, unreadable="none"), "x") == [expected]


def test_parameters_of_ones_own_replace_all(serve):
    server = serve(lambda number, body: chat("7"))
    grade(judge(server, parameters={"seed": 3}), "x")
    assert server.asked[0]["seed"] == 3 and not {"temperature", "max_tokens"} & set(server.asked[0])


def test_the_cache_knows_server_model_messages_and_parameters():
    here, there = (ChatEndpoint(f"http://127.0.0.1:{port}", "m") for port in (1, 2))
    said, other = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]
    keys = [
        here.cache_key(said, {"t": 0}), here.cache_key(other, {"t": 0}), here.cache_key(said, {"t": 1}),
        there.cache_key(said, {"t": 0}), ChatEndpoint("http://127.0.0.1:1", "n").cache_key(said, {"t": 0}),
    ]  # fmt: skip
    assert len(set(keys)) == 5 and keys[0] == ChatEndpoint("http://127.0.0.1:1/", "m").cache_key(said, {"t": 0})


def test_none_takes_part_in_compositions(serve):
    server = serve(lambda number, body: chat("5" if "good" in body["messages"][-1]["content"] else "?"))
    made = judge(server, prompt="{completion}", unreadable="none")
    both = WeightedSum([(2.0, made), (1.0, lambda completions: [1.0] * len(completions))])
    assert call_reward(both, ["p"] * 2, ["good", "odd"], [[1], [2]], ["stop"] * 2).tolist() == [11.0, 1.0]


def test_the_expectation_over_answer_tokens(serve):
    tops = [("Yes", 0.5), (" yes", 0.1), ("No", 0.2), ("Maybe", 0.2)]
    found = {"content": [{"token": "Yes", "top_logprobs": [{"token": t, "logprob": log(p)} for t, p in tops]}]}
    server = serve(lambda number, body: chat("Yes", logprobs=found))
    assert grade(judge(server, answers={"yes": 1.0, "no": 0.0}), "x") == [pytest.approx(0.6 / 0.8)]
    assert server.asked[0]["logprobs"] is True and server.asked[0]["top_logprobs"] == 20
    assert server.asked[0]["max_tokens"] == 1
    with pytest.raises(EndpointError, match="none of good, bad likely, but 'yes'"):
        grade(judge(server, answers={"good": 1.0, "bad": 0.0}), "x")
    silent = serve(lambda number, body: chat("Yes"))
    with pytest.raises(EndpointError, match="gives no log-probabilities for 'tiny': leave out answers"):
        grade(judge(silent, answers={"yes": 1.0, "no": 0.0}), "x")


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        (500, b"oops"), (503, {"error": {"message": "loading"}}), (429, {"error": "slow down"}), (408, b""), None,
        (200, b"<html>"), (200, {"choices": []}), (200, {"choices": [{"message": {"content": 5}}]}), (200, [1]),
    ],
)  # fmt: skip
def test_passing_failures_are_tried_again(serve, failure):
    server = serve(lambda number, body: failure if number <= 2 else chat("6"))
    assert grade(judge(server), "x") == [6.0]
    assert len(server.asked) == 3


def test_a_lasting_failure_says_who_said_what_about_which_sample(serve):
    server = serve(
        lambda number, body: (
            (500, {"error": {"message": "out of memory"}}) if "poor" in body["messages"][-1]["content"] else chat("6")
        )
    )
    with pytest.raises(EndpointError) as caught:
        grade(judge(server, attempts=3, workers=1), "fine", "poor", "fine")
    assert str(caught.value) == (
        "reward 'judge', sample 1 (completion 'poor'): "
        f"{server.url}/chat/completions answered 500: out of memory; given up after 3 attempts"
    )
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 422, 302, 303, 307])
def test_what_no_attempt_mends_fails_at_once(serve, status):
    other = serve(lambda number, body: chat("1"))
    reply = (status, {"error": {"message": "no such model"}}, {"Location": f"{other.url}/chat/completions"})
    server = serve(lambda number, body: reply)
    with pytest.raises(EndpointError, match=f"answered {status}: no such model$"):
        grade(judge(server), "x")
    assert len(server.asked) == 1 and not other.asked  # redirects are not followed


def test_nobody_there_and_too_slow(serve):
    server = serve(lambda number, body: time.sleep(1.0) or chat("6"))
    with pytest.raises(EndpointError, match="cannot be reached: timed out; given up after 2 attempts"):
        grade(judge(server, timeout=0.1, attempts=2), "x")
    server.close()
    with pytest.raises(EndpointError, match="cannot be reached: .*refused.*; given up after 2 attempts"):
        grade(judge(server, attempts=2), "x")


def test_retry_after_is_honoured(serve):
    server = serve(lambda number, body: (429, b"", {"Retry-After": "1"}) if number == 1 else chat("6"))
    assert grade(judge(server), "x") == [6.0]
    assert server.times[1] - server.times[0] >= 1.0
    server = serve(lambda number, body: (429, {"error": "quota"}, {"Retry-After": "3600"}))
    with pytest.raises(EndpointError, match="429: quota, and asks to wait 3600 s, longer than longest_wait=60"):
        grade(judge(server), "x")
    assert len(server.asked) == 1
    later = datetime.now(UTC) + timedelta(seconds=30)
    assert 28 < _seconds(format_datetime(later, usegmt=True)) <= 30
    assert _seconds("soon") is None and _seconds(None) is None and _seconds("nan") is None
    assert _seconds(format_datetime(later - timedelta(days=1), usegmt=True)) == 0


def test_backoff_doubles_with_jitter_up_to_its_limit():
    endpoint = ChatEndpoint("http://127.0.0.1:1", "m", backoff=1.0, longest_wait=4.0)
    for attempt, limit in ((1, 1.0), (2, 2.0), (3, 4.0), (9, 4.0)):
        waits = [endpoint._wait(attempt, None) for _ in range(200)]
        assert 0 <= min(waits) < 0.2 * limit and 0.8 * limit < max(waits) <= limit
    assert 7.0 <= endpoint._wait(1, 7.0) <= 7.25


# --- concurrency and the cache --------------------------------------------------------------------------------------


def test_requests_run_at_the_same_time_but_no_more_than_asked(serve):
    server = serve(lambda number, body: time.sleep(0.1) or chat(body["messages"][-1]["content"]))
    made = judge(server, prompt="{completion}", workers=4)
    assert grade(made, *map(str, range(1, 9))) == list(range(1, 9))  # in order
    assert 2 <= server.most <= 4


def test_equal_requests_are_made_once(serve):
    server = serve(lambda number, body: chat("6"))
    assert grade(judge(server), "a", "b", "a", "a") == [6.0] * 4
    assert len(server.asked) == 2


def test_answers_are_kept_and_asked_for_once(serve, tmp_path):
    server = serve(lambda number, body: chat(str(number)))
    made = judge(server, cache=tmp_path, workers=1)
    first = grade(made, "a", "b")
    assert first == [1.0, 2.0]
    assert grade(judge(server, cache=tmp_path), "b", "a") == [2.0, 1.0]
    assert len(server.asked) == 2
    # another model, request or prompt is another question; another reading of the same answer is not
    for settings in ({"prompt": "{completion}?"}, {"parameters": {"temperature": 0.5}}, {"system": "s"}):
        before = len(server.asked)
        grade(judge(server, cache=tmp_path, **settings), "a")
        assert len(server.asked) == before + 1
    make_judge(server.url, "other", cache=tmp_path)(["p"], ["a"])
    assert len(server.asked) == 6
    assert grade(judge(server, cache=tmp_path, pattern="(.)", timeout=9.0), "a") == [1.0] and len(server.asked) == 6
    # a damaged entry is asked for again
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text()[:10])
    assert grade(judge(server, cache=tmp_path), "a") == [7.0] and len(server.asked) == 7


def test_answers_that_are_errors_are_not_kept(serve, tmp_path):
    server = serve(lambda number, body: chat("well" if number == 1 else "6"))
    with pytest.raises(EndpointError, match="answered without one number"):
        grade(judge(server, cache=tmp_path), "a")
    assert grade(judge(server, cache=tmp_path), "a") == [6.0]
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_was_answered_before_a_failure_is_kept(serve, tmp_path):
    down = True
    server = serve(lambda number, body: (400, b"no") if down and body["messages"][-1]["content"] == "c" else chat("6"))
    made = judge(server, cache=tmp_path, prompt="{completion}", workers=1)
    with pytest.raises(EndpointError, match="sample 2"):
        grade(made, "a", "b", "c", "d")
    down, before = False, len(server.asked)
    assert grade(made, "a", "b", "c") == [6.0] * 3
    assert len(server.asked) == before + 1


def test_a_killed_run_keeps_its_answers(serve, tmp_path):
    release = threading.Event()
    server = serve(lambda number, body: (number < 3 or release.wait(20)) and chat("6"))
    code = (
        "from lm_envs.reward.judge import make_judge\n"
        f"made = make_judge({server.url!r}, 'tiny', cache={str(tmp_path)!r}, workers=1)\n"
        "made(['p'] * 4, ['a', 'b', 'c', 'd'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 120
        while len(server.asked) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert len(server.asked) == 3
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.rglob("*.json"))) == 2
    release.set()
    before = len(server.asked)
    assert grade(judge(server, cache=tmp_path), "a", "b") == [6.0, 6.0] and len(server.asked) == before


# --- addresses and keys ---------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LM_ENVS_JUDGE_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = serve(lambda number, body: chat("6"))
    made = judge(server, cache=tmp_path)
    assert grade(made, "a") == [6.0]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(server.asked)
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert kept and KEY not in kept + repr(vars(made)) + repr(made.endpoint) + caplog.text
    monkeypatch.delenv("LM_ENVS_JUDGE_API_KEY")
    assert grade(made, "a") == [6.0] and len(server.asked) == 1  # the key is no part of the question
    grade(made, "b")
    assert "Authorization" not in server.headers[1]
    monkeypatch.setenv("MINE", KEY)
    grade(judge(server, key_variable="MINE"), "c")
    assert server.headers[2]["Authorization"] == f"Bearer {KEY}"


def test_a_server_that_repeats_the_key_does_not_spread_it(serve, monkeypatch):
    monkeypatch.setenv("LM_ENVS_JUDGE_API_KEY", KEY)
    for reply in ((401, {"error": {"message": f"wrong key {KEY}"}}), (200, f"hello {KEY}".encode())):
        server = serve(lambda number, body, reply=reply: reply)
        with pytest.raises(EndpointError, match=r"\[key\]") as caught:
            grade(judge(server, attempts=1), "x")
        assert KEY not in str(caught.value)
    monkeypatch.setenv("LM_ENVS_JUDGE_API_KEY", KEY + "\nX-Injected: 1")
    with pytest.raises(EndpointError, match="characters that no header can carry") as caught:
        grade(judge(server), "x")
    assert KEY not in str(caught.value)


def test_a_key_does_not_go_over_plain_http_to_another_machine(monkeypatch):
    monkeypatch.setenv("LM_ENVS_JUDGE_API_KEY", KEY)
    endpoint = ChatEndpoint("http://192.0.2.1/v1", "m", attempts=1, timeout=0.1)
    with pytest.raises(EndpointError, match=r"the key in \$LM_ENVS_JUDGE_API_KEY goes over https only"):
        finished(endpoint.complete(endpoint.client(), [], {}))
    assert ChatEndpoint("http://[::1]:8000", "m").is_local and ChatEndpoint("http://localhost", "m").is_local
    assert not endpoint.is_local and not ChatEndpoint("http://localhost.example.org", "m").is_local


def test_proxies_are_not_for_this_machine(serve, monkeypatch):
    proxy = serve(lambda number, body: chat("1"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    server = serve(lambda number, body: chat("6"))
    assert grade(judge(server), "x") == [6.0] and not proxy.asked


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://127.0.0.1/v1", "expected an address such as http://127.0.0.1:8000/v1, not 'ftp"),
        ("127.0.0.1:8000/v1", "expected an address"),
        ("http:///v1", "expected an address"),
        ("http://127.0.0.1:99999/v1", "expected an address"),
        (f"http://user:{KEY}@127.0.0.1/v1", r"put the key into \$LM_ENVS_JUDGE_API_KEY, not into the address"),
        ("http://127.0.0.1/v1?key=1", "has a query"),
        (f"file://user:{KEY}@127.0.0.1/v1", "expected an address"),
    ],
)
def test_addresses_that_will_not_do(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        ChatEndpoint(url, "m")
    assert KEY not in str(caught.value)


def test_the_path_is_completed():
    for given in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert ChatEndpoint(given, "m").url == "http://h/v1/chat/completions"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "grade it"}, "put {completion} where it goes"),
        ({"scale": (5, 1)}, "low < high"),
        ({"scale": 3}, "scale must be a list, not 3"),
        ({"pattern": "["}, "no regular expression"),
        ({"pattern": r"\d"}, "needs a group"),
        ({"answers": {"yes": 1}}, "at least two tokens"),
        ({"unreadable": "skip"}, "unreadable must be 'error' or 'none' or a number"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"attempts": 0}, "attempts must be at least 1"),
        ({"api_key": KEY}, "no setting 'api_key'"),
    ],
)
def test_settings_that_will_not_do(settings, message):
    with pytest.raises(ValueError, match=message):
        make_judge("http://127.0.0.1:1", "m", **settings)


def test_settings_from_a_file(serve, tmp_path):
    server = serve(lambda number, body: chat("Verdict: 3"))
    path = tmp_path / "judge.toml"
    path.write_text(
        f'url = "{server.url}"\nmodel = "tiny"\nprompt = """Grade:\n{{completion}}"""\nscale = [0, 5]\ncache = false\n'
        "pattern = 'Verdict: (\\d)'\n[parameters]\nmax_tokens = 5\n"
    )
    made = load_judge(path)
    assert grade(made, "x") == [3.0] and server.asked[0]["max_tokens"] == 5 and made.endpoint.cache is None
    for text, message in (
        ("url = 3\nmodel = 'm'", "url must be text, not 3"),
        ("model = 'm'", "needs 'url'"),
        ('url = "http://h"', "needs 'model'"),
        ("= 1", "not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"judge.toml: .*{message}|{message}"):
            load_judge(path)


def test_many_thoughts_are_taken_off():
    """A regular expression took minutes over this: its time grew with the square."""
    text = "<think>" * 200_000 + "7"
    assert without_thoughts(text) == "" and without_thoughts("<think>a</think>" * 100_000 + "7") == "7"
