"""Several processes' worth of one run as threads, each with a group of its own: fast, and without a network."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from lm_envs.processes import group

T = TypeVar("T")


class Member:
    """The part of one thread in a group of `world`."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.world, self._barrier, self._table = rank, world, barrier, table
        self.steps: list[str] = []
        self.summed = 0  # numbers

    def exchange(self, value: Any, step: str, patient: bool) -> list[Any]:
        self.steps.append(step)
        self._table[self.rank] = (step, copy.deepcopy(value))
        self._barrier.wait(60)
        found = list(self._table)
        self._barrier.wait(60)
        assert {at for at, _ in found} == {step}
        return [copy.deepcopy(value) for _, value in found]

    def sum(self, x: Any, step: str) -> None:
        self.summed += x.numel()
        parts = self.exchange(x, step, False)
        x.copy_(sum(parts[1:], parts[0]))


def on_many(world: int, do: Callable[[], T]) -> list[T]:
    """What `do` returns on each of `world` processes that share its work."""
    barrier, table, found, errors = threading.Barrier(world), [None] * world, [None] * world, []

    def one(rank: int) -> None:
        try:
            with group.sharing(Member(rank, world, barrier, table)):
                found[rank] = do()
        except BaseException as error:  # noqa: BLE001, for the caller
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (own or errors)[0]
    return found  # type: ignore[return-value]
