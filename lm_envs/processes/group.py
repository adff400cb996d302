"""The processes that carry out a run together, and what they tell each other.

Work is replicated unless it is shared through :mod:`lm_envs.processes.sharing`: every process holds the whole batch and
takes the same decisions, so what knows nothing of processes stays right.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lm_envs.processes.heartbeats import Heartbeats, Lost

T = TypeVar("T")
COME_S = 60  # within which all processes must have come
_NO_LIMIT = timedelta(days=365)  # of torch's waits: heartbeats tell a slow process from a lost one


class Group(Protocol):
    """Processes numbered from 0 that take the same steps in the same order."""

    rank: int
    world: int

    def exchange(self, value: Any, step: str, patient: bool) -> list[Any]:
        """Return the values of all processes, by rank; ``patient`` waits without a limit for what others work on."""

    def sum(self, x: Tensor, step: str) -> None:
        """Replace a tensor by the sum of those of all processes."""


_joined: Processes | None = None
_sharing: ContextVar[Group | None] = ContextVar("sharing", default=None)


def world() -> int:
    """How many processes share the work that is done here: 1 within :func:`alone`."""
    here = _sharing.get()
    return 1 if here is None else here.world


def rank() -> int:
    """This process's number among those that share the work, 0 where it is done alone."""
    here = _sharing.get()
    return 0 if here is None else here.rank


def number() -> int:
    """This process's number in the run, whether or not it shares work here."""
    return 0 if _joined is None else _joined.rank


def count() -> int:
    """How many processes the run has, whether or not they share work here."""
    return 1 if _joined is None else _joined.world


def shares() -> int:
    """How many processes of the run hold a share each of what is trained; 1 where each holds a copy."""
    return _joined.world if _joined is not None and _joined.fsdp else 1


@contextlib.contextmanager
def sharing(group: Group | None) -> Iterator[None]:
    """Share the block's work with a group; with None do it alone."""
    before = _sharing.set(group)
    try:
        yield
    finally:
        _sharing.reset(before)


def alone() -> contextlib.AbstractContextManager[None]:
    """Do the block's work in this process, whatever the others do."""
    return sharing(None)


def together() -> contextlib.AbstractContextManager[None]:
    """Share the block's work with all processes of the run, each of which must enter it."""
    return sharing(_joined)


def exchange(value: T, step: str, *, patient: bool = False) -> list[T]:
    """Return the values that all processes bring to a step, by rank; the values are pickled."""
    here = _sharing.get()
    return [value] if here is None else here.exchange(value, step, patient)


def add(x: Tensor, step: str) -> None:
    """Replace a tensor by the sum over processes of theirs, the same bits on each."""
    here = _sharing.get()
    if here is not None:
        here.sum(x, step)


def first(do: Callable[[], T], step: str) -> T:
    """Let process 0 do something alone while the others wait, and return its result on all."""
    if world() == 1:
        return do()
    result = None
    if rank() == 0:
        with alone():
            result = do()
    return exchange(result, step, patient=True)[0]  # type: ignore[return-value]


def call(job: Any) -> None:
    """On process 0: tell the others what to do together with it; None lets them end."""
    with together():
        exchange(job, "the next run", patient=True)


def called() -> Any:
    """On the other processes: wait for what process 0 calls them to."""
    with together():
        return exchange(None, "the next run", patient=True)[0]


