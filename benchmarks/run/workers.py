"""Runs one by one in this process, or several at a time elsewhere: in processes of this machine, or on a Ray cluster.

A worker imports everything and loads its task once, and carries out one run after another. Its output is in the run's
``log.txt``. It ends with its parent, however that ends, so it never keeps the lock of a folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from lm_envs.benchmarks.errors import Interrupted, explain
from lm_envs.benchmarks.run.suites import RunSpec
from lm_envs.printable import one_line
from lm_envs.reward.waiting import waiting

Event = dict[str, Any]
Notify = Callable[[Event], None]
CarryOut = Callable[..., None]
"""Carries out runs in a folder, as :func:`one_by_one` does in this process."""
LOG = "log.txt"
LAST = ("done", "stopped", "failed", "left")
"""The last event of a run is one of these; "left" is one that was to stop before it began."""
PATIENCE_S = 4.0  # after the first Ctrl-C, for the iteration under way
_POLL_S = 0.2
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


def attempt(
    spec: RunSpec,
    out: Path,
    logged: bool = False,
    within: contextlib.AbstractContextManager[object] = contextlib.nullcontext(),  # noqa: B008
    **options: Any,
) -> Event:
    """Carry out a run; return the event that tells how it ended: "done", "stopped" or "failed".

    "failed" is for errors that the user can put right; ``fatal`` says that the other runs would fail too. Bugs
    propagate unless ``logged``.

    Args:
        logged: write what is printed to the run's :data:`LOG`.
        within: is entered around the run.
        options: passed to :func:`~lm_envs.benchmarks.run.one_run.execute`.
    """
    from lm_envs.benchmarks.run.one_run import execute
    from lm_envs.benchmarks.run.storage import Checkpoints
    from lm_envs.processes import group

    label, log = spec.label, out / spec.folder / LOG
    try:
        with _printed_into(log) if logged else contextlib.nullcontext(), within:
            return {"event": "done", "run": label, "result": execute(spec, out, **options)}
    except (Interrupted, GivenUp):
        return {"event": "stopped", "run": label, "iteration": Checkpoints(out / spec.folder / "checkpoints").last}
    except (Exception, SystemExit) as error:
        with contextlib.suppress(OSError), log.open("a") as file:  # a full disk
            traceback.print_exc(file=file)
        message = explain(error)
        if message is None:
            if not logged:
                raise
            return failed(spec, out, f"ended with {type(error).__name__}: {one_line(str(error), 300)}")
        fatal = isinstance(error, OSError) or group.count() > 1  # other processes are still in the midst of it
        return {"event": "failed", "run": label, "message": message, "fatal": fatal}


def failed(spec: RunSpec, out: Path, how: str) -> Event:
    """The last event of a run whose process ended, by a bug or from outside."""
    message = f"its process {how}; what it said is in {out / spec.folder / LOG}"
    return {"event": "failed", "run": spec.label, "message": message, "fatal": False}


@contextlib.contextmanager
def _printed_into(log: Path) -> Iterator[None]:
    """Append what the block prints, in Python or below it, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    before = os.dup(1), os.dup(2)
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        for mine, theirs in enumerate(before, 1):
            os.dup2(theirs, mine)
            os.close(theirs)


def one_by_one(specs: Sequence[RunSpec], out: Path, *, notify: Notify, stop: StopRequest, **options: Any) -> None:
    """Carry out runs in this process; ``notify`` gets all their events, the last as :func:`attempt` returns it.

    ``options`` are passed to :func:`~lm_envs.benchmarks.run.one_run.execute`. After a fatal failure or a stop request
    no run begins.
    """
    for spec in specs:
        notify(event := attempt(spec, out, **options, notify=notify, should_stop=stop))
        if stop.requested or event.get("fatal"):
            break


class Pool(Protocol):
    """Where several jobs, runs for instance, are carried out at a time."""

    room: int
    """For how many at a time."""

    def begin(self, job: Any) -> None:
        """Begin a job."""

    def events(self) -> Iterable[Event]:
        """Events of the jobs under way, those of :data:`LAST` once for each; waits for them for a short time."""

    def ask(self) -> None:
        """Ask the jobs under way to stop after their iteration."""


