"""The registry of text tasks. Loaders are named by strings, so importing it is light.

To add a task, write a module with a function that returns a :class:`~lm_envs.tasks.base.TextTask`, and add a line here.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_envs.settings import near, short

if TYPE_CHECKING:
    from lm_envs.tasks.base import TextTask

__all__ = ["TASKS", "load"]

TASKS: dict[str, str] = {
    "reviews": "lm_envs.tasks.reviews:load",
    "corpus": "lm_envs.tasks.corpus:load",
    "translation": "lm_envs.tasks.translation:load",
    "custom": "lm_envs.tasks.custom:load",
    "enumerable": "lm_envs.tasks.enumerable:load",
}

_loaded: dict[tuple[str, tuple[tuple[str, Any], ...]], TextTask] = {}


def load(name: str, **options: Any) -> TextTask:
    """Load the task with a name of :data:`TASKS`. In a process, the same name and options give the same object.

    ``options`` go to the task's loader; they are hashable values, or lists of them. ValueError for an unknown task (the
    message suggests names) or option.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}: {near(name, TASKS)}")
    if not isinstance(options.get("path", ""), (str, Path)):
        raise ValueError(f"{name}: path must be text, not {short(options['path'])}")
    key = (TASKS[name], tuple((option, _hashable(options[option])) for option in sorted(options)))
    if key not in _loaded:
        import torch  # here, because this module is light

        module, function = TASKS[name].split(":")
        loader = getattr(import_module(module), function)
        try:
            inspect.signature(loader).bind(**options)
        except TypeError as error:
            raise ValueError(f"options of task {name!r}: {error}") from None
        with torch.random.fork_rng(devices=[]):  # models draw weights before they read theirs from files
            _loaded[key] = loader(**options)
    return _loaded[key]


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        value = sorted(value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
