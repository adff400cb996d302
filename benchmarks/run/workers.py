"""Runs in processes of their own, several at a time: for many cores and small models.

A worker (``python -m lm_envs.benchmarks.run.workers``) reads a job per line from its standard input and writes an
event per
line to its standard output, both JSON, so it pays for its imports and its task once. When the parent is gone it stops
at its next event.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_envs
from lm_envs.benchmarks.errors import Interrupted, UserError, explain
from lm_envs.benchmarks.run.suites import RunSpec
from lm_envs.reward.waiting import waiting

Notify = Callable[[dict[str, Any]], None]


class StopRequest:
    """Ctrl-C, asked politely: the first only sets a flag, which is looked at between iterations; the second interrupts
    at once, and so does the first while a remote judge is waited for.

    Args:
        first: called at the first one.
    """

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._first = first

    def __call__(self) -> bool:
        return self.requested

    def _handle(self, signum: int, frame: object) -> None:
        if self.requested or waiting():
            raise KeyboardInterrupt
        self.requested = True
        self._first()

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT and SIGTERM this way in the block (in a main thread; elsewhere signals never arrive)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def attempt(run: Callable[[], dict[str, Any]], label: str) -> dict[str, Any]:
    """Carry out a run; the event that tells how it ended: "done", "stopped" or "failed".

    "failed" is for errors that the user can put right; ``fatal`` says that the other runs would meet it too. Bugs
    propagate.
    """
    try:
        return {"event": "done", "run": label, "result": run()}
    except Interrupted:
        return {"event": "stopped", "run": label}
    except (UserError, ValueError, FloatingPointError, ImportError, OSError, SystemExit) as error:
        message = explain(error)
        if message is None:
            raise
        return {"event": "failed", "run": label, "message": message, "fatal": isinstance(error, OSError)}


class _Worker:
    """The parent's end of a worker process."""

    def __init__(self, events: queue.Queue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        # The worker must find the package where this process did, and Ctrl-C must reach it once, through the parent.
        root = str(Path(lm_envs.__file__).resolve().parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lm_envs.benchmarks.run.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        self.job: RunSpec | None = None
        self._events = events
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put((self, json.loads(line)))
        self._events.put((self, None))

    def give(self, job: RunSpec, out: Path, threads: int) -> None:
        assert self.process.stdin is not None
        self.job = job
        line = json.dumps({"run": job.to_json(), "out": str(out.resolve()), "threads": threads})
        with contextlib.suppress(BrokenPipeError):  # it died: the end of its output tells
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def run_in_workers(
    specs: Sequence[RunSpec], out: Path, *, jobs: int, threads: int, notify: Notify, stop: StopRequest
) -> None:
    """Carry out runs, ``jobs`` at a time; ``notify`` gets all their events, of which the last is as of :func:`attempt`.

    After a fatal failure or a stop request no run is begun, and those under way are asked to stop.

    Raises:
        RuntimeError: a worker died; what it said is on standard error.
    """
    waiting = deque(specs)
    events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
    workers = [_Worker(events) for _ in range(min(jobs, len(specs)))]
    try:
        for worker in workers:
            worker.give(waiting.popleft(), out, threads)
        told = False
        while any(worker.job for worker in workers):
            if stop.requested and not told:
                told = True
                waiting.clear()
                for worker in workers:
                    worker.interrupt()
            try:
                worker, event = events.get(timeout=0.2)
            except queue.Empty:
                continue
            if event is None:
                label = worker.job.label if worker.job else "no run"
                raise RuntimeError(
                    f"the worker of {label} ended with status {worker.process.wait()}: its output is above"
                )
            notify(event)
            if event["event"] in ("done", "stopped", "failed"):
                worker.job = None
                if event.get("fatal"):
                    stop.requested = True
                if waiting and not stop.requested:
                    worker.give(waiting.popleft(), out, threads)
        for worker in workers:
            worker.close()
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()


def main() -> None:
    """The worker process: jobs in, events out."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not be taken for an event

    def send(event: dict[str, Any]) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    with StopRequest().listening() as stop:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        for line in sys.stdin:
            job = json.loads(line)
            spec = RunSpec.from_json(job["run"])

            def run(spec: RunSpec = spec, job: dict[str, Any] = job) -> dict[str, Any]:
                from lm_envs.benchmarks.run.one_run import execute

                return execute(spec, Path(job["out"]), threads=job["threads"], notify=send, should_stop=stop)

            try:
                send(attempt(run, spec.label))
            except BrokenPipeError:
                raise SystemExit(1) from None  # the parent was killed


if __name__ == "__main__":
    main()
