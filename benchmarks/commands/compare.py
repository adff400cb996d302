"""The options of ``lm-envs compare``, and the suite that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro
from rich.console import Console

from lm_envs.benchmarks.commands.options import Running
from lm_envs.benchmarks.commands.report import carry_out
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import ALL, base_task, expanded, is_control
from lm_envs.benchmarks.run.suite_files import load_suite
from lm_envs.benchmarks.run.suites import Suite, TaskSettings, parse_settings
from lm_envs.settings import Count, Positive, Seed, Threads, near
from lm_envs.tasks import PRETRAINED, parts_of

# The suite whose settings a task gets by default, the demo's for others.
_LIKE = {"corpus": "demo-real", "translation": "translation"}
_LIKE |= dict.fromkeys(PRETRAINED, "demo-pretrained")


@dataclass(frozen=True, kw_only=True)
class Compare(Running):
    """Compare algorithms: tasks x algorithms x seeds, into a table, plots and a report.

    Say what to compare in a suite file, or name it here:

      lm-envs compare --suite demo --out runs/demo
      lm-envs compare --task reviews --algorithms sft best-of-16 ppo --seeds 0 1 2 --out runs/mine
      lm-envs compare --corpus reviews.jsonl --out runs/real

    OUT then holds results.csv, report.html, plots/ and a folder per run with its checkpoints. Ctrl-C stops after the
    iteration under way; the same command with --resume continues and skips finished runs. `lm-envs tasks` lists names.
    """

    suite: Annotated[str | None, tyro.conf.arg(metavar="FILE.toml|NAME")] = None
    """A suite file (TOML), or a built-in suite: demo, demo-real, demo-pretrained, pretrained-tasks, dense-rewards,
    instruct, translation, all, enumerable, smoke."""
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """A task, instead of a suite; may be repeated. In NAME-bandit a whole response is one action."""
    algorithms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Algorithms; they replace those of --suite. Without either, a text task gets the demo's six and its settings;
    "all" stands for every algorithm, with the settings and seeds of the suite of that name."""
    seeds: Annotated[tuple[Seed, ...], tyro.conf.arg(metavar="N ...")] = ()
    """Seeds; they replace those of --suite."""
    task_seeds: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Versions of a task's models (SFT, reward model) to run on, the task's own and N - 1 that are built with other
    random numbers, so that intervals count them too; 1 if neither given here nor in the suite."""
    match_kl: Annotated[tuple[Positive, ...], tyro.conf.arg(metavar="NATS ...")] = ()
    """KLs from SFT at which methods are also compared, read off their validation curves."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of an algorithm, as in --set ppo.learning_rate=1e-4; may be repeated."""
    jobs: Threads = 1
    """Runs at a time, each in a process of its own. With small models, take as many as there are cores."""
    threads: Annotated[Threads, tyro.conf.arg(metavar="N")] = 1
    """Torch threads per run. The last bits of results may depend on it."""
    ray: Annotated[str | None, tyro.conf.arg(metavar="auto|ADDRESS")] = None
    """Carry out the runs on a Ray cluster (extra "ray"), each a task with the suite's [resources]: the cluster of this
    machine, or one by its address. All nodes must see OUT (docs/scale.md)."""

    def to_suite(self) -> Suite:
        """Return the comparison that the options describe."""
        own = self.own.options()
        if self.suite is not None:
            if self.task:
                raise UserError("--suite and --task exclude each other: a suite names its tasks")
            suite = load_suite(self.suite)
            if self.algorithms:
                suite = replace(_only(suite, expanded(self.algorithms)), every=ALL in self.algorithms)
        else:
            tasks = self.task or tuple(own)
            if not tasks:
                raise UserError(
                    "say what to compare: --suite FILE.toml, or --task NAME, perhaps with --algorithms "
                    "(`lm-envs tasks` lists them)"
                )
            chosen = tuple(TaskSettings(name) for name in tasks)
            if ALL in self.algorithms:
                suite = replace(load_suite(ALL), name="comparison", tasks=chosen, algorithms=expanded(self.algorithms))
            elif self.algorithms:
                suite = Suite("comparison", chosen, expanded(self.algorithms))
            elif any(is_control(name) or base_task(name)[1] == "bandit" for name in tasks):
                raise UserError("say which --algorithms to compare on that task, as in --algorithms reinforce ppo")
            else:
                like = load_suite(_LIKE.get(parts_of(tasks[0])[0] if len(tasks) == 1 else "", "demo"))
                suite = replace(like, name="comparison", tasks=chosen)
        if self.seeds:
            suite = replace(suite, seeds=self.seeds)
        if self.task_seeds:
            suite = replace(suite, task_seeds=self.task_seeds)
        if self.match_kl:
            suite = replace(suite, match_kl=self.match_kl)
        for name, values in _by_algorithm(self.set).items():
            running = {run.algorithm for run in suite.runs()}
            if name not in running:
                raise UserError(f"--set {name}.{next(iter(values))}: {name!r} is not run here: {near(name, running)}")
            suite = replace(suite, overrides={**suite.overrides, name: {**suite.overrides.get(name, {}), **values}})
        return self.applied(suite, own)

    def run(self, console: Console) -> None:
        from lm_envs.processes import group

        if self.jobs > 1 and group.count() > 1:
            raise UserError(
                "--jobs carries out runs side by side, and --processes each run by many: take one of the two"
            )
        suite = self.to_suite()
        carry_out(suite, self.out, **self.how(), **self.where(), console=console)

    def where(self) -> dict[str, Any]:
        """Return by what the runs are carried out, as :func:`lm_envs.benchmarks.run.compare.compare` takes it."""
        if self.ray is not None and self.jobs > 1:
            raise UserError("--ray and --jobs exclude each other")
        if self.ray is not None and self.processes > 1:
            raise UserError("--ray and --processes exclude each other: set processes under [resources] of a suite")
        return {"jobs": self.jobs, "threads": self.threads, "ray": self.ray}


def _only(suite: Suite, algorithms: tuple[str, ...]) -> Suite:
    """A suite with other algorithms; a task that has a list of its own gets those that are in it."""
    tasks = []
    for task in suite.tasks:
        mine = tuple(name for name in algorithms if task.algorithms is None or name in task.algorithms)
        tasks += [replace(task, algorithms=mine)] if mine else []
    if not tasks:
        raise UserError(f"no task of the suite {suite.name!r} takes any of {', '.join(algorithms)}")
    return replace(suite, tasks=tuple(tasks), algorithms=algorithms)


def _by_algorithm(items: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        setting, equals, value = item.partition("=")
        algorithm, dot, name = setting.rpartition(".")  # that of a file of one's own has dots too
        if not dot:
            raise UserError(f"--set takes algorithm.name=value here, as in --set ppo.learning_rate=1e-4, not {item!r}")
        found.setdefault(algorithm, {}).update(parse_settings([name + equals + value]))
    return found
