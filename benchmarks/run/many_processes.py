"""A command by many processes: process 0 carries it out and calls the others to its runs; ``--processes N`` starts them
the way torchrun does, and watches them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

from lm_envs.benchmarks.errors import Interrupted, UserError, explain
from lm_envs.processes.heartbeats import Lost

GRACE_S = 45.0  # for the others after one failed: until then process 0 says why
END_S = 5.0  # for the others after process 0 ended


STARTED = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
"""Whether torchrun or :func:`launch` started this process as one of several."""
if STARTED:  # before torch is imported: its stack traces of a broken connection would hide the line that says why
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def carry_out(do: Callable[[], object], fsdp: bool) -> None:
    """Do what a command does; as a process after the first, help with its runs and print nothing.

    Args:
        fsdp: share out what is trained among the processes.

    Raises:
        UserError: there is one process, and nothing to share out.
        SystemExit: on processes after the first, where the run failed, was stopped or was broken off.
    """
    if not STARTED:
        if fsdp:
            raise UserError("--fsdp shares out the weights among processes: add --processes N, or start with torchrun")
        do()
        return
    from lm_envs.processes import group

    joined = group.start(fsdp)
    assert joined is not None
    try:
        if joined.rank == 0:
            with group.alone():
                do()
            group.call(None)
        else:
            _follow()
    except BaseException as error:  # raised again, or told to process 0
        group.end(_told(error))
        if joined.rank == 0:
            raise
        raise SystemExit(130 if isinstance(error, (Interrupted, KeyboardInterrupt)) else 1) from None
    group.end()


def _follow() -> None:
    from transformers.utils.logging import disable_progress_bar

    from lm_envs.benchmarks.run.one_run import follow
    from lm_envs.benchmarks.run.workers import StopRequest

    disable_progress_bar()
    warnings.simplefilter("ignore")  # process 0 says the same
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), StopRequest().listening() as stop:
        follow(stop)


def _told(error: BaseException) -> str | None:
    """What the other processes are told of the error that ends this one; nothing if it comes from them."""
    if isinstance(error, (Lost, Interrupted, KeyboardInterrupt)):
        return None
    message = explain(error)
    if message is None:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return message


def launch(words: Sequence[str], count: int) -> int:
    """Carry out a command line of lm-envs by ``count`` processes; return its exit status, that of process 0.

    A signal is passed on to all of them. Where one fails and process 0 cannot say so, this one does.
    """
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    failed: tuple[int, int] | None = None
    try:
        for place in places(count):
            # In sessions of their own: a terminal's Ctrl-C reaches each once, through here.
            command = [sys.executable, "-m", "lm_envs", *words]
            ranks.append(subprocess.Popen(command, env={**os.environ, **place}, start_new_session=True))
        deadline = float("inf")
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            bad = [(rank, process.returncode) for rank, process in enumerate(ranks) if process.returncode]
            if bad and failed is None:
                failed, deadline = bad[0], time.monotonic() + GRACE_S
            if ranks[0].poll() is not None and deadline > time.monotonic() + END_S:
                deadline = time.monotonic() + END_S  # it has said what there was to say
            time.sleep(0.05)
        spoke = ranks[0].poll() is not None and ranks[0].returncode >= 0
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if spoke:
        return ranks[0].returncode
    rank, status = failed or (0, ranks[0].returncode)
    print(f"lm-envs: process {rank} {_ended(status)}; --resume goes on", file=sys.stderr)
    return 1


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    memory = " (the system does that where memory runs out)" if status == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{memory}"


@contextlib.contextmanager
def helped(count: int, fsdp: bool) -> Iterator[None]:
    """Carry out the block's run as process 0 of ``count`` on this machine; the others end with the block.

    They find modules where this process does, and print where it prints. Like them it must be new: what it kept of
    another run, such as measurements of the same start, they would not have.
    """
    from lm_envs.processes import group

    mine, *others = places(count)
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"from {__name__} import carry_out; carry_out(int, {fsdp})"]
    helpers: list[subprocess.Popen[bytes]] = []
    try:
        for place in others:
            helpers.append(subprocess.Popen(command, env={**os.environ, **path, **place}, start_new_session=True))
        os.environ.update(mine)
        group.start(fsdp)
        with group.alone():
            yield
        group.call(None)
        group.end()
    except BaseException as error:  # raised again
        group.end(_told(error))
        raise
    finally:
        deadline = time.monotonic() + END_S
        for helper in helpers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(max(0.0, deadline - time.monotonic()))
            helper.kill()
            helper.wait()


def places(count: int) -> list[dict[str, str]]:
    """The environments of processes on this machine, by which they find each other, as torchrun sets them."""
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in place.items()} for place in ranks]


def free_port() -> int:
    """Return a port of this machine that nothing holds now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def check_shares(agent: Any) -> None:
    """Raise UserError if a batch has fewer groups (texts, for an agent that learns from data) than there are processes
    to share it."""
    from lm_envs.processes import group

    config = agent.config
    if config.episodes is None or config.steps is not None:
        return
    groups = config.episodes // (1 if agent.needs_data else config.group_size)
    if groups < group.world():
        raise UserError(
            f"{agent.name}: {group.world()} processes share the {groups} group{'s' * (groups > 1)} of a batch "
            f"(episodes={config.episodes}, group_size={config.group_size}): take more episodes or fewer processes"
        )
