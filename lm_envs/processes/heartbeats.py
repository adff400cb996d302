"""What tells a slow process from one that is lost: each writes every second where it is, and reads where others are.

A process that waits for others names the one that is behind as lost when that one has not written for
:data:`SILENT_S` seconds, or when it has waited for ``WAIT_S`` plus four times as long as it worked itself since the
step before; the environment variable LM_ENVS_WAIT_S sets the former. There is no such limit while a process waits for a
remote judge, or for what only one process does.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EVERY_S = 1.0
SILENT_S = 30.0
WAIT_S = 45.0
_PER_WORK = 4.0
_SPOKEN_S = 3.0  # for the one that speaks before others end
_TOLD = 10  # beats after another's failure in which this one should have come to a step
_excuses = 0  # running blocks of `excused`


class Lost(Exception):
    """Another process of the run failed, ended or hangs; the message says which one and why."""


@contextlib.contextmanager
def excused() -> Iterator[None]:
    """Let the others wait without a limit while the block waits for something outside, such as a remote judge."""
    global _excuses
    _excuses += 1
    try:
        yield
    finally:
        _excuses -= 1


class Heartbeats(threading.Thread):
    """The heartbeats of a process.

    Args:
        connect: makes a store, for the thread alone.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, world: int) -> None:
        super().__init__(name="heartbeats", daemon=True)
        self.rank, self.others = rank, [other for other in range(world) if other != rank]
        self._connect = connect
        self._store = connect()  # of the main thread
        self._limit = float(os.environ.get("LM_ENVS_WAIT_S", WAIT_S))
        self._main, self._parent = threading.main_thread().ident, os.getppid()
        self._steps = 0
        self._since: float | None = None  # when it began to wait
        self._step, self._allowed = "", 0.0
        self._worked_from = time.monotonic()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def waiting(self, step: str, patient: bool) -> Iterator[None]:
        """Wait in the block for the others to come to a step."""
        now = time.monotonic()
        self._allowed = float("inf") if patient else self._limit + _PER_WORK * (now - self._worked_from)
        self._step, self._steps, self._since = step, self._steps + 1, now
        try:
            yield
        finally:
            self._since, self._worked_from = None, time.monotonic()

    def fail(self, message: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"failed/{self.rank}", message)

    def end(self) -> None:
        self._ended.set()
        if self.is_alive():  # the interpreter must not end while it is within the store's code
            self.join(5)

    def reason(self, step: str) -> str:
        """Say which process broke off a step, and why, from what it left."""
        try:
            before = self._read(self._store)
            for _ in range(4):
                for other in self.others:
                    if self._store.check([f"failed/{other}"]):
                        return f"process {other}: {self._store.get(f'failed/{other}').decode()}"
                time.sleep(EVERY_S)
            after = self._read(self._store)
            silent = [other for other in self.others if before.get(other) == after.get(other)]
            gone = silent[0] if silent else None
        except RuntimeError:
            gone = 0  # it keeps the store
        if gone is None:
            return f"the connection between the processes broke off at {step!r}"
        return f"process {gone} ended without a word: it was killed, or the system ran out of memory"

    def run(self) -> None:
        """Write and read until the process ends."""
        heard: dict[int, tuple[Any, float]] = {}
        store, beat, told = self._connect(), 0, 0
        while not self._ended.wait(EVERY_S):
            if os.getppid() != self._parent:
                os._exit(1)  # whoever started it is gone
            beat += 1
            frame = sys._current_frames().get(self._main or 0)
            try:
                store.set(f"at/{self.rank}", json.dumps([beat, self._steps, _place(frame), _excuses > 0]))
                found = self._read(store)
                if failed := [other for other in self.others if store.check([f"failed/{other}"])]:
                    told += 1
                    if told > _TOLD:
                        said = store.get(f"failed/{failed[0]}").decode()
                        self._give_up(failed[0], f"process {failed[0]}: {said}")
            except RuntimeError:  # process 0 is gone, which a step will notice, or does not answer
                self._ended.wait(10)
                if self._since is not None and not self._ended.is_set():
                    self._give_up(0, "process 0 does not answer", speaker=1)
                continue
            now = time.monotonic()
            for other, said in found.items():
                if other not in heard or heard[other][0] != said:
                    heard[other] = said, now
            self._judge(heard, now)

    def _judge(self, heard: dict[int, tuple[Any, float]], now: float) -> None:
        since, steps = self._since, self._steps
        for other, ((_, reached, place, excused), at) in heard.items():
            if now - at > SILENT_S:
                why = "it was stopped, or its machine is gone"
                self._give_up(other, f"process {other} has not answered for {now - at:.0f} s: {why}")
            if since is not None and reached < steps and not excused and now - since > self._allowed:
                waited = f"the others waited {now - since:.0f} s for it at {self._step!r}"
                why = f"{waited}; where that may take longer, set LM_ENVS_WAIT_S"
                self._give_up(other, f"process {other} hangs at {place}: {why}")

    def _give_up(self, lost: int, message: str, speaker: int | None = None) -> None:
        """End this process, and say why if it is the first of those that are not lost."""
        speaker = int(lost == 0) if speaker is None else speaker
        if self.rank == speaker:
            sys.__stderr__.write(f"lm-envs: {message}; --resume goes on\n")  # type: ignore[union-attr]
            sys.__stderr__.flush()  # type: ignore[union-attr]
        else:
            time.sleep(_SPOKEN_S)
        os._exit(1)

    def _read(self, store: Any) -> dict[int, Any]:
        known = [other for other in self.others if store.check([f"at/{other}"])]
        return {other: json.loads(store.get(f"at/{other}")) for other in known}


def _place(frame: FrameType | None) -> str:
    """The file and line where the main thread is, in code that is no library's if there is any."""
    innermost = frame
    while frame is not None:
        path = frame.f_code.co_filename
        if "site-packages" not in path and not path.startswith((sys.base_prefix, "<")):
            return f"{path}, line {frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place" if innermost is None else f"{innermost.f_code.co_filename}, line {innermost.f_lineno}"
