"""Results of async rewards, such as a remote judge, for synchronous callers."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lm_envs.processes.heartbeats import excused

_LOOP = "async rewards"
_waiting = 0  # running calls of `finished`


def waiting() -> bool:
    """Whether a call waits for an async reward."""
    return _waiting > 0


def finished(awaitable: Awaitable[Any]) -> Any:
    """Wait for an async reward's result on this process's one event loop, so that a reward can keep a client.

    An interrupt cancels it.
    """
    global _waiting

    async def wait() -> tuple[Any, BaseException | None]:
        try:
            return await awaitable, None
        except (SystemExit, KeyboardInterrupt) as error:  # would end the loop
            return None, error

    here = threading.current_thread().name  # a reward that calls another must not wait for its own loop
    loop = _event_loop(os.getpid(), here if here.startswith(_LOOP) else "")
    future = asyncio.run_coroutine_threadsafe(wait(), loop)
    _waiting += 1
    try:
        with excused():
            result, error = future.result()
    finally:
        _waiting -= 1
        future.cancel()
    if error is not None:
        raise error
    return result


@functools.cache
def _event_loop(process: int, within: str) -> asyncio.AbstractEventLoop:
    """Start a loop in a thread, as the caller's own may be running (in notebooks)."""
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_Daemons())
    threading.Thread(target=loop.run_forever, name=f"{_LOOP} {within}", daemon=True).start()
    return loop


class _Daemons(ThreadPoolExecutor):
    """A daemon thread per call, so that looking up an address cannot keep the program from ending."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start the call."""
        future: Future[Any] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    result = fn(*args, **kwargs)
                except BaseException as error:  # noqa: BLE001, for the caller
                    future.set_exception(error)
                else:
                    future.set_result(result)

        threading.Thread(target=call, name=_LOOP.replace(" ", "-"), daemon=True).start()
        return future
