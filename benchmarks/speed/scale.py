"""One PPO iteration of the same global batch by one process and by several, with copies of the weights and with shares:
time, and on a larger model the memory of a process.

The ways take turns; each time is the median of the iterations after the first, in fresh processes.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from lm_envs.benchmarks.speed.settings import Scale

# Of the memory: 30 million parameters and a small batch, so that weights, gradients and Adam's state are most of it.
LARGE = {"layers": 9, "width": 512, "heads": 8, "vocabulary": 4096, "prompt_length": 8, "new_tokens": 16}
LARGE_ROWS = 8


def run(settings: Scale) -> None:
    """Measure, print and write the CSV.

    Raises:
        RuntimeError: a process failed; the message is its last line.
    """
    from lm_envs.benchmarks.speed.kernels import RESULTS
    from lm_envs.benchmarks.speed.throughput import record

    out = settings.out or RESULTS / ("scale-parts-cpu.csv" if settings.parts else "scale-cpu.csv")
    record(
        out,
        parts(settings) if settings.parts else lines(settings),
        lambda line: ", ".join(f"{name} {value}" for name, value in line.items()),
    )


def lines(settings: Scale) -> Iterator[list[dict[str, Any]]]:
    """Yield the CSV's lines: one for each way, with its times and its memory."""
    from lm_envs.benchmarks.speed.kernels import in_turns, machine, ratio

    job = {name: getattr(settings, name) for name in ("shape", "rows", "new_tokens", "threads", "iterations")}
    ways = {"1": (1, False)}
    for count in settings.processes:
        ways |= {f"{count} ddp": (count, False), f"{count} fsdp": (count, True)}
    found = in_turns(ways, settings.rounds, lambda name: _measured(*ways[name], job)[0])
    batch = []
    for name, several in found.items():
        count, fsdp = ways[name]
        seconds = [one["seconds"] for one in several]
        line = {
            "processes": count,
            "weights": "fsdp" if fsdp else "ddp",
            "seconds": round(statistics.median(seconds), 4),
        }
        line["speedup"] = round(ratio([one["seconds"] for one in found["1"]], seconds), 3)
        line |= {part: round(statistics.median(one[part] for one in several), 4) for part in ("sample_s", "update_s")}
        line["foreign_load"] = round(max(one["foreign"] for one in several), 3)
        line |= _memory(count, fsdp, settings.threads)
        batch.append(line | job | {"rounds": settings.rounds} | machine("cpu"))
    yield batch


def parts(settings: Scale) -> Iterator[list[dict[str, Any]]]:
    """Yield the CSV's lines of what does not shrink with the number of processes."""
    from lm_envs.benchmarks.speed.kernels import machine

    job = {name: getattr(settings, name) for name in ("shape", "rows", "new_tokens", "threads", "iterations")}
    counts = (1, *settings.processes)
    yield [{"processes": n} | _measured(n, False, job | {"parts": True})[0] | job | machine("cpu") for n in counts]


def _memory(count: int, fsdp: bool, threads: int) -> dict[str, float]:
    """Megabytes of the process that takes the most: at the peak, and of them what came after the imports."""
    several = _measured(count, fsdp, {"memory": True, "threads": threads})
    found = {f"{what}_MB": round(max(one[what] for one in several) / 1e6, 1) for what in ("resident", "made")}
    return found | {"memory_parameters": int(several[0]["parameters"])}


def _measured(count: int, fsdp: bool, job: dict[str, Any]) -> list[dict[str, float]]:
    """One measurement by ``count`` fresh processes, each one's."""
    from lm_envs.benchmarks.run.many_processes import places

    shared = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, "-m", "lm_envs.benchmarks.speed.scale", json.dumps(job | {"fsdp": fsdp})]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env=shared | place, **pipes) for place in places(count)]  # type: ignore[call-overload]
    said = [process.communicate() for process in ranks]
    for process, (_, error) in zip(ranks, said, strict=True):
        if process.returncode:
            raise RuntimeError((error.strip() or f"exit status {process.returncode}").splitlines()[-1])
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


def _be_child(job: dict[str, Any]) -> dict[str, float]:
    import torch

    from lm_envs.processes import group

    torch.set_num_threads(job["threads"])
    group.start(job["fsdp"])
    try:
        return _peak() if "memory" in job else _parts(job) if "parts" in job else _times(job)
    finally:
        group.end()