def several_at_a_time(pool: Pool, jobs: Sequence[Any], *, notify: Notify, stop: StopRequest) -> None:
    """Carry out jobs in a pool; ``notify`` gets all their events.

    After a fatal failure or a stop request no job begins, and those under way are asked to stop.
    """
    queue, under_way, asked = deque(jobs), 0, False
    while under_way or (queue and not stop.requested):
        while queue and under_way < pool.room and not stop.requested:
            pool.begin(queue.popleft())
            under_way += 1
        if stop.requested and not asked:
            asked = True
            pool.ask()
        for event in pool.events():
            under_way -= event["event"] in LAST
            notify(event)
            if event.get("fatal"):
                stop.requested = True


def run_in_workers(
    specs: Sequence[RunSpec],
    out: Path,
    *,
    jobs: int,
    notify: Notify,
    stop: StopRequest,
    shared: tuple[int, bool] = (1, False),
    **options: Any,
) -> None:
    """Carry out runs, ``jobs`` at a time, as :func:`one_by_one`; the last event of one that was killed is "failed".

    ``shared`` is by how many processes each, and whether they share out the weights; if several, there is one run.
    """
    do = partial(_carry_out, out=out.resolve(), shared=shared, options=options)
    with Workers(jobs, do, lambda spec, how: failed(spec, out, how)) as pool:
        several_at_a_time(pool, specs, notify=notify, stop=stop)


def _carry_out(
    spec: RunSpec, tell: Notify, stop: StopRequest, out: Path, shared: tuple[int, bool], options: dict[str, Any]
) -> Event:
    from transformers.utils.logging import disable_progress_bar

    from lm_envs.benchmarks.run.many_processes import helped

    disable_progress_bar()
    within = helped(*shared) if shared[0] > 1 else contextlib.nullcontext()
    return attempt(spec, out, True, within, **options, notify=tell, should_stop=stop)


class Workers:
    """Processes of this machine, each of which carries out a job at a time; where one is killed, its job alone fails.

    They end with the block or with this process, however that ends. A terminal's Ctrl-C does not reach them.

    Args:
        do: carries out a job in a worker: ``do(job, tell, stop)`` returns the last event and tells the others.
        killed: gives the last event of a job whose process ended, by the job and how it ended.
    """

    def __init__(
        self, room: int, do: Callable[[Any, Notify, StopRequest], Event], killed: Callable[[Any, str], Event]
    ) -> None:
        self.room, self._do, self._killed = room, do, killed
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, tuple[_Worker, Any]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in (*self._idle, *(worker for worker, _ in self._busy.values())):
            worker.process.kill()
            worker.process.join()

    def begin(self, job: Any) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self._do)
        self._busy[worker.events] = worker, job
        with contextlib.suppress(BrokenPipeError):  # it died, and its events end
            worker.events.send(job)

    def events(self) -> Iterator[Event]:
        for ready in wait(list(self._busy), _POLL_S):
            worker, job = self._busy[ready]  # type: ignore[index]
            try:
                event: Event = worker.events.recv()
            except (EOFError, ConnectionResetError):
                event = self._killed(job, worker.end())
            if event["event"] in LAST:
                del self._busy[worker.events]
                self._idle += [worker] * worker.process.is_alive()
            yield event

    def ask(self) -> None:
        for worker, _ in self._busy.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid or 0, signal.SIGINT)


class _Worker:
    """A worker process, and this process's end of the pipe to it: jobs go in, events come out.

    Pebble's pool (5.2.3) was tried in its place and is not shorter. Of 150 pools of two processes, one of which was
    killed at a random moment of the first 0.4 s, it failed every job in 109 and one waited for ever: its processes
    share a pipe and locks.
    """

    def __init__(self, do: Callable[[Any, Notify, StopRequest], Event]) -> None:
        self.events, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(theirs, do))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until it handles it
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def end(self) -> str:
        """Wait for its end; return how it ended."""
        self.process.join()
        code = self.process.exitcode or 0
        memory = " (the system does that where memory runs out: try fewer --jobs)" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{memory}" if code < 0 else f"ended with status {code}"


def _work(events: Connection, do: Callable[[Any, Notify, StopRequest], Event]) -> None:
    os.setsid()  # a terminal's Ctrl-C reaches it once, through the parent
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with StopRequest(patience_s=PATIENCE_S).listening() as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while True:
            events.send(do(events.recv(), events.send, stop))
