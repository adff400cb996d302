"""The names that suites and command lines use for tasks, their kinds of env, algorithms and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lm_envs.benchmarks.errors import UserError
from lm_envs.plugins import find, installed
from lm_envs.settings import near

_BEST_OF = re.compile(r"(?:soft-)?best-of-([1-9]\d{0,4})")
_BANDIT = "-bandit"
ALL = "all"


def folder_name(name: str) -> str:
    """Return the name of a task or algorithm as a folder: ids such as ``lm_envs/Cat-v0`` hold a slash."""
    return re.sub(r"[^\w.-]", "_", name)


def run_name(task: str, algorithm: str, seed: int, task_seed: int = 0) -> str:
    """Return ``task/algorithm/seed-n``, the name of a run and of its folder; with other models of the task than its
    own, ``task/algorithm/seed-n-task-m``."""
    return f"{folder_name(task)}/{folder_name(algorithm)}/seed-{seed}{f'-task-{task_seed}' if task_seed else ''}"


def base_task(name: str) -> tuple[str, str]:
    """Return the task and the kind of env of a name: ``("reviews", "bandit")`` for ``"reviews-bandit"``. The options
    behind a question mark stay with the task."""
    from lm_envs.tasks import TASKS

    head, mark, options = name.partition("?")
    if head not in TASKS and head.endswith(_BANDIT):
        return head.removesuffix(_BANDIT) + mark + options, "bandit"
    return name, "mdp"


def method_name(task: str, algorithm: str) -> str:
    """Return what a report calls an algorithm on a task's env: ``"ppo (bandit)"``, ``"ppo"`` on the MDP."""
    return f"{algorithm} (bandit)" if base_task(task)[1] == "bandit" else algorithm


def best_of(algorithm: str) -> int | None:
    """Return the n of ``"best-of-n"`` and ``"soft-best-of-n"``, None for any other algorithm."""
    match = _BEST_OF.fullmatch(algorithm)
    return int(match.group(1)) if match else None


def saved(algorithm: str) -> str | None:
    """Return the place of ``"saved:PLACE"``, a model that is measured as it is; None for any other algorithm."""
    return algorithm.removeprefix("saved:") if algorithm.startswith("saved:") else None


def is_untrained(algorithm: str) -> bool:
    """Return whether an algorithm trains nothing: SFT itself, best-of-n, the few-shot prompt, and a saved model."""
    return algorithm in ("sft", "prompted") or best_of(algorithm) is not None or saved(algorithm) is not None


def is_control(task: str) -> bool:
    """Return whether a task's name is a Gymnasium id, such as ``CartPole-v1``."""
    return "?" not in task and re.search(r"-v\d+$", task) is not None


def check_task(name: str) -> None:
    """Raise UserError or ValueError unless there is such a task; the message names similar ones."""
    from lm_envs.tasks import TASKS, parts_of

    if is_control(name):
        import gymnasium

        try:
            spec = gymnasium.spec(name)
        except gymnasium.error.Error as error:
            raise UserError(f"no environment {name!r}: {str(error).splitlines()[0]}") from error
        if "task" in spec.kwargs:
            bandit = _BANDIT if "Bandit" in name else ""
            raise UserError(f"{name!r} is called {spec.kwargs['task'] + bandit!r} here: use that name")
    else:
        find(parts_of(base_task(name)[0])[0], "task", TASKS)


def check_algorithm(name: str) -> None:
    """Raise UserError or ValueError unless there is such an algorithm or saved model; similar names are told."""
    if (place := saved(name)) is not None:
        from lm_envs.model.loading import load_tokenizer

        load_tokenizer(place, "saved model")
        return
    if is_untrained(name) or name in trainable():
        return
    if name in installed("algorithm") or ":" in name:
        from lm_envs.algos.registry import load

        load(name)
        return
    if name.startswith(("best-of-", "soft-best-of-")):
        why = "best-of-n needs a whole number n from 1 to 99999, as in best-of-16"
    elif meant := re.fullmatch(r"(?:best[-_ ]?of|bo)[-_ ]?n?[-_= ]?([1-9]\d*)", name, re.IGNORECASE):
        why = f"did you mean 'best-of-{meant[1]}'?"
    else:
        known = ["sft", "prompted", "best-of-16", *trainable(), *installed("algorithm")]
        why = f"{near(name, known)} (`lm-envs tasks` lists them; one of your own is FILE.py:CLASS)"
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