def _times(job: dict[str, Any]) -> dict[str, float]:
    from lm_envs.algos.ppo import PPO, PPOConfig
    from lm_envs.benchmarks.speed.throughput import Load
    from lm_envs.benchmarks.speed.throughput_work import Size, Work
    from lm_envs.env.vector import TextVectorEnv
    from lm_envs.processes import group, sharing

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
    medians = {name: statistics.median(one[name] for one in found) for name in ("seconds", "sample_s", "update_s")}
    return medians | {"foreign": max(0.0, load.foreign() - others / wall)}


def _parts(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of processor time, in this process, of what every process does whole: ``prepare``, a step of Adam, and a
    sum of the gradients."""
    import torch

    from lm_envs.algos.ppo import PPO, PPOConfig
    from lm_envs.benchmarks.speed.throughput_work import Size, Work
    from lm_envs.env.vector import TextVectorEnv
    from lm_envs.processes import group

    work = Work(Size(job["shape"], rows=job["rows"], new_tokens=job["new_tokens"]))
    env, policy = TextVectorEnv(work.task, 1), work.policy()
    agent = PPO(policy, PPOConfig(episodes=job["rows"], learning_rate=1e-5))
    took: dict[str, list[float]] = {"prepare_s": [], "adam_s": [], "sum_s": []}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def do(*given: Any) -> Any:
            start = time.process_time()
            found = call(*given)
            took[name].append(time.process_time() - start)
            return found

        return do

    agent.prepare = timed("prepare_s", agent.prepare)  # type: ignore[method-assign]
    for _ in range(1 + job["iterations"]):
        agent.iteration(env)
    gradients = torch.zeros(sum(p.numel() for p in policy.parameters() if p.requires_grad))
    for _ in range(5):
        timed("adam_s", agent.optimizer.step)()
        timed("sum_s", group.add)(gradients, "a sum")
    medians = {name: float(f"{statistics.median(several[1:]):.4g}") for name, several in took.items()}
    config, size = agent.config, {"parameters": gradients.numel(), "prompt_tokens": work.size.prompt_length}
    return medians | size | {"passes": config.epochs, "steps": config.epochs * config.minibatches}


def _peak() -> dict[str, float]:
    """The most bytes during two iterations of PPO, its reference included; the first makes Adam's state."""
    from transformers import GPT2LMHeadModel

    from lm_envs.algos.policies.language_model import LMPolicy
    from lm_envs.algos.ppo import PPO, PPOConfig
    from lm_envs.benchmarks.speed.shared_work import EOS, gpt2_config, word_tokenizer
    from lm_envs.benchmarks.speed.throughput_work import nothing
    from lm_envs.env.vector import TextVectorEnv
    from lm_envs.processes import group
    from lm_envs.tasks.base import TextTask

    if group.sharded():
        import torch.distributed.fsdp  # noqa: F401 - a part of the imports

    before, reward = _resident(), cast(Any, nothing)
    reference = GPT2LMHeadModel(gpt2_config(LARGE, pad_token_id=EOS)).eval().requires_grad_(False)
    task = TextTask(
        name="memory",
        tokenizer=word_tokenizer(LARGE["vocabulary"]),
        reference=reference,
        prompts={"train": [list(range(1, 1 + LARGE["prompt_length"]))]},
        reward=reward,
        judge=None,
        eos_token_id=EOS,
        max_new_tokens=LARGE["new_tokens"],
        min_new_tokens=LARGE["new_tokens"],
        kl_coef=0.05,
    )
    env = TextVectorEnv(task, 1)
    policy = LMPolicy.for_mdp(env.mdp, copy.deepcopy(reference).requires_grad_(True))
    agent = PPO(policy, PPOConfig(episodes=LARGE_ROWS, learning_rate=1e-5))
    for _ in range(2):
        agent.iteration(env)
    size = sum(p.numel() for p in policy.model.parameters())
    return {"resident": _resident(), "made": _resident() - before, "parameters": size}


def _resident() -> int:
    """The most bytes that were resident so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(_be_child(json.loads(sys.argv[1]))))
