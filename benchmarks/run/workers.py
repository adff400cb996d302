"""Several runs at a time, in processes of their own: for many cores and small models.

A worker imports everything and loads its task once, and carries out one run after another. Its output is in the run's
``log.txt``. It ends with its parent, however that ends, so it never keeps the lock of a folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lm_envs.benchmarks.errors import Interrupted, explain
from lm_envs.benchmarks.run.suites import RunSpec
from lm_envs.reward.waiting import waiting

Notify = Callable[[dict[str, Any]], None]
CarryOut = Callable[..., None]
"""Carries out runs in a folder, as :func:`one_by_one` does in this process."""
LOG = "log.txt"
PATIENCE_S = 4.0  # after the first Ctrl-C, for the iteration under way
_SPAWN = multiprocessing.get_context("spawn")  # a forked process hangs where its parent's torch has used threads


class GivenUp(KeyboardInterrupt):
    """An iteration took too long after the first Ctrl-C; ``--resume`` repeats it."""


class StopRequest:
    """Ctrl-C in two steps: the first says so and sets a flag, which is checked between iterations; the second
    interrupts at once, and so does the first during a wait for a remote judge.

    Args:
        say: receives the answer to the first.
        patience_s: seconds after which an iteration is given up, as a second Ctrl-C would; ``--resume`` goes on from
            the last checkpoint. None waits for its end.
    """

    def __init__(self, say: Callable[[str], object] = lambda text: None, patience_s: float | None = None) -> None:
        self.requested = False
        self._say, self._patience_s = say, patience_s

    def __call__(self) -> bool:
        return self.requested

    def _handle(self, signum: int, frame: object) -> None:
        if self.requested or waiting():
            raise KeyboardInterrupt
        self.requested = True
        if self._patience_s is None:
            self._say("Stopping after this iteration; Ctrl-C again stops at once.")
        else:
            self._say(f"Stopping after this iteration, or in {self._patience_s:g} s; Ctrl-C again stops at once.")
            signal.setitimer(signal.ITIMER_REAL, self._patience_s)

    def _give_up(self, signum: int, frame: object) -> None:
        raise GivenUp

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT and SIGTERM this way in the block (in the main thread; others receive no signals)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before: dict[signal.Signals, Any] = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)


def attempt(spec: RunSpec, out: Path, logged: bool = False, **options: Any) -> dict[str, Any]:
    """Carry out a run; return the event that tells how it ended: "done", "stopped" or "failed".

    "failed" is for errors that the user can put right; ``fatal`` says that the other runs would fail too. Bugs
    propagate.

    Args:
        logged: write what is printed to the run's :data:`LOG`.
        options: passed to :func:`~lm_envs.benchmarks.run.one_run.execute`.
    """
    from lm_envs.benchmarks.run.one_run import execute
    from lm_envs.benchmarks.run.storage import Checkpoints
    from lm_envs.processes import group

    label = spec.label
    try:
        if logged:
            (out / spec.folder).mkdir(parents=True, exist_ok=True)
            with (out / spec.folder / LOG).open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
        return {"event": "done", "run": label, "result": execute(spec, out, **options)}
    except (Interrupted, GivenUp):
        return {"event": "stopped", "run": label, "iteration": Checkpoints(out / spec.folder / "checkpoints").last}
    except (Exception, SystemExit) as error:
        message = explain(error)
        if message is None:
            raise
        with contextlib.suppress(OSError), (out / spec.folder / LOG).open("a") as log:  # a full disk
            traceback.print_exc(file=log)
        fatal = isinstance(error, OSError) or group.count() > 1  # other processes are still in the midst of it
        return {"event": "failed", "run": label, "message": message, "fatal": fatal}


def one_by_one(specs: Sequence[RunSpec], out: Path, *, notify: Notify, stop: StopRequest, **options: Any) -> None:
    """Carry out runs in this process; ``notify`` gets all their events, the last as :func:`attempt` returns it.

    ``options`` are passed to :func:`~lm_envs.benchmarks.run.one_run.execute`. After a fatal failure or a stop request
    no run begins.
    """
    for spec in specs:
        notify(event := attempt(spec, out, **options, notify=notify, should_stop=stop))
        if stop.requested or event.get("fatal"):
            break


class _Worker:
    """The parent's end of a worker process."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self.events, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(theirs, out, options))
        self.job: RunSpec | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until it handles it
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def give(self, job: RunSpec) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # it died, and its events end
            self.events.send(job)

    def event(self, out: Path) -> dict[str, Any]:
        """The next event of its job; "failed" if the process is gone."""
        assert self.job is not None
        try:
            event: dict[str, Any] = self.events.recv()
            return event
        except (EOFError, ConnectionResetError):
            self.process.join()
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        memory = " (the system does that where memory runs out: try fewer --jobs)" if code == -signal.SIGKILL else ""
        said = f"its process {how}{memory}; what it said is in {out / self.job.folder / LOG}"
        return {"event": "failed", "run": self.job.label, "message": said, "fatal": False}


def run_in_workers(
    specs: Sequence[RunSpec], out: Path, *, jobs: int, notify: Notify, stop: StopRequest, **options: Any
) -> None:
    """Carry out runs, ``jobs`` at a time, as :func:`one_by_one`; the last event is "failed" if the process was killed.

    After a fatal failure or a stop request no run begins, and those under way are asked to stop.
    """
    queue = deque(specs)
    workers: list[_Worker] = []

    def begin(worker: _Worker | None = None) -> None:
        if worker is None:
            workers.append(worker := _Worker(out.resolve(), options))
        worker.give(queue.popleft())

    try:
        while queue and len(workers) < jobs:
            begin()
        asked = False
        while busy := {worker.events: worker for worker in workers if worker.job}:
            if stop.requested and not asked:
                asked = True
                queue.clear()
                for worker in busy.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker.process.pid or 0, signal.SIGINT)
            for ready in wait(list(busy), timeout=0.2):
                worker = busy[ready]  # type: ignore[index]
                event = worker.event(out)
                notify(event)
                if event["event"] not in ("done", "stopped", "failed"):
                    continue
                worker.job = None
                if event.get("fatal"):
                    stop.requested = True
                if not worker.process.is_alive():
                    workers.remove(worker)
                if queue and not stop.requested:
                    begin(worker if worker in workers else None)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _work(events: Connection, out: Path, options: dict[str, Any]) -> None:
    os.setsid()  # a terminal's Ctrl-C reaches it once, through the parent
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with StopRequest(patience_s=PATIENCE_S).listening() as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        while True:
            events.send(attempt(events.recv(), out, True, **options, notify=events.send, should_stop=stop))
