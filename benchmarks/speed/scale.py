"""Time of one PPO iteration of the same global batch by one process and by several, each with the same threads.

The numbers of processes take turns; each time is the median of the iterations after the first, in fresh processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_envs.benchmarks.speed.settings import Scale


def run(settings: Scale) -> None:
    """Measure, print and write the CSV.

    Raises:
        RuntimeError: a process failed; the message is its last line.
    """
    from lm_envs.benchmarks.speed.kernels import RESULTS
    from lm_envs.benchmarks.speed.throughput import record

    out = settings.out or RESULTS / "scale-cpu.csv"
    record(out, lines(settings), lambda line: ", ".join(f"{name} {value}" for name, value in line.items()))


def lines(settings: Scale) -> Iterator[list[dict[str, Any]]]:
    """Yield the CSV's lines, one for each number of processes."""
    from lm_envs.benchmarks.speed.kernels import in_turns, machine, ratio

    job = {name: getattr(settings, name) for name in ("shape", "rows", "new_tokens", "threads", "iterations")}
    counts = {str(count): count for count in (1, *settings.processes)}
    found = in_turns(counts, settings.rounds, lambda name: _times(counts[name], job))
    batch = []
    for name, several in found.items():
        seconds = [one["seconds"] for one in several]
        line = {"processes": int(name), "seconds": round(statistics.median(seconds), 4)}
        line["speedup"] = round(ratio([one["seconds"] for one in found["1"]], seconds), 3)
        line |= {part: round(statistics.median(one[part] for one in several), 4) for part in ("sample_s", "update_s")}
        line["foreign_load"] = round(max(one["foreign"] for one in several), 3)
        batch.append(line | job | {"rounds": settings.rounds} | machine("cpu"))
    yield batch


def _times(count: int, job: dict[str, Any]) -> dict[str, float]:
    """One measurement by ``count`` fresh processes: the medians of process 0."""
    from lm_envs.benchmarks.run.many_processes import free_port

    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"OMP_NUM_THREADS": job["threads"]}
    command = [sys.executable, "-m", "lm_envs.benchmarks.speed.scale", json.dumps(job)]
    ranks = []
    for rank in range(count):
        own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env={**os.environ, **own}, **pipes))  # type: ignore[call-overload]
    said = [process.communicate() for process in ranks]
    for process, (_, error) in zip(ranks, said, strict=True):
        if process.returncode:
            raise RuntimeError((error.strip() or f"exit status {process.returncode}").splitlines()[-1])
    found: dict[str, float] = json.loads(said[0][0].splitlines()[-1])
    return found


def _be_child(job: dict[str, Any]) -> dict[str, float]:
    import torch

    from lm_envs.algos.ppo import PPO, PPOConfig
    from lm_envs.benchmarks.speed.throughput import Load
    from lm_envs.benchmarks.speed.throughput_work import Size, Work
    from lm_envs.env.vector import TextVectorEnv
    from lm_envs.processes import group, sharing

    torch.set_num_threads(job["threads"])
    group.start()
    work = Work(Size(job["shape"], rows=job["rows"], new_tokens=job["new_tokens"]))
    env, policy = TextVectorEnv(work.task, 1), work.policy()
    agent = PPO(policy, PPOConfig(episodes=job["rows"], learning_rate=1e-5))
    agent.iteration(env)
    found: list[dict[str, float]] = []
    load = Load()
    own = time.process_time()
    for _ in range(job["iterations"]):
        group.exchange(None, "a start together")
        start = time.perf_counter()
        metrics = agent.iteration(env)[1]
        found.append({"seconds": time.perf_counter() - start, **metrics})
    others = sharing.total(time.process_time() - own, "time on processors") - (time.process_time() - own)
    wall = sum(one["seconds"] for one in found) * (os.cpu_count() or 1)
    group.end()
    medians = {name: statistics.median(one[name] for one in found) for name in ("seconds", "sample_s", "update_s")}
    return medians | {"foreign": max(0.0, load.foreign() - others / wall)}


if __name__ == "__main__":
    print(json.dumps(_be_child(json.loads(sys.argv[1]))))
