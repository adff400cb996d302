"""Jobs for workers, which load no library."""

from __future__ import annotations

import os
import signal
import time

from lm_envs.benchmarks.run.workers import Event, Notify, StopRequest


def act(job: str, tell: Notify, stop: StopRequest) -> Event:
    """What a worker does here, and where it is."""
    tell({"event": "placed", "session": os.getsid(0), "process": os.getpid()})
    if job == "kill":
        signal.raise_signal(signal.SIGKILL)
    if job == "leave":
        os._exit(3)
    while job == "wait" and not stop():
        time.sleep(0.01)
    return {"event": "done", "run": job, "result": os.getpid()}


def killed(job: str, how: str) -> Event:
    return {"event": "failed", "run": job, "message": how}
