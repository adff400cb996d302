"""The names that suites and command lines use for tasks, their kinds of env, algorithms and folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lm_envs.benchmarks.errors import UserError
from lm_envs.settings import near

if TYPE_CHECKING:
    from lm_envs.tasks.base import TextTask

_BEST_OF = re.compile(r"best-of-([1-9]\d{0,4})")
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_BANDIT = "-bandit"
ALL = "all"


def folder_name(task: str) -> str:
    """Return a task's name as a folder: ids such as ``lm_envs/Cat-v0`` hold a slash."""
    return re.sub(r"[^\w.-]", "_", task)


def base_task(name: str) -> tuple[str, str]:
    """Return the registered task and the kind of env of a name: ``("reviews", "bandit")`` for ``"reviews-bandit"``."""
    from lm_envs.tasks import TASKS

    if name not in TASKS and name.endswith(_BANDIT):
        return name.removesuffix(_BANDIT), "bandit"
    return name, "mdp"


def load_task(name: str, options: Mapping[str, Any]) -> TextTask:
    """Load the text task of a name; one of the user's own is ``module:function``. Raise UserError if there is no such
    module or function, and ValueErrors of the task's loader."""
    from lm_envs.tasks import TASKS, load
    from lm_envs.tasks.base import TextTask

    name = base_task(name)[0]
    if ":" in name and name not in TASKS:
        module, _, function = name.partition(":")
        found = None
        with suppress(ModuleNotFoundError, ValueError):  # no parent package; a script
            found = find_spec(module)
        if found is None:
            raise UserError(f"task {name!r}: no module {module!r} on the import path (PYTHONPATH adds folders)")
        if not hasattr(import_module(module), function):
            raise UserError(f"task {name!r}: module {module!r} has no function {function!r}")
        TASKS[name] = name
    made = load(name, **options)
    if not isinstance(made, TextTask):
        raise UserError(f"task {name!r} gave a {type(made).__name__}, and has to give a lm_envs.tasks.base.TextTask")
    return made


def best_of(algorithm: str) -> int | None:
    """Return the n of ``"best-of-n"``, None for any other algorithm."""
    match = _BEST_OF.fullmatch(algorithm)
    return int(match.group(1)) if match else None


def is_control(task: str) -> bool:
    """Return whether a task's name is a Gymnasium id, such as ``CartPole-v1``."""
    return re.search(r"-v\d+$", task) is not None


def check_task(name: str) -> None:
    """Raise UserError unless there is such a task; the message names similar ones."""
    from lm_envs.tasks import TASKS

    if is_control(name):
        import gymnasium

        try:
            spec = gymnasium.spec(name)
        except gymnasium.error.Error as error:
            raise UserError(f"no environment {name!r}: {str(error).splitlines()[0]}") from error
        if "task" in spec.kwargs:
            bandit = _BANDIT if "Bandit" in name else ""
            raise UserError(f"{name!r} is called {spec.kwargs['task'] + bandit!r} here: use that name")
    elif ":" in name:
        if not _OWN.fullmatch(base_task(name)[0]):
            raise UserError(f"no task {name!r}: one of your own is module:function, as in my_tasks.reviews:load")
    elif base_task(name)[0] not in TASKS:
        known = [*TASKS, *(task + _BANDIT for task in TASKS)]
        raise UserError(f"no task {name!r}: {near(name, known)} (`lm-envs tasks` lists them)")


def check_algorithm(name: str) -> None:
    """Raise UserError unless there is such an algorithm; the message names similar ones."""
    if name == "sft" or best_of(name) is not None or name in trainable():
        return
    if name.startswith("best-of-"):
        why = "best-of-n needs a whole number n from 1 to 99999, as in best-of-16"
    elif meant := re.fullmatch(r"(?:best[-_ ]?of|bo)[-_ ]?n?[-_= ]?([1-9]\d*)", name, re.IGNORECASE):
        why = f"did you mean 'best-of-{meant[1]}'?"
    else:
        why = f"{near(name, ['sft', 'best-of-16', *trainable()])} (`lm-envs tasks` lists them)"
    raise UserError(f"no algorithm {name!r}: {why}")


def trainable() -> list[str]:
    """Return the registered algorithms that train a policy by sampling or on simulated annotators' preferences."""
    from lm_envs.algos.registry import ALGORITHMS, WRAPPERS, load

    agents = {name: load(name) for name in ALGORITHMS if name not in WRAPPERS}
    return [name for name, agent in agents.items() if agent.preference_data or not agent.needs_data]


def expanded(algorithms: Sequence[str]) -> tuple[str, ...]:
    """Return names of algorithms, with "all" replaced by SFT, best-of-16 and everything that trains a policy."""
    every = ("sft", "best-of-16", *trainable()) if ALL in algorithms else ()
    return tuple(dict.fromkeys(n for name in algorithms for n in (every if name == ALL else (name,))))
