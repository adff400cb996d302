"""The time of a run, estimated from three timed iterations of its real models that change no weight."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lm_envs.benchmarks.run.many_processes import check_shares
from lm_envs.benchmarks.run.planning import RunPlan
from lm_envs.benchmarks.run.problems import open_problem
from lm_envs.processes import group

STEPS = 3  # iterations that are timed, of which the first, which allocates, does not count
LONG_S = 60.0  # an iteration that takes longer is the only one
_ADAM = 28 / 8  # bytes that Adam reads and writes for a number, to those of a product in place


class _Still(torch.optim.SGD):
    """An optimizer without state that leaves the weights as they are."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def timed(problem: Any, plan: RunPlan) -> RunPlan:
    """Return the plan with the seconds of an iteration and of the whole run: of training, validation and the test."""
    per_iteration = 0.0 if problem.agent is None else _iteration(problem)
    start = time.perf_counter()
    problem.validate()
    measuring = (time.perf_counter() - start) / max(1, plan.validated)
    if plan.iterations is None:
        return replace(plan, seconds=(per_iteration, None))
    return replace(plan, seconds=(per_iteration, plan.iterations * per_iteration + plan.measured * measuring))


def timed_together(plan: RunPlan, threads: int) -> RunPlan:
    """Return the plan as :func:`timed` does, by all processes of this run."""
    job = partial(_open_and_time, plan, threads)
    group.call(job)
    return job()


def _open_and_time(plan: RunPlan, threads: int, *_: Any) -> RunPlan:
    torch.set_num_threads(threads)
    with torch.random.fork_rng(devices=[]), group.together():
        problem = open_problem(plan.spec)
        if problem.agent is not None:
            check_shares(problem.agent)
        return timed(problem, plan)


def _iteration(problem: Any) -> float:
    """Seconds of an iteration: the median of some with a single pass, with the other passes and Adam's steps added."""
    agent = problem.agent
    config = agent.config
    agent.config = replace(config, epochs=1)
    trained = [p for part in agent.optimizer.param_groups for p in part["params"]]
    agent.optimizer = _Still(trained, lr=config.learning_rate)
    found: list[float] = []
    for _ in range(STEPS):
        metrics = agent.iteration(problem.env)[1]
        seconds = metrics["sample_s"] + config.epochs * metrics.get("update_s", 0.0)
        found.append(max(group.exchange(seconds, "the time of an iteration")))
        if found[-1] > LONG_S:
            break
    # Shares have no gradients between updates, and no numbers.
    gradients = [p.grad for p in trained if p.grad is not None] or [torch.ones_like(p) for p in trained]
    start = time.perf_counter()
    torch._foreach_mul_(gradients, 1.0)
    product = time.perf_counter() - start
    agent.optimizer.zero_grad()
    counted = found[1:] or found
    return statistics.median(counted) + _ADAM * product * config.epochs * config.minibatches
