"""How many threads work: blocks of rows shared out between them, and few for little work."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


def waking_is_slow() -> bool:
    """Whether idle threads sleep (``OMP_WAIT_POLICY=passive``): waking one takes as long as some million
    multiplications. Else they wait busily and start at once, as long as no other program uses their processors."""
    return os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Within, torch uses ``count`` threads for an operation of the calling thread, or fewer if it did before."""
    before = torch.get_num_threads()
    if count >= before:
        yield
        return
    torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share(items: Iterable[Item], count: int, work: Callable[[Iterator[Item]], None]) -> None:
    """Call ``work`` in torch's number of threads (at most ``count``), this one among them; each takes items in turn.

    Inside, torch's own operations run on one thread. Threads are created for each call: that costs 0.1 ms and leaves
    nothing behind that a fork would break. The first exception that ``work`` raised is raised here.
    """
    threads_before = torch.get_num_threads()
    source, lock = iter(items), threading.Lock()
    errors: list[BaseException] = []

    def turns() -> Iterator[Item]:
        while not errors:
            with lock:
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    @torch.no_grad()  # a new thread starts with gradients on
    def run() -> None:
        torch.set_num_threads(1)
        try:
            work(turns())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(error)

    helpers = [threading.Thread(target=run, daemon=True) for _ in range(min(threads_before, count) - 1)]
    if not helpers:
        with torch.no_grad():
            work(turns())
        return
    for thread in helpers:
        thread.start()
    try:
        run()
        for thread in helpers:
            thread.join()
    finally:
        torch.set_num_threads(threads_before)
    if errors:
        raise errors[0]