def check_gpu(device: str) -> None:
    """Raise ValueError if processes of this machine would share a GPU under this name of a device."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1
    if here == 1 or not device.startswith("cuda"):
        return
    if device != "cuda":
        raise ValueError(f"{here} processes of this machine cannot share {device!r}: with 'cuda' each takes its own")
    if here > torch.cuda.device_count():
        raise ValueError(f"{here} processes of this machine need a GPU each, and it has {torch.cuda.device_count()}")


def threads() -> int:
    """Torch threads for each process of this machine, if nothing says how many."""
    on_this_machine = 1 if "OMP_NUM_THREADS" in os.environ else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, torch.get_num_threads() // on_this_machine)


def check_same(values: dict[str, Any], step: str) -> None:
    """Raise ValueError, which names the first difference, unless all processes bring the same values."""
    theirs = exchange(values, step, patient=True)  # one may have loaded its models before, and the others not
    for other, found in enumerate(theirs):
        for name in sorted(theirs[0].keys() | found.keys()):
            mine, its = theirs[0].get(name), found.get(name)
            if mine != its:
                raise ValueError(
                    f"the processes of this run differ in {name}: process 0 has {mine!r}, process {other} has {its!r}; "
                    "give all of them the same files, versions and options"
                )


class Processes:
    """The processes that torchrun or :func:`lm_envs.benchmarks.run.launch.launch` started, joined by torch.distributed:
    gloo, and nccl between GPUs."""

    def __init__(self, rank: int, world: int, host: str, port: int, served: bool, fsdp: bool) -> None:
        self.rank, self.world, self.fsdp = rank, world, fsdp
        store = _store(rank, world, host, port, served)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart
        self.heartbeats = Heartbeats(lambda: _client(host, port, attempt), rank, world)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore(attempt, store), rank=rank, world_size=world, timeout=_NO_LIMIT
        )
        self.heartbeats.start()

    @contextlib.contextmanager
    def waiting(self, step: str, patient: bool = False) -> Iterator[None]:
        """Communicate in the block.

        Raises:
            Lost: another process is gone.
        """
        try:
            with self.heartbeats.waiting(step, patient):
                yield
        except RuntimeError as error:  # what torch raises where a connection ends
            raise Lost(self.heartbeats.reason(step)) from error

    def exchange(self, value: Any, step: str, patient: bool) -> list[Any]:
        found: list[Any] = [None] * self.world
        with self.waiting(step, patient):
            dist.all_gather_object(found, (step, value))
        if other := [number for number, (at, _) in enumerate(found) if at != found[0][0]]:
            raise Lost(
                f"process {other[0]} has come to {found[other[0]][0]!r} and process 0 to {found[0][0]!r}: "
                "something that decides between them was not the same on both"
            )
        return [value for _, value in found]

    def sum(self, x: Tensor, step: str) -> None:
        with self.waiting(step):
            dist.all_reduce(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)

    def fail(self, message: str) -> None:
        """Leave word for the others why this process ends."""
        self.heartbeats.fail(message)

    def end(self) -> None:
        self.heartbeats.end()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def sharded() -> bool:
    """Whether what is trained here is shared out among the processes, and not on each of them."""
    return _joined is not None and _sharing.get() is _joined and _joined.fsdp


def waiting(step: str) -> contextlib.AbstractContextManager[None]:
    """Communicate in the block by torch.distributed."""
    assert _joined is not None
    return _joined.waiting(step)


def start(fsdp: bool = False) -> Processes | None:
    """Join the processes that this one was started with; None where it was started alone.

    Work is shared from here on, until :func:`end` or within :func:`alone`.

    Args:
        fsdp: share out what is trained among the processes, instead of a copy on each.

    Raises:
        ValueError: they did not all come within a minute, or their port is in use.
    """
    global _joined
    about = os.environ
    if _joined is None and int(about.get("WORLD_SIZE", "1")) > 1 and "RANK" in about:
        place = about.get("MASTER_ADDR", "127.0.0.1"), int(about.get("MASTER_PORT", "29500"))
        served = about.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        local = int(about.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available() and local < torch.cuda.device_count():
            torch.cuda.set_device(local)  # what "cuda" means from here on
        _joined = Processes(int(about["RANK"]), int(about["WORLD_SIZE"]), *place, served, fsdp)
        _sharing.set(_joined)
    return _joined


def end(message: str | None = None) -> None:
    """Leave the group; with a message, as the process whose failure ends the run."""
    global _joined
    if _joined is not None:
        if message is not None:
            _joined.fail(message)
        _joined.end()
        _joined = None
        _sharing.set(None)


def _client(host: str, port: int, attempt: str) -> Any:
    """A connection of its own to the store, for another thread."""
    return dist.PrefixStore(f"heartbeats-{attempt}", dist.TCPStore(host, port, timeout=timedelta(seconds=30)))


def _store(rank: int, world: int, host: str, port: int, served: bool) -> dist.TCPStore:
    try:
        return dist.TCPStore(host, port, world, rank == 0 and not served, timedelta(seconds=COME_S))
    except RuntimeError as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text:
            raise ValueError(f"port {port} is in use: end what holds it, or set MASTER_PORT to another") from error
        if rank:
            raise ValueError(f"process {rank} found no process 0 at {host}:{port} within {COME_S} s") from error
        raise ValueError(f"not all of {world} processes came to {host}:{port} within {COME_S} s") from error
