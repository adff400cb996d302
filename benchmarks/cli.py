"""The command line, ``lm-envs``: its main commands, and where the others are found."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

import lm_envs
from lm_envs.benchmarks.commands.bench import Bench
from lm_envs.benchmarks.commands.build import Build
from lm_envs.benchmarks.commands.data import DataCommand
from lm_envs.benchmarks.commands.help_text import subcommands
from lm_envs.benchmarks.commands.learn import Dpo, RewardModel, Sft
from lm_envs.benchmarks.commands.options import Adapt, Own
from lm_envs.benchmarks.commands.overoptimize import Overoptimise
from lm_envs.benchmarks.errors import Interrupted, RunsFailed, UserError, explain
from lm_envs.benchmarks.run.names import ALL, base_task, expanded, is_control
from lm_envs.benchmarks.run.overrides import parse_settings
from lm_envs.benchmarks.run.suites import ENV_OPTIONS, Plan, Suite, TaskSettings, load_suite
from lm_envs.settings import near

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended


# What tasks of one's own are compared like where nothing else is said.
_LIKE: dict[tuple[str, ...], str] = {("corpus",): "demo-real", ("translation",): "translation"}


@dataclass(frozen=True)
class Compare:
    """Compare algorithms: tasks x algorithms x seeds, into a table, plots and a report.

    Say what to compare in a suite file, or name it here:

      lm-envs compare --suite demo --out runs/demo
      lm-envs compare --task reviews --algorithms sft best-of-16 ppo --seeds 0 1 2 --out runs/mine
      lm-envs compare --corpus reviews.jsonl --out runs/real

    OUT then holds results.csv, report.html, plots/ and a folder per run with its checkpoints. Ctrl-C stops after the
    iteration under way; the same command with --resume goes on, and skips what is finished. `lm-envs tasks` lists
    names.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the results."""
    suite: Annotated[str | None, tyro.conf.arg(metavar="FILE.toml|NAME")] = None
    """A suite file (TOML), or a built-in suite: demo, demo-real, translation, all, enumerable, smoke."""
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """A task, instead of a suite; may be given again. "-bandit" behind a name makes a whole response one action."""
    algorithms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Algorithms; with --suite instead of its own. Without either, a text task gets the demo's six and its settings;
    "all" are all there are, with the settings and seeds of the suite of that name.
    """
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = ()
    """Seeds; with --suite instead of its own."""
    iterations: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training iterations of every run."""
    episodes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training episodes of every run, instead of iterations: an equal number of reward calls for all."""
    test_prompts: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Test prompts to measure on."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of an algorithm, as in --set ppo.learning_rate=1e-4; may be given again."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An option of the environment: kl_coef, temperature, max_new_tokens, min_new_tokens; may be given again."""
    resume: bool = False
    """Continue what OUT holds."""
    jobs: int = 1
    """Runs at a time, each in a process of its own. With small models, as many as there are cores."""
    threads: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Torch threads per run. Results may differ in their last bits with it."""
    compile: bool = False
    """Let the policy sample by programs that torch.compile makes of it, for seconds to minutes each: for long runs
    (docs/throughput.md).
    """
    adapt: Annotated[Adapt, tyro.conf.arg(name="")] = Adapt()
    own: Annotated[Own, tyro.conf.arg(name="")] = Own()

    def to_suite(self) -> Suite:
        """The comparison that the options describe.

        Raises:
            UserError: they contradict each other, or name something unknown.
        """
        own = self.own.options()
        if self.suite is not None:
            if self.task:
                raise UserError("--suite and --task exclude each other: a suite names its tasks")
            suite = load_suite(self.suite)
            if self.algorithms:
                suite = _only(suite, expanded(self.algorithms))
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
                like = load_suite(_LIKE.get(tasks, "demo"))
                suite = replace(like, name="comparison", tasks=chosen)
        if self.seeds:
            suite = replace(suite, seeds=self.seeds)
        suite = replace(suite, plan=_planned(suite.plan, self.iterations, self.episodes, self.test_prompts))
        for name, values in _by_algorithm(self.set).items():
            running = {run.algorithm for run in suite.runs()}
            if name not in running:
                raise UserError(f"--set {name}.{next(iter(values))}: {name!r} is not run here: {near(name, running)}")
            suite = replace(suite, overrides={**suite.overrides, name: {**suite.overrides.get(name, {}), **values}})
        suite = replace(suite, compile=suite.compile or self.compile)
        return self.adapt.apply(_with_own(_with_env(suite, self.env), own))

    def run(self, console: Console) -> None:
        """Carry it out."""
        suite = self.to_suite()
        carry_out(suite, self.out, resume=self.resume, jobs=self.jobs, threads=self.threads, console=console)


