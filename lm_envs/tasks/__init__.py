"""The registry of text tasks. Loaders are named by strings, so importing it is light.

To add a task, write a module with a function that returns a :class:`~lm_envs.tasks.base.TextTask`, and add a line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lm_envs.settings import near

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
    """Load the task registered under a name. Within a process, the same name and options give the same object.

    Args:
        name: a key of :data:`TASKS`.
        options: passed to the task's loader; hashable values, or lists of them.

    Raises:
        ValueError: no such task (the message names the near ones), or no such option.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}: {near(name, TASKS)}")
    key = (TASKS[name], tuple((option, _hashable(options[option])) for option in sorted(options)))
    if key not in _loaded:
        import torch  # here, because this module is light

        module, function = TASKS[name].split(":")
        with torch.random.fork_rng(devices=[]):  # constructors of models draw weights that are then read from files
            _loaded[key] = getattr(import_module(module), function)(**options)
    return _loaded[key]


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
