"""``lm-envs tasks``: the tasks, the algorithms and the built-in suites, and the settings of one of them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import is_untrained, trainable
from lm_envs.benchmarks.run.suite_files import BUILT_IN, load_suite
from lm_envs.plugins import find, installed
from lm_envs.settings import field_texts, near
from lm_envs.tasks import PRETRAINED, TASKS

_CONFIGS = {
    "custom": "lm_envs.tasks.custom:CustomConfig",
    "corpus": "lm_envs.tasks.corpus:CorpusConfig",
    "translation": "lm_envs.tasks.translation:TranslationConfig",
    **dict.fromkeys(PRETRAINED, "lm_envs.tasks.custom:CustomConfig"),
}
"""The options of tasks whose loaders take them by any name."""


@dataclass(frozen=True)
class Tasks:
    """List the tasks, the algorithms and the built-in suites, or say what one of them is and takes.

      lm-envs tasks
      lm-envs tasks ppo
      lm-envs tasks my_algo.py:CISPO

    Settings are given by --set NAME=VALUE, or in a suite under [algorithm.ppo].
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = ()
    """An algorithm, for its settings; a task, for its options; or a suite, for its text."""

    def run(self, console: Console) -> None:
        for name in self.names:
            for part in _about(name):
                whole = isinstance(part, Text)  # a file, which may begin one of your own
                Console(emoji=False).print(part, highlight=False, soft_wrap=whole, end="\n" if whole else "\n\n")
        if not self.names:
            self._list()

    def _list(self) -> None:
        from lm_envs.algos.registry import ALGORITHMS

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
        algorithms.add_row("prompted", _first_line("lm_envs.algos.few_shot"))
        algorithms.add_row("saved:<folder>", "A model that was trained before, here or elsewhere, measured as it is")
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


def _about(name: str) -> Iterator[Any]:
    """What is printed about an algorithm, a task or a suite; UserError if it is none of them."""
    from lm_envs.algos.registry import load

    tasks, algorithms = {**TASKS, **installed("task")}, [*trainable(), *installed("algorithm")]
    suite = BUILT_IN / f"{name}.toml"
    if is_untrained(name):
        yield f"{name} trains nothing and has no settings."
    elif name in tasks:
        yield from _task(name, find(name, "task", TASKS))
    elif suite.is_file():
        yield Text(suite.read_text(encoding="utf-8").rstrip())
    elif name in algorithms or ":" in name:
        try:
            found = load(name)
        except ValueError:
            if name in algorithms:
                raise
            yield from _task(name, find(name, "task", TASKS))  # a function, or nothing: the message says so
            return
        yield from _paragraphs(found)
        yield _settings(name, found.Config)
    else:
        suites = [path.stem for path in BUILT_IN.glob("*.toml")]
        raise UserError(f"nothing is called {name!r}: {near(name, [*algorithms, *tasks, *suites])}")


def _paragraphs(made: Any) -> Iterator[str]:
    """The text about a class (not a base of it) or a function, without arguments and errors, or about a module; else
    its module's."""
    own = made.__doc__ or sys.modules[made.__module__].__doc__ or f"{made.__name__} has no docstring."
    for part in inspect.cleandoc(own).split("\n\n"):
        if not part.startswith(("Args:", "Raises:", "Returns:", "Attributes:")):
            yield escape(part if "\n " in part else " ".join(part.split()))


def _settings(name: str, kind: Any) -> Table:
    table = Table("setting", "default", "what it is", title=f"Settings of {escape(name)}", title_justify="left")
    owners: list[Any] = [base for base in reversed(kind.__mro__) if is_dataclass(base)]
    texts = {field: text for base in owners for field, text in field_texts(base)}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = field.default if field.default is not MISSING else ""
        shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        text = texts.get(field.name, "")
        parts = (hints[field.name], *get_args(hints[field.name]))
        choices = [str(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        table.add_row(field.name, escape(shown), escape(f"{text} One of {', '.join(choices)}." if choices else text))
    return table


def _task(name: str, made: Any) -> Iterator[Any]:
    """A task's text, and the options that its loader takes."""
    if name in TASKS:  # what our tasks are is said at the head of their files
        yield from _paragraphs(sys.modules[made.__module__])
    yield from _paragraphs(made)
    options = own = dict(_defaults(inspect.signature(made).parameters.values()))
    texts = {name: text for name, text in _entries(made, "Args").items() if name in own}
    if config := _CONFIGS.get(name):
        kind = find(config, "task", fits=is_dataclass)
        options = {**own, **dict(_defaults(inspect.signature(kind).parameters.values())), **own}
        if "policy" in own:  # a task with prompts of its own, and with other defaults
            del options["prompts"]
            given = ("reward", "judge", "examples", "max_new_tokens", "temperature", "sensitive")
            options |= dict.fromkeys(given, "the task's")
        texts = {**_attributes(kind), **texts}
    table = Table("option", "default", *["what it is"] * bool(texts), title=f"Options of {escape(name)}")
    table.title_justify = "left"
    for option, default in options.items():
        table.add_row(option, escape(default), *[escape(texts.get(option, ""))] * bool(texts))
    if table.row_count:
        yield table


def _defaults(parameters: Iterable[inspect.Parameter]) -> Iterator[tuple[str, str]]:
    """The names of parameters and the text of their defaults, without those of any name."""
    for option in parameters:
        default = "needed" if option.default is inspect.Parameter.empty else str(option.default)
        if option.kind is not inspect.Parameter.VAR_KEYWORD:
            yield option.name, default.lower() if default in ("None", "True", "False") else default


def _attributes(kind: type) -> dict[str, str]:
    """The texts of a class's fields, its bases' included, from the section "Attributes" of its docstring."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= _entries(base, "Attributes") if is_dataclass(base) else {}
    return found


def _entries(made: Any, section: str) -> dict[str, str]:
    """The texts of the names in a section of a docstring."""
    found: dict[str, str] = {}
    listed = inspect.cleandoc(made.__doc__ or "").partition(f"{section}:\n")[2].split("\n\n")[0]
    for entry in re.split(r"\n(?=    \S)", "\n" + listed)[1:]:
        names, _, text = " ".join(entry.split()).partition(": ")
        text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")
        found |= dict.fromkeys(names.split(", "), text)
    return found


def _first_line(place: Any) -> str:
    module = place.partition(":")[0] if isinstance(place, str) else place.__module__
    text = inspect.getdoc(import_module(module)) or ""
    return " ".join(text.split("\n\n")[0].split())
