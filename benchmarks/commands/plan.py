"""``lm-envs plan``: what ``train`` or ``compare`` would take, without training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from lm_envs.benchmarks.commands.compare import Compare
from lm_envs.benchmarks.commands.train import Train
from lm_envs.benchmarks.run.suites import Suite

if TYPE_CHECKING:
    from lm_envs.benchmarks.run.planning import RunPlan

Out = Annotated[Path, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class PlanTrain(Train):
    """Say what `lm-envs train` with these options would take."""

    out: Out = Path(".")
    """Where the results would be, for the free space there; nothing is written."""
    json: bool = False
    """Print JSON."""
    timing: bool = True
    """Time three iterations; --no-timing leaves it out, and reads no weights for a task of your own."""

    def run(self, console: Console) -> None:
        """Make and print the plan."""
        _plan(self, self.to_suite(), 1, self.threads)


@dataclass(frozen=True, kw_only=True)
class PlanCompare(Compare):
    """Say what `lm-envs compare` with these options would take."""

    out: Out = Path(".")
    """Where the results would be, for the free space there; nothing is written."""
    json: bool = False
    """Print JSON."""
    timing: bool = True
    """Time three iterations of each method; --no-timing leaves it out, and reads no weights for a task of your own."""

    def run(self, console: Console) -> None:
        """Make and print the plan."""
        self.where()  # refuses what excludes each other
        _plan(self, self.to_suite(), self.jobs, self.threads)


@dataclass(frozen=True)
class Plan:
    """Say what a run or a comparison would take, and train nothing: memory by its parts, tokens, time and disk, and
    which setting to change if it does not fit.

      lm-envs plan train --task reviews --algorithm ppo
      lm-envs plan compare --suite demo --jobs 2

    Put `plan` before the command: the options are the same. Nothing is written.
    """

    what: Annotated[
        Annotated[PlanTrain, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[PlanCompare, tyro.conf.subcommand("compare", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    @property
    def timed(self) -> PlanTrain | PlanCompare | None:
        """What is planned, if that needs its processes, and not just their number."""
        return self.what if self.what.timing else None

    def run(self, console: Console) -> None:
        """Make and print the plan."""
        self.what.run(console)


def _plan(options: PlanTrain | PlanCompare, suite: Suite, jobs: int, threads: int | None) -> None:
    from transformers.utils.logging import disable_progress_bar

    from lm_envs.algos.registry import Unsuited
    from lm_envs.benchmarks.run.compare import check_runs
    from lm_envs.benchmarks.run.planning import does_not_fit, free_memory, plan_of
    from lm_envs.benchmarks.run.sketch import sketch
    from lm_envs.processes import group

    disable_progress_bar()
    processes = max(options.processes, group.count())  # torchrun's, or those that there would be
    runs = suite.runs()
    check_runs(runs)
    plans: list[RunPlan] = []
    for spec in {(run.task, run.algorithm): run for run in reversed(runs)}.values():
        try:
            plans.insert(0, plan_of(sketch(spec), suite.keep, processes, options.fsdp))
        except Unsuited:
            if not suite.every:
                raise
    at_once = min(jobs, len(runs)) * processes
    free = free_memory(plans[0].sizes.device)
    problem = does_not_fit(plans, at_once, free)
    if options.timing and problem is None:
        from lm_envs.benchmarks.run.timing import timed_together

        plans = [timed_together(plan, threads or group.threads()) for plan in plans]
    about: dict[str, Any] = {
        "runs": len(runs),
        "at_once": at_once,
        "free": free,
        "fits": problem is None,
        "advice": problem,
    }
    space = next(path for path in (options.out.absolute(), *options.out.absolute().parents) if path.exists())
    about |= _disk(plans, suite, at_once) | {"disk_free": shutil.disk_usage(space).free}
    about["seconds"] = _seconds(plans, suite, min(jobs, len(runs)))
    if options.json:
        print(json.dumps(about | {"plans": [_as_json(plan) for plan in plans]}, indent=2))
    else:
        _show(plans, about)


def _disk(plans: Sequence[RunPlan], suite: Suite, at_once: int) -> dict[str, Any]:
    from lm_envs.benchmarks.run.planning import disk

    return dict(zip(("disk_most", "disk_finished"), disk(plans, suite.runs(), at_once), strict=True))


def _seconds(plans: Sequence[RunPlan], suite: Suite, jobs: int) -> float | None:
    """The time of all runs, shared by the jobs; None where it is not known."""
    of_one = {(plan.spec.task, plan.spec.algorithm): plan.seconds and plan.seconds[1] for plan in plans}
    times = [of_one[run.task, run.algorithm] for run in suite.runs() if (run.task, run.algorithm) in of_one]
    return None if any(time is None for time in times) else sum(filter(None, times)) / jobs


def _as_json(plan: RunPlan) -> dict[str, Any]:
    spec, sizes = plan.spec, plan.sizes
    return {
        "task": spec.task,
        "algorithm": spec.algorithm,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "memory": plan.memory.total,
        "peak": plan.memory.peak,
        "parts": plan.memory.parts,
        "phases": plan.memory.phases,
        "iterations": plan.iterations,
        "tokens_sampled": plan.tokens(plan.texts),
        "texts_scored": plan.texts,
        "tokens_scored": plan.scored,
        "tokens_measured": plan.tokens(plan.measured),
        "checkpoint": plan.checkpoint,
        "model": plan.model,
        "seconds_per_iteration": plan.seconds and plan.seconds[0],
        "seconds": plan.seconds and plan.seconds[1],
        "rows": {"sampled": sizes.rows, "measured": sizes.measured, "with_gradients": sizes.batch},
    }


def _show(plans: Sequence[RunPlan], about: dict[str, Any]) -> None:
    from lm_envs.benchmarks.run.memory import size
    from lm_envs.benchmarks.run.planning import needed

    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(emoji=False, width=160)
    most, total = needed(plans, about["at_once"])
    parts = Table(f"memory of a process of {most.name}", "", box=None, pad_edge=False)
    parts.columns[0].no_wrap = True
    for name, count in most.memory.parts.items():
        if count:
            parts.add_row(f"  {name}", size(count))
    parts.add_row(f"at its peak, in {most.memory.peak}", size(most.memory.total), style="bold")
    console.print(parts)
    console.print()
    console.print(_runs(plans))
    console.print()
    runs, free = f"{about['runs']} run{'s' * (about['runs'] > 1)}, {about['at_once']} at once", size(about["free"])
    lines = [
        f"{runs}: {size(total)} of memory, {free} free",
        f"disk: up to {size(about['disk_most'])} while training, {size(about['disk_finished'])} when finished, "
        f"{size(about['disk_free'])} free",
    ]
    if about["seconds"] is not None:
        lines.append(f"time: about {_time(about['seconds'])}")
    if about["advice"]:
        lines.append(about["advice"])
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _runs(plans: Sequence[RunPlan]) -> Table:
    """A table of what each kind of run takes."""
    from lm_envs.benchmarks.run.memory import size

    titles = ["memory", "parameters", "trained", "iterations", "tokens sampled", "scored", "to measure", "checkpoint"]
    titles += ["model", *(["an iteration", "the run"] if any(plan.seconds for plan in plans) else [])]
    found = Table("run", box=None, pad_edge=False)
    found.columns[0].no_wrap = True
    for title in titles:
        found.add_column(title, justify="right")
    for plan in plans:
        counts = (plan.iterations, plan.tokens(plan.texts), plan.scored, plan.tokens(plan.measured))
        found.add_row(
            plan.name,
            size(plan.memory.total),
            f"{plan.parameters:,}",
            f"{plan.trained:,}",
            *("?" if count is None else f"{count:,}" for count in counts),
            *(size(count) if count else "" for count in (plan.checkpoint, plan.model)),
            *(_time(seconds) for seconds in plan.seconds or ()),
        )
    return found


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