@dataclass(frozen=True)
class Train:
    """Train one algorithm on one task with one seed; control environments too.

      lm-envs train --task reviews --algorithm ppo --out runs/ppo --set learning_rate=1e-3
      lm-envs train --task CartPole-v1 --algorithm a2c --iterations 200 --out runs/cartpole
      lm-envs train --policy DIR --reward-model DIR --prompts FILE --algorithm ppo --out runs/own

    OUT holds what a comparison's folder does, for one run: runs/ppo/reviews/ppo/seed-0/, and the tuned model in it.
    """

    algorithm: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """An algorithm (`lm-envs tasks` lists them)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the results."""
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A task (`lm-envs tasks` lists them) or the id of a Gymnasium environment with discrete actions; may be left out
    where the options below make one.
    """
    seed: int = 0
    """Decides prompts, samples and the order of minibatches."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of the algorithm, as in --set learning_rate=1e-3; may be given again."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An option of the environment: kl_coef, temperature, max_new_tokens, min_new_tokens; may be given again."""
    iterations: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training iterations; the algorithm's own number if not given."""
    episodes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training episodes, instead of iterations."""
    validate_every: int = Plan.validate_every
    """Iterations between points of the learning curve, 0 for none."""
    checkpoint_every: int = Plan.checkpoint_every
    """Iterations between checkpoints."""
    resume: bool = False
    """Continue what OUT holds."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Torch threads; as many as there are cores if not given. Results may differ in their last bits with it."""
    compile: bool = False
    """Let the policy sample by programs that torch.compile makes of it, for seconds to minutes each: for long runs
    (docs/throughput.md).
    """
    adapt: Annotated[Adapt, tyro.conf.arg(name="")] = Adapt()
    own: Annotated[Own, tyro.conf.arg(name="")] = Own()

    def run(self, console: Console) -> None:
        """Carry it out."""
        import torch

        threads = torch.get_num_threads() if self.threads is None else self.threads
        plan = replace(
            _planned(Plan(), self.iterations, self.episodes, None),
            validate_every=self.validate_every,
            checkpoint_every=self.checkpoint_every,
        )
        overrides = {self.algorithm: parse_settings(self.set)} if self.set else {}
        own = self.own.options()
        task = self.task or (next(iter(own)) if len(own) == 1 else None)
        if task is None:
            raise UserError("say what to train on: --task NAME, or --policy, --prompts and --reward-model or --reward")
        suite = Suite(
            "training", (TaskSettings(task),), (self.algorithm,), (self.seed,), plan, overrides, compile=self.compile
        )
        suite = self.adapt.apply(_with_own(_with_env(suite, self.env), own))
        carry_out(suite, self.out, resume=self.resume, threads=threads, console=console)
        model = self.out / suite.runs()[0].label / "model"
        if model.is_dir():
            print(model)


@dataclass(frozen=True)
class Tasks:
    """List the tasks and the algorithms, with what they are."""

    def run(self, console: Console) -> None:
        """Show them."""
        from lm_envs.benchmarks.commands.tasks import listing

        for table in listing():
            Console(emoji=False).print(table)


@dataclass(frozen=True)
class Report:
    """Make results.csv, the plots and report.html of a folder anew, from the runs that are finished."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of a comparison."""

    def run(self, console: Console) -> None:
        """Make them."""
        if not self.out.is_dir():
            raise UserError(f"no such folder: {self.out}")
        show(self.out)


def carry_out(suite: Suite, out: Path, **options: Any) -> None:
    """Run a comparison and show what it found; where some runs failed, what the others found."""
    from lm_envs.benchmarks.run.compare import compare

    try:
        compare(suite, out, **options)
    except RunsFailed as error:
        if error.finished:
            show(out)
        raise
    show(out)


def show(out: Path) -> None:
    """Write the report of a folder, and print its table."""
    from lm_envs.benchmarks.report.html import write_report
    from lm_envs.benchmarks.run.compare import write_results
    from lm_envs.benchmarks.run.results import rich_table, table

    rows = write_results(out)
    path = write_report(out, rows)
    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(emoji=False, width=160)
    console.print(rich_table(table(rows), console.width))
    console.print(f"{out / 'results.csv'}\n{path}", highlight=False, markup=False, soft_wrap=True)


