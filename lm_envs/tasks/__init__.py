"""The registry of text tasks. Loaders are named by strings, so importing it is light.

A task is a function that returns a :class:`~lm_envs.tasks.base.TextTask`; one outside this package needs no line here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_envs.plugins import find
from lm_envs.settings import short

if TYPE_CHECKING:
    from lm_envs.tasks.base import TextTask

__all__ = ["TASKS", "load"]

TASKS: dict[str, str | Callable[..., Any]] = {
    "reviews": "lm_envs.tasks.reviews:load",
    "corpus": "lm_envs.tasks.corpus:load",
    "translation": "lm_envs.tasks.translation:load",
    "custom": "lm_envs.tasks.custom:load",
    "enumerable": "lm_envs.tasks.enumerable:load",
}

_loaded: dict[tuple[Any, tuple[tuple[str, Any], ...]], TextTask] = {}


def load(name: str, **options: Any) -> TextTask:
    """Load a task. In a process, the same name and options give the same object.

    Args:
        name: a key of :data:`TASKS`, or one of your own as :mod:`lm_envs.plugins` names it: ``my_task.py:load``.
        options: arguments of the task's loader; hashable values, or lists of them.

    Raises:
        ValueError: an unknown task (the message suggests names) or option, or a loader that returns no TextTask.
    """
    loader = find(name, "task", TASKS)
    if not isinstance(options.get("path", ""), (str, Path)):
        raise ValueError(f"{name}: path must be text, not {short(options['path'])}")
    key = (loader, tuple((option, _hashable(options[option])) for option in sorted(options)))
    if key not in _loaded:
        import torch  # here, because this module is light

        from lm_envs.tasks.base import TextTask

        try:
            inspect.signature(loader).bind(**options)
        except TypeError as error:
            raise ValueError(f"options of task {name!r}: {error}") from None
        with torch.random.fork_rng(devices=[]):  # models draw weights before they read theirs from files
            made = loader(**options)
        if not isinstance(made, TextTask):
            kind = type(made).__name__
            raise ValueError(f"task {name!r} gave a {kind}, and has to give a lm_envs.tasks.base.TextTask")
        _loaded[key] = made
    return _loaded[key]


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        value = sorted(value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
