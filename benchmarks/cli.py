"""The command line ``lm-envs``: its commands, and the exit with an error."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import shlex
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console

import lm_envs
from lm_envs.benchmarks.commands.bench import Bench
from lm_envs.benchmarks.commands.build import Build
from lm_envs.benchmarks.commands.check import Check
from lm_envs.benchmarks.commands.compare import Compare
from lm_envs.benchmarks.commands.data import DataCommand
from lm_envs.benchmarks.commands.generate import Chat, Generate
from lm_envs.benchmarks.commands.learn import Dpo, RewardModel, Sft
from lm_envs.benchmarks.commands.options import ManyProcesses
from lm_envs.benchmarks.commands.overoptimize import Overoptimise
from lm_envs.benchmarks.commands.people import People
from lm_envs.benchmarks.commands.plan import Plan
from lm_envs.benchmarks.commands.probe import Probe
from lm_envs.benchmarks.commands.report import Report
from lm_envs.benchmarks.commands.tasks import Tasks
from lm_envs.benchmarks.commands.train import Train
from lm_envs.benchmarks.commands.tune import Tune
from lm_envs.benchmarks.errors import Interrupted, explain
from lm_envs.benchmarks.run.many_processes import STARTED, carry_out, launch
from lm_envs.benchmarks.run.suites import BUDGETS, EnvOptions
from lm_envs.printable import printable
from lm_envs.settings import check, field_texts, near

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended
BAD_COMMAND = 2
LONGEST = 1000  # characters of a message

_COMMANDS: dict[str, type[Any]] = {
    "compare": Compare,
    "train": Train,
    "plan": Plan,
    "sft": Sft,
    "reward-model": RewardModel,
    "dpo": Dpo,
    "generate": Generate,
    "chat": Chat,
    "data": DataCommand,
    "tune": Tune,
    "overoptimise": Overoptimise,
    "people": People,
    "check": Check,
    "probe": Probe,
    "tasks": Tasks,
    "report": Report,
    "build": Build,
    "bench": Bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; exit with 0, 1 (an error the user can put right), 2 (a bad command line) or 130 (Ctrl-C).

    ``--traceback`` anywhere shows where an error came from.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if words == ["--version"]:
        print(f"lm-envs {lm_envs.__version__}")
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for terminals that take ASCII only
    warnings.formatwarning, format_of_python = _format_warning, warnings.formatwarning
    try:
        _run(words, debug)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    finally:
        warnings.formatwarning = format_of_python


def _format_warning(message: Warning | str, category: type[Warning], *place: Any, **code: Any) -> str:
    """Format a warning for users, without the line of code that raised it."""
    return f"warning: {'' if category is UserWarning else f'{category.__name__}: '}{message}\n"


def _run(words: list[str], debug: bool) -> None:
    console = Console(emoji=False, stderr=True)
    command, unknown = tyro.cli(
        subcommands(_COMMANDS, words),
        config=(tyro.conf.FlagCreatePairsOff,),
        prog="lm-envs",
        description=(
            "Text generation as a reinforcement-learning problem: compare algorithms that tune a language model "
            "against a reward model. Start with: lm-envs compare --suite demo --out runs/demo"
        ),
        args=words or ["--help"],
        return_unknown_args=True,
    )
    if unknown:
        _refuse(console, _unknown(command, unknown[0]))
        raise SystemExit(BAD_COMMAND)
    many = command.timed if isinstance(command, Plan) else command
    many = many if isinstance(many, ManyProcesses) else ManyProcesses()
    if many.processes > 1 and not STARTED:
        raise SystemExit(launch(words, many.processes))
    try:
        check(command)
        carry_out(lambda: command.run(console), many.fsdp)
    except (Interrupted, KeyboardInterrupt):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
        again = shlex.join(["lm-envs", *words, *([] if "--resume" in words else ["--resume"])])
        further = f" To go on: {again}" if "--resume" in _options(command) else ""
        console.print(f"Stopped.{further}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except (Exception, SystemExit) as error:
        message = explain(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        _refuse(console, message)
        raise SystemExit(1) from None


def _refuse(console: Console, message: str) -> None:
    line = printable(message).replace("\n", "\\n")
    line = line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    console.print(f"lm-envs: {line}", style="red", highlight=False, markup=False, soft_wrap=True)


def _unknown(command: Any, word: str) -> str:
    """The message about a word of the command line that belongs to no option."""
    name = next(name for name, kind in _COMMANDS.items() if isinstance(command, kind))
    if not word.startswith("-"):
        return f"{name}: nothing takes {word!r}; `lm-envs {name} --help` lists the options"
    option, _, value = word.partition("=")
    setting = option.lstrip("-").replace("-", "_")
    algorithm = getattr(command, "algorithm", None)
    if hasattr(command, "set") and name != "build" and setting in _settings():
        where = "" if algorithm else "ALGORITHM."
        return f"{name} has no option {option}: it is a setting, --set {where}{setting}={value or 'VALUE'}"
    if hasattr(command, "env") and setting in (field.name for field in fields(EnvOptions)):
        return f"{name} has no option {option}: it is one of the environment, --env {setting}={value or 'VALUE'}"
    tables = {"evaluation": ("validation_prompts",), "budget": BUDGETS[2:]}
    table = next((table for table, names in tables.items() if setting in names), None)
    if name in ("compare", "train") and table is not None:
        return f"{name} has no option {option}: a suite has it, as {setting} in [{table}] (compare --suite FILE)"
    return f"{name} has no option {option}: {near(option, _options(command))}"


def _options(command: Any) -> Iterator[str]:
    for field in fields(command):
        value = getattr(command, field.name)
        if is_dataclass(value):
            yield from _options(value)
        else:
            yield f"--{field.name.replace('_', '-')}"


def _settings() -> set[str]:
    from lm_envs.algos.registry import ALGORITHMS, WRAPPERS, load

    return {field.name for name in ALGORITHMS if name not in WRAPPERS for field in fields(load(name).Config)}


def subcommands(commands: Mapping[str, type[Any]], words: Sequence[str]) -> Any:
    """Make a union of commands for :func:`tyro.cli`: with one sentence each in the list, with the whole text alone.

    Args:
        commands: dataclasses by name.
        words: the command line; the first word chooses the command.
    """
    made = []
    for name, command in commands.items():
        text = inspect.getdoc(command) or ""
        if words[:1] == [name]:
            _join_lines(command)
            text = text.replace("\n\n  ", "\n  ")  # tyro would set two empty lines before the examples
        else:
            text = " ".join(text.partition("\n\n")[0].split())
        made.append(Annotated[command, tyro.conf.subcommand(name, description=text)])
    return typing.Union[tuple(made)]  # noqa: UP007


def _join_lines(command: type[Any]) -> None:
    """Make each field's docstring one paragraph, also in the dataclasses that are its fields."""
    hints = typing.get_type_hints(command, include_extras=True)
    for owner in filter(is_dataclass, command.__mro__):
        for name, text in field_texts(owner):
            owner.__annotations__[name] = Annotated[hints[name], tyro.conf.arg(help=text, help_behavior_hint=_hint)]
    for inner in _dataclasses(*hints.values()):
        _join_lines(inner)


def _dataclasses(*hints: Any) -> list[type[Any]]:
    """The dataclasses within types, at any depth."""
    found: list[type[Any]] = []
    for hint in hints:
        is_class = isinstance(hint, type) and is_dataclass(hint)
        found += [hint] if is_class else _dataclasses(*typing.get_args(hint))
    return found


def _hint(default: str) -> str:
    """The default after an option's help; nothing if the default is no value."""
    return "" if default in ("None", "", "False") else f"(default: {default})"


if __name__ == "__main__":
    main()
