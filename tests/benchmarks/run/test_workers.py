"""Runs in processes of their own: one that is killed, one whose parent is killed, one that leaves by itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run import compare
from lm_envs.benchmarks.run.compare import write_results
from lm_envs.benchmarks.run.workers import Event, StopRequest, Workers, several_at_a_time
from tests.benchmarks.fake_task import NAME
from tests.benchmarks.run.jobs import act, killed
from tests.benchmarks.run.refusals import refused
from tests.house import CHECKOUT

TASK = """
import multiprocessing, os, sys
from dataclasses import replace
from pathlib import Path
from tests.benchmarks import fake_task

class Ends:
    def __init__(self, how, calls):
        self.how, self.calls = how, calls

    def __call__(self, prompts, completions, **columns):
        self.calls -= 1
        mark = Path(__file__).with_name("ended")
        if self.calls < 0 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9) if self.how == "kill" else sys.exit(0)
        return [float(len(text)) for text in completions]

def load(how="kill", calls=3):
    return replace(fake_task.load(), name="ends", reward=Ends(how, calls))
"""


def arguments(tmp_path: Path, *more: str) -> list[str]:
    options = ["--iterations", "4", "--test-prompts", "6", "--threads", "1", "--out", str(tmp_path / "out"), *more]
    return ["compare", "--algorithms", "reinforce", *options]


@pytest.fixture
def ends(tmp_path, monkeypatch) -> None:
    """The task, where this process and its workers find it."""
    (tmp_path / "ends.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("ends", None)


def test_a_process_that_is_killed_fails_its_job_alone():
    told: list[Event] = []
    with Workers(2, act, killed) as pool:
        several_at_a_time(pool, ["kill", "leave", "a", "b", "c"], notify=told.append, stop=StopRequest())
        alive = [event for event in told if event["event"] == "placed" and running(event["process"])]
    last = {event["run"]: event for event in told if event["event"] != "placed"}
    assert last["kill"]["message"].startswith("was ended by SIGKILL (the system does that where memory runs out")
    assert last["leave"]["message"] == "ended with status 3"
    assert {last[job]["event"] for job in "abc"} == {"done"}
    assert len({last[job]["result"] for job in "abc"}) < 3  # a worker keeps what it loaded from job to job
    assert os.getsid(0) not in {event.get("session") for event in told}  # a terminal's Ctrl-C does not reach them
    assert alive and not any(running(event["process"]) for event in alive)  # after the block


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_jobs_under_way_are_asked_to_stop_and_no_other_begins():
    told: list[Event] = []
    stop = StopRequest()

    def notify(event: Event) -> None:
        told.append(event)
        stop.requested = sum(event["event"] == "placed" for event in told) == 2

    with Workers(2, act, killed) as pool:
        several_at_a_time(pool, ["wait", "wait", "a"], notify=notify, stop=stop)
    assert [event["run"] for event in told if event["event"] == "done"] == ["wait", "wait"]


def test_after_a_fatal_failure_no_job_begins():
    class Scripted:
        room, begun, asked = 2, 0, 0

        def begin(self, job: int) -> None:
            self.begun += 1

        def events(self) -> Iterator[Event]:
            yield {"event": "iteration"}
            yield {"event": "stopped"} if self.asked else {"event": "failed", "fatal": True}

        def ask(self) -> None:
            self.asked += 1

    pool, told = Scripted(), []
    several_at_a_time(pool, range(5), notify=told.append, stop=StopRequest())
    assert (pool.begun, pool.asked) == (2, 1)
    assert [event["event"] for event in told] == ["iteration", "failed", "iteration", "stopped"]


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_its_run_can_be_resumed(tmp_path, ends, capsys):
    tasks = ["--task", "ends:load", "--task", NAME]
    said = refused(capsys, *arguments(tmp_path, *tasks, "--jobs", "2"))
    log = tmp_path / "out" / "ends_load" / "reinforce" / "seed-0" / "log.txt"
    assert said.startswith(
        "lm-envs: ends_load/reinforce/seed-0: its process was ended by SIGKILL (the system does that"
    )
    assert str(log) in said and log.exists()
    assert [row["task"] for row in write_results(tmp_path / "out")] == [NAME]
    main(arguments(tmp_path, *tasks, "--resume"))
    assert {row["task"] for row in write_results(tmp_path / "out")} == {"ends:load", NAME}


def test_a_reward_that_leaves_the_program_is_no_success(tmp_path, ends, capsys):
    suite = tmp_path / "suite.toml"
    suite.write_text('tasks = ["ends:load"]\nalgorithms = ["reinforce"]\n[task."ends:load"]\noptions = {how = "exit"}')
    said = refused(capsys, *arguments(tmp_path, "--suite", str(suite)))
    assert "sys.exit" in said and re.search(r"ends\.py, line \d+", said)


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    mark, suite = tmp_path / "mark", tmp_path / "suite.toml"
    suite.write_text(
        f'tasks = ["{NAME}"]\nalgorithms = ["reinforce"]\nseeds = [0, 1]\n[task."{NAME}"]\n'
        f'options = {{pause = "reward", mark = "{mark}", at = 5}}'
    )
    words = [sys.executable, "-m", "lm_envs.benchmarks.cli", *arguments(tmp_path, "--suite", str(suite), "--jobs", "2")]
    process = subprocess.Popen(words, cwd=CHECKOUT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    paths = list((tmp_path / "out").rglob(".lock"))
    held = [path for path in paths if not free(path, 0.1)]
    assert held  # a worker is at work
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all(free(path, 20) for path in held)


def free(path: Path, seconds: float) -> bool:
    try:
        with FileLock(path, timeout=seconds):
            return True
    except Timeout:
        return False


def test_two_processes_may_try_a_folder_at_once(tmp_path, monkeypatch):
    """Each writes a probe and deletes it; the other one may have deleted it first."""
    whole = compare.write_atomic

    def other_deletes(path, data):
        whole(path, data)
        path.unlink()

    monkeypatch.setattr(compare, "write_atomic", other_deletes)
    compare.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
