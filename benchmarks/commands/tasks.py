"""``lm-envs tasks``: the tasks, the algorithms and the built-in suites."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.table import Table

from lm_envs.benchmarks.run.names import trainable
from lm_envs.benchmarks.run.suite_files import BUILT_IN, load_suite
from lm_envs.plugins import installed


@dataclass(frozen=True)
class Tasks:
    """List the tasks, the algorithms and the built-in suites, each with a line about it."""

    def run(self, console: Console) -> None:
        from lm_envs.algos.registry import ALGORITHMS
        from lm_envs.tasks import TASKS

        tasks = Table("task", "what it is", title="Tasks", title_justify="left")
        for name, place in {**TASKS, **installed("task")}.items():
            tasks.add_row(name, _first_line(place))
        tasks.add_row("<task>-bandit", "The same task with a whole response as one action")
        tasks.add_row("<file>.py:<function>", "Your own: a function that returns a TextTask; or <module>:<function>")
        tasks.add_row("<id>", "A Gymnasium environment with discrete actions, such as CartPole-v1 or lm_envs/Cat-v0")
        algorithms = Table("algorithm", "what it is", title="Algorithms", title_justify="left")
        algorithms.add_row("sft", "The reference itself, untouched: the baseline of every comparison")
        algorithms.add_row("best-of-<n>", _first_line("lm_envs.algos.best_of_n"))
        algorithms.add_row("soft-best-of-<n>", "Sample n responses and choose by e^(reward / KL coefficient).")
        for name in trainable():
            algorithms.add_row(name, _first_line(ALGORITHMS[name]))
        for name, place in installed("algorithm").items():
            algorithms.add_row(name, _first_line(place))
        algorithms.add_row("<file>.py:<class>", "Your own: a subclass of Agent; or <module>:<class>")
        suites = Table("suite", "what it compares", title="Built-in suites", title_justify="left")
        for path in sorted(BUILT_IN.glob("*.toml")):
            suites.add_row(path.stem, load_suite(path).description)
        for table in (tasks, algorithms, suites):
            Console(emoji=False).print(table)


def _first_line(place: Any) -> str:
    module = place.partition(":")[0] if isinstance(place, str) else place.__module__
    text = inspect.getdoc(import_module(module)) or ""
    return " ".join(text.split("\n\n")[0].split())
