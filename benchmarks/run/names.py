"""The names that suites and command lines use: of tasks, their kinds of env, algorithms and folders."""

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
    """A task's name as a folder: ids such as ``lm_envs/Cat-v0`` hold a slash."""
    return re.sub(r"[^\w.-]", "_", task)


def base_task(name: str) -> tuple[str, str]:
    """The registered task and the kind of env that a name means: ``"reviews-bandit"`` is ``("reviews", "bandit")``."""
    from lm_envs.tasks import TASKS

    if name not in TASKS and name.endswith(_BANDIT):
        return name.removesuffix(_BANDIT), "bandit"
    return name, "mdp"


def load_task(name: str, options: Mapping[str, Any]) -> TextTask:
    """The text task that a name in a suite means; one of the user's own is ``module:function``. A UserError if there is
    no such module or function, ValueErrors of the task's loader."""
    from lm_envs.tasks import TASKS, load
    from lm_envs.tasks.base import TextTask

    name = base_task(name)[0]
    if ":" in name and name not in TASKS:
        module, _, function = name.partition(":")
        found = None
        with suppress(ModuleNotFoundError, ValueError):  # of a parent package; of a script
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
    """The n of ``"best-of-n"``, None for any other algorithm."""
    match = _BEST_OF.fullmatch(algorithm)
    return int(match.group(1)) if match else None


def is_control(task: str) -> bool:
    """Whether a task's name is a Gymnasium id, as ``CartPole-v1`` is."""
    return re.search(r"-v\d+$", task) is not None


def check_task(name: str) -> None:
    """Raises UserError unless there is such a task; the message names the near ones."""
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
    """Raises UserError unless there is such an algorithm; the message names the near ones."""
    if name == "sft" or best_of(name) is not None:
        return
    if name.startswith("best-of-"):
        raise UserError(f"no algorithm {name!r}: best-of-n needs a whole number n from 1 to 99999, as in best-of-16")
    if meant := re.fullmatch(r"(?:best[-_ ]?of|bo)[-_ ]?n?[-_= ]?([1-9]\d*)", name, re.IGNORECASE):
        raise UserError(f"no algorithm {name!r}: did you mean 'best-of-{meant[1]}'?")
    if name not in trainable():
        raise UserError(
            f"no algorithm {name!r}: {near(name, ['sft', 'best-of-16', *trainable()])} (`lm-envs tasks` lists them)"
        )


def trainable() -> list[str]:
    """The registered algorithms that train a policy, by sampling or on preferences of simulated annotators."""
    from lm_envs.algos.registry import ALGORITHMS, WRAPPERS, load

    agents = {name: load(name) for name in ALGORITHMS if name not in WRAPPERS}
    return [name for name, agent in agents.items() if agent.preference_data or not agent.needs_data]


def expanded(algorithms: Sequence[str]) -> tuple[str, ...]:
    """Names of algorithms, with "all" standing for SFT, best-of-16 and everything that trains a policy."""
    every = ("sft", "best-of-16", *trainable()) if ALL in algorithms else ()
    return tuple(dict.fromkeys(n for name in algorithms for n in (every if name == ALL else (name,))))
