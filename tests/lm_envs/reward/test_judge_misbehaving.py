"""The remote judge against a socket that trickles, floods and repeats keys, against Ctrl-C, and against its cache."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

from lm_envs import files
from lm_envs.benchmarks.run.workers import StopRequest
from lm_envs.reward.base import call_reward
from lm_envs.reward.chat_endpoint import EndpointError, without_key
from lm_envs.reward.judge import make_judge
from tests.house import CHECKOUT

KEY = "sk-Very+Secret/0123=="
ANSWER = json.dumps({"choices": [{"message": {"content": "7"}}]}).encode()
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Socket:
    """Reads a request, then hands the connection to `reply(connection, number)`, each in a thread."""

    def __init__(self, reply) -> None:
        self.reply, self.asked = reply, 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.asked += 1
            threading.Thread(target=self._serve, args=(connection, self.asked), daemon=True).start()

    def _serve(self, connection, number):
        with connection:
            try:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                head, _, body = head.partition(b"\r\n\r\n")
                missing = int(re.search(rb"content-length: (\d+)", head.lower())[1]) - len(body)
                while missing > 0:
                    missing -= len(connection.recv(65536))
                self.reply(connection, number)
            except OSError:
                pass


@pytest.fixture
def serve():
    sockets = []

    def start(reply):
        sockets.append(Socket(reply))
        return sockets[-1]

    yield start
    for one in sockets:
        one.listener.close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LM_ENVS_JUDGE_API_KEY", KEY)


def judge(server, **settings):
    return make_judge(
        server.url, "tiny", **{"cache": False, "backoff": 0.01, "attempts": 1, "timeout": 0.3, **settings}
    )


def whole(connection, body=ANSWER, head=OK):
    connection.sendall((head % len(body) if b"%d" in head else head) + body)


# --- time -----------------------------------------------------------------------------------------------------------


def trickle(connection, raw):
    for i in range(len(raw)):
        connection.sendall(raw[i : i + 1])
        time.sleep(0.05)


SLOW = {
    "the body trickles": lambda c, n: (c.sendall(OK % 10_000), trickle(c, b" " * 10_000)),
    "the headers trickle": lambda c, n: trickle(c, b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 10_000),
    "the body never comes": lambda c, n: (c.sendall(OK % 10_000), time.sleep(20)),
    "nothing comes": lambda c, n: time.sleep(20),
    "100 Continue without end": lambda c, n: [c.sendall(b"HTTP/1.1 100 Continue\r\n\r\n") for _ in range(10**9)],
    "103 Early Hints without end": lambda c, n: [
        (c.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"), time.sleep(0.02)) for _ in range(1000)
    ],
    "chunks without end": lambda c, n: (
        c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        [(c.sendall(b"1\r\n \r\n"), time.sleep(0.02)) for _ in range(1000)],
    ),
}


@pytest.mark.parametrize("how", SLOW)
def test_the_timeout_is_for_the_whole_attempt(serve, how):
    server = serve(SLOW[how])
    started = time.monotonic()
    with pytest.raises(EndpointError, match="cannot be reached: timed out; given up after 2 attempts"):
        judge(server, attempts=2)(["p"], ["x"])
    assert 0.6 <= time.monotonic() - started < 6.0 and server.asked == 2


def test_an_answer_without_end_is_cut_off(serve):
    def flood(connection, number):
        connection.sendall(OK % (1 << 40))
        while True:
            connection.sendall(b" " * 65536)

    with pytest.raises(EndpointError, match="the answer is longer than 4 MiB"):
        judge(serve(flood), timeout=20)(["p"], ["x"])


def test_one_slow_sample_does_not_hold_up_the_others(serve):
    server = serve(lambda connection, number: time.sleep(0.5) or whole(connection))
    started = time.monotonic()
    assert judge(server, workers=16, timeout=20)(["p"] * 16, list("abcdefghijklmnop")) == [7.0] * 16
    assert time.monotonic() - started < 6.0  # one after the other takes 8


def test_a_judge_asked_from_an_async_reward_answers(serve):
    made = judge(serve(lambda connection, number: whole(connection)), timeout=20)

    async def reward(prompts, completions):
        await asyncio.sleep(0)
        return made(prompts, completions)

    assert call_reward(reward, ["p"], ["x"], [[1]], ["stop"]).tolist() == [7.0]


CTRL_C = """
import socket, sys, threading, time
from dataclasses import dataclass
from lm_envs.benchmarks import cli
from lm_envs.benchmarks.run.workers import StopRequest
from lm_envs.reward.judge import make_judge
from lm_envs.reward.waiting import waiting

