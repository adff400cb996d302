"""Who is taken to be lost, and what is said of it."""

import json
import threading
import time

import pytest

from lm_envs.processes import heartbeats
from lm_envs.processes.heartbeats import Heartbeats, excused


class Store(dict):
    """A store in memory, or one that is gone."""

    gone = False

    def set(self, key, value):
        self._here()
        self[key] = value.encode()

    def get(self, key):
        self._here()
        return self[key]

    def check(self, keys):
        self._here()
        return all(key in self for key in keys)

    def _here(self):
        if self.gone:
            raise RuntimeError("Connection reset by peer")


class Stopped(Exception):
    pass


@pytest.fixture
def beats(monkeypatch):
    """Those of process 1 of 3, without a thread; to stop raises."""
    found = Heartbeats(Store, 1, 3)
    monkeypatch.setattr(heartbeats, "EVERY_S", 0.01)

    def stop(lost, message, speaker=None):
        raise Stopped(f"{lost}: {message}")

    found._give_up = stop
    return found


def heard(steps, *, excused=False, ago=0.0):
    """What process 1 last heard of processes 0 and 2; the second has come to `steps`."""
    now = 1000.0
    return {0: ([9, 5, "a.py, line 1", False], now), 2: ([9, steps, "b.py, line 7", excused], now - ago)}, now


def test_who_is_behind_is_named_after_a_while(beats):
    with beats.waiting("a sum", patient=False):
        beats._steps, beats._allowed, beats._since = 5, 45.0, 950.0
        beats._judge(*heard(5))
        beats._judge(*heard(4, excused=True))
        with pytest.raises(
            Stopped, match="^2: process 2 hangs at b.py, line 7: the others waited 50 s for it at 'a sum'"
        ):
            beats._judge(*heard(4))
        beats._since = 960.0
        beats._judge(*heard(4))  # 40 s are not enough
    beats._judge(*heard(4))  # nobody waits


def test_the_limit_grows_with_the_own_work_and_patience_has_none(beats, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 500.0)
    beats._worked_from = 490.0
    with beats.waiting("a sum", patient=False):
        assert beats._allowed == heartbeats.WAIT_S + 4 * 10
    with beats.waiting("a checkpoint", patient=True):
        beats._steps, beats._since = 5, 0.0
        beats._judge(*heard(4))


def test_who_is_silent_is_named_whether_or_not_somebody_waits(beats):
    beats._judge(*heard(9, ago=29))
    with pytest.raises(Stopped, match="^2: process 2 has not answered for 31 s"):
        beats._judge(*heard(9, ago=31))


def test_the_reason_is_what_the_one_that_failed_left(beats):
    beats._store.set("failed/2", "ppo: the loss is nan")
    assert beats.reason("a sum") == "process 2: ppo: the loss is nan"


def test_the_reason_is_a_kill_where_nothing_is_left(beats, monkeypatch):
    number = iter(range(100))
    monkeypatch.setattr(time, "sleep", lambda s: beats._store.set("at/0", json.dumps([next(number), 1, "", False])))
    beats._store.set("at/0", json.dumps([-1, 1, "", False]))
    beats._store.set("at/2", json.dumps([7, 1, "", False]))
    assert beats.reason("a sum").startswith("process 2 ended without a word")
    beats._store.gone = True
    assert beats.reason("a sum").startswith("process 0 ended without a word")


def test_only_the_first_that_is_not_lost_speaks(monkeypatch, capsys):
    monkeypatch.setattr(heartbeats.os, "_exit", lambda status: None)
    monkeypatch.setattr(heartbeats, "_SPOKEN_S", 0)
    monkeypatch.setattr(heartbeats.sys, "__stderr__", heartbeats.sys.stdout)
    for rank in range(3):
        Heartbeats(Store, rank, 3)._give_up(0, f"said by {rank}")
        Heartbeats(Store, rank, 3)._give_up(2, f"said by {rank}")
    assert capsys.readouterr().out == "lm-envs: said by 0; --resume goes on\nlm-envs: said by 1; --resume goes on\n"


def test_a_process_writes_where_it_is():
    store = Store()
    beats = Heartbeats(lambda: store, 0, 2)
    beats._ended = threading.Event()
    with excused():
        beats.start()
        for _ in range(300):
            time.sleep(0.01)
            if "at/0" in store:
                break
    beats.end()
    _, steps, place, is_excused = json.loads(store["at/0"])
    assert steps == 0 and is_excused and "test_heartbeats.py, line" in place
