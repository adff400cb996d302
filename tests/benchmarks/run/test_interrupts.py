"""Ctrl-C is heard within seconds, and the time that is left is told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lm_envs.algos.engine.agent import Agent
from lm_envs.benchmarks.run import one_run, workers
from lm_envs.benchmarks.run.progress import figures, left
from lm_envs.benchmarks.run.storage import Checkpoints
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.benchmarks.run.workers import GivenUp, StopRequest, attempt
from tests.benchmarks.fake_task import NAME

SPEC = RunSpec(
    NAME, "reinforce", 0, Plan(iterations=3, test_prompts=4, validation_prompts=4), overrides={"episodes": 8}
)


def test_a_long_iteration_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = one_run.execute(SPEC, tmp_path / "whole")
    mine = Agent.iteration

    def slow(self, env=None):
        if self.iterations_done == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        return mine(self, env)

    said: list[str] = []
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, StopRequest(said.append, 0.1).listening() as stop:
        patch.setattr(Agent, "iteration", slow)
        event = attempt(SPEC, tmp_path / "cut", should_stop=stop)
    assert event["event"] == "stopped" and time.monotonic() - start < 20
    assert "or in 0.1 s" in said[0] and signal.getsignal(signal.SIGALRM) is before
    # what was there goes on, to the same end
    assert one_run.execute(SPEC, tmp_path / "cut")["kl"] == whole["kl"]


def test_an_iteration_that_ends_in_time_is_kept():
    with StopRequest(patience_s=5).listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with StopRequest().listening() as stop:  # without patience no alarm is set
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and stop.requested
    with pytest.raises(GivenUp), StopRequest(patience_s=0.01).listening():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert workers.PATIENCE_S < 5


def test_slow_iterations_have_checkpoints_of_their_own(tmp_path, monkeypatch):
    saved: list[int] = []
    mine = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, n, *more: (saved.append(n), mine(self, n, *more))[1])
    one_run.execute(SPEC, tmp_path / "quick")
    assert saved == [3]  # checkpoint_every is 20
    monkeypatch.setattr(one_run, "CHECKPOINT_S", 0.0)
    one_run.execute(SPEC, tmp_path / "slow")
    assert saved == [3, 1, 2, 3]


def test_rates_and_what_is_left():
    assert "12.3k tok/s" in figures({"tokens_per_second": 12345.0})
    assert "46 tok/s" in figures({"tokens_per_second": 45.6}) and "0.4 tok/s" in figures({"tokens_per_second": 0.42})
    assert left({"iteration": 2, "wall_s": 20.0}, 6) == "about 40 s left"
    assert left({"iteration": 2, "wall_s": 600.0}, 6) == "about 20 min left"
    assert left({"iteration": 1, "wall_s": 3600.0}, 3) == "about 2.0 h left"
    assert left({"iteration": 6, "wall_s": 9.0}, 6) == left({}, 6) == ""