def tell():
    while not waiting():
        time.sleep(0.01)
    print("waiting", flush=True)

@dataclass
class Command:
    resume: bool = False

    def run(self, console):
        if sys.argv[2] == "looking up":
            socket.getaddrinfo = lambda *args, **kwargs: time.sleep(60)
        with StopRequest().listening():
            threading.Thread(target=tell).start()
            make_judge(sys.argv[1], "m", cache=False, timeout=60)(["p"] * 3, ["a", "b", "c"])

cli.tyro.cli = lambda *args, **kwargs: (Command(), [])
cli.main(["compare"])
"""


@pytest.mark.parametrize("where", ["waiting", "looking up"])
def test_ctrl_c_is_heard_at_once_and_a_second_leaves_no_traceback(serve, where):
    server = serve(lambda connection, number: time.sleep(60))
    command = [sys.executable, "-c", CTRL_C, server.url if where == "waiting" else "http://localhost:1/v1", where]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout.readline() == b"waiting\n"
        deadline = time.monotonic() + 10
        while where == "waiting" and server.asked < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        first = process.stderr.readline()
        assert time.monotonic() - started < 20.0 and first == b"Stopped. To go on: lm-envs compare --resume\n"
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert process.wait(timeout=30) == 130 and process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()


def test_only_a_wait_for_a_judge_makes_the_first_ctrl_c_interrupt():
    stop = StopRequest()
    stop._handle(signal.SIGINT, None)
    assert stop.requested


# --- keys -----------------------------------------------------------------------------------------------------------

HALF = KEY[: len(KEY) // 2]
WAYS = {
    "plain": KEY,
    "first half": HALF,
    "second half": KEY[len(KEY) // 2 :],
    "in a sentence cut by the server": f"wrong key {KEY[:14]}...",
    "percent-encoded": urllib.parse.quote(KEY, safe=""),
    "percent-encoded twice": urllib.parse.quote(urllib.parse.quote(KEY, safe=""), safe=""),
    "every character percent-encoded": "".join(f"%{ord(c):02X}" for c in KEY),
    "JSON escapes": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "some JSON escapes": KEY.replace("/", "\\/").replace("+", "\\u002b"),
    "HTML references": "".join(f"&#{ord(c)};" for c in KEY),
    "HTML hexadecimal": KEY.replace("+", "&#x2B;").replace("=", "&#x3d;"),
    "across the cut": "x" * 195 + KEY,
}


def spelled(text: str) -> str:
    """The text with every encoding of :data:`WAYS` undone."""
    for _ in range(3):
        text = re.sub(r"&#x([0-9a-fA-F]+);", lambda m: chr(int(m[1], 16)), text)
        text = re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), text)
        text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
        text = urllib.parse.unquote(text).replace("\\/", "/")
    return text


def leaked(text: str) -> list[str]:
    """Six characters of the key in a row, or more, that a text spells."""
    return [KEY[i : i + 6] for i in range(len(KEY) - 5) if KEY[i : i + 6] in text or KEY[i : i + 6] in spelled(text)]


def test_the_finder_of_leaks_finds_each_way():
    assert all(leaked(text) for text in WAYS.values()) and not leaked("hello sk-V")


@pytest.mark.parametrize("where", ["error", "error text", "body", "reason", "header", "grade", "error field name"])
@pytest.mark.parametrize("way", WAYS)
def test_a_key_that_the_server_repeats_is_shown_nowhere(serve, tmp_path, caplog, way, where):
    caplog.set_level(0)
    echo = WAYS[way].encode()
    bad = b"HTTP/1.1 401 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
    replies = {
        "error": bad % (b"No", len(m := json.dumps({"error": {"message": f"no: {WAYS[way]}"}}).encode()), m),
        "error text": bad % (b"No", len(echo), echo),
        "error field name": bad % (b"No", len(m := json.dumps({WAYS[way]: 1}).encode()), m),
        "body": (OK % len(echo)) + echo,
        "reason": bad % (echo, 0, b""),
        "header": b"HTTP/1.1 200 OK\r\n" + echo + b"\r\n\r\n",
        "grade": (OK % len(m := json.dumps({"choices": [{"message": {"content": f"I {WAYS[way]}"}}]}).encode())) + m,
    }
    server = serve(lambda connection, number: connection.sendall(replies[where]))
    with pytest.raises(EndpointError) as caught:
        judge(server, timeout=20)(["p"], ["x"])
    kept = judge(server, timeout=20, unreadable="none", cache=tmp_path)
    if where == "grade":
        assert kept(["p"], ["x"]) == [None]
    stored = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert not leaked(str(caught.value) + stored + caplog.text), str(caught.value)
    assert where != "grade" or "[key]" in stored


def test_what_is_no_key_stays():
    assert without_key("a wrong answer", KEY) == "a wrong answer"
    assert without_key({"a": ["sk-V", 1, None]}, KEY) == {"a": ["sk-V", 1, None]}
    assert without_key(f"<{KEY}>{KEY}", KEY) == "<[key]>[key]"
    assert without_key("EMPTY, not EMP", "EMPTY") == "[key], not EMP" and without_key("x", "") == "x"


def test_escape_sequences_of_a_server_do_not_reach_the_terminal(serve):
    body = json.dumps({"error": "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202egnp \u2066a\r\nb"}).encode()
    server = serve(lambda connection, number: whole(connection, body, b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n"))
    with pytest.raises(EndpointError, match=r"\\x1b\[2J\\x1b\]0;owned\\x07 \\x9b31m \\u202egnp \\u2066a b$") as caught:
        judge(server, timeout=20)(["p"], ["x"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"choices": [{"message": {"content": ' + b"[" * 100_000, b"\xff\xfe", b"1" * 10_000, b"null"],
)
def test_bodies_that_are_no_completion_are_refused_in_one_line(serve, body):
    server = serve(lambda connection, number: whole(connection, body))
    with pytest.raises(EndpointError, match="gave no chat completion but") as caught:
        judge(server, timeout=20)(["p"], ["x"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ["1" * 300_000, "8 /" * 100_000, "score: " * 100_000, "( 1 " * 100_000, "- " * 200_000]
)
def test_long_answers_are_read_in_linear_time(serve, text):
    body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    server = serve(lambda connection, number: whole(connection, body))
    started = time.monotonic()
    judge(server, timeout=20, unreadable="none")(["p"], ["x"])
    assert time.monotonic() - started < 20.0


# --- the cache ------------------------------------------------------------------------------------------------------


def unusable(kind: str, folder: Path) -> Path:
    """A cache folder that cannot be used."""
    if kind == "a file":
        folder.write_text("")
    elif kind == "a loop":
        folder.symlink_to(folder)
    elif kind == "below a file":
        folder.write_text("")
        return folder / "cache"
    elif kind == "too long":
        return folder / ("x" * 300)
    return folder


@pytest.mark.parametrize("kind", ["a file", "a loop", "below a file", "too long"])
def test_a_cache_that_cannot_be_used_is_told_before_anything_is_asked(serve, tmp_path, kind):
    server = serve(lambda connection, number: whole(connection))
    folder = unusable(kind, tmp_path / "cache")
    with pytest.raises(
        files.CacheError, match=rf"cache folder {re.escape(str(folder))}.*LM_ENVS_CACHE.*cache="
    ) as found:
        judge(server, cache=folder)(["p"], ["x"])
    assert server.asked == 0 and "\n" not in str(found.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EDQUOT])
def test_a_cache_that_fails_later_is_told(serve, tmp_path, monkeypatch, number):
    server = serve(lambda connection, number: whole(connection))

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(files.CacheError, match=rf"{re.escape(str(tmp_path))}: {os.strerror(number)}; ") as found:
        judge(server, cache=tmp_path, timeout=20)(["p"], ["x"])
    assert "\n" not in str(found.value) and not [path for path in tmp_path.rglob("*") if path.is_file()]