def _only(suite: Suite, algorithms: tuple[str, ...]) -> Suite:
    """A suite with other algorithms; a task that has a list of its own keeps to those of it."""
    tasks = []
    for task in suite.tasks:
        mine = tuple(name for name in algorithms if task.algorithms is None or name in task.algorithms)
        if mine:
            tasks.append(replace(task, algorithms=mine))
    if not tasks:
        raise UserError(f"no task of the suite {suite.name!r} takes any of {', '.join(algorithms)}")
    return replace(suite, tasks=tuple(tasks), algorithms=algorithms)


def _planned(plan: Plan, iterations: int | None, episodes: int | None, test_prompts: int | None) -> Plan:
    if iterations is not None and episodes is not None:
        raise UserError("--iterations and --episodes exclude each other")
    for name, value in (("iterations", iterations), ("episodes", episodes)):
        if value is not None:
            if value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
            plan = replace(plan, iterations=None, episodes=None)
            plan = replace(plan, iterations=value) if name == "iterations" else replace(plan, episodes=value)
    if test_prompts is not None:
        if test_prompts < 2:
            raise UserError(f"--test-prompts must be at least 2, got {test_prompts}")
        plan = replace(plan, test_prompts=test_prompts)
    return plan


def _by_algorithm(items: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        algorithm, dot, rest = item.partition(".")
        if not dot or "=" in algorithm:
            raise UserError(f"--set takes algorithm.name=value here, as in --set ppo.learning_rate=1e-4, not {item!r}")
        found.setdefault(algorithm, {}).update(parse_settings([rest]))
    return found


def _with_env(suite: Suite, items: Sequence[str]) -> Suite:
    """A suite whose text tasks have these options of the environment."""
    options = parse_settings(items, "--env", "kl_coef=0.1")
    for name in options:
        if name not in ENV_OPTIONS:
            raise UserError(f"--env {name}: the environment has no such option: {near(name, ENV_OPTIONS)}")
    tasks = [task if is_control(task.name) else replace(task, env={**task.env, **options}) for task in suite.tasks]
    return replace(suite, tasks=tuple(tasks))


def _with_own(suite: Suite, own: dict[str, dict[str, Any]]) -> Suite:
    """A suite whose tasks of the user's own know where they come from."""
    named = {base_task(task.name)[0]: task for task in suite.tasks}
    needs = {
        "corpus": "--corpus FILE.jsonl",
        "translation": "--parallel FILE.jsonl",
        "custom": "--policy, --reward-model or --reward, and --prompts",
    }
    for name, option in needs.items():
        if name in named and name not in own and not named[name].options:
            raise UserError(f"task {name!r} needs {option}")
    for name, options in own.items():
        if name not in named:
            raise UserError(
                f"{needs[name]} makes the task {name!r}, which is not among those to run: {', '.join(named)}"
            )
        suite = suite.with_task_options(name, **options)
    return suite


_COMMANDS: dict[str, type[Any]] = {
    "compare": Compare,
    "train": Train,
    "sft": Sft,
    "reward-model": RewardModel,
    "dpo": Dpo,
    "data": DataCommand,
    "overoptimise": Overoptimise,
    "tasks": Tasks,
    "report": Report,
    "build": Build,
    "bench": Bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. Exits with 0, 1 (an error the user can put right), 2 (a bad command line) or 130 (Ctrl-C).

    ``--traceback`` anywhere shows where an error came from.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if words == ["--version"]:
        print(f"lm-envs {lm_envs.__version__}")
        return
    warnings.formatwarning, format_of_python = _format_warning, warnings.formatwarning
    try:
        _run(words, debug)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    finally:
        warnings.formatwarning = format_of_python


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What we tell the user, without the line of code that told it."""
    told = f"{category.__name__}: " if category is not UserWarning else ""
    return f"warning: {told}{message}\n"


def _run(words: list[str], debug: bool) -> None:
    console = Console(emoji=False, stderr=True)
    command = tyro.cli(
        subcommands(_COMMANDS, words),
        config=(tyro.conf.FlagCreatePairsOff,),
        prog="lm-envs",
        description=(
            "Text generation as a reinforcement-learning problem: compare algorithms that tune a language model "
            "against a reward model. Start with: lm-envs compare --suite demo --out runs/demo"
        ),
        args=words or ["--help"],
    )
    try:
        command.run(console)
    except (Interrupted, KeyboardInterrupt):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all that is left to do is to end
        again = shlex.join(["lm-envs", *words, *([] if "--resume" in words else ["--resume"])])
        console.print(f"Stopped. To go on: {again}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except (UserError, ValueError, FloatingPointError, ImportError, OSError) as error:
        message = explain(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        console.print(f"lm-envs: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
