"""The registry of text tasks. Loaders are named by strings, so importing it is light.

A task is a function that returns a :class:`~lm_envs.tasks.base.TextTask`; one outside this package needs no line here.
Options of its loader may follow its name, as in ``instruct?policy=DIR&max_new_tokens=64``, and behind the name of a
registered task a colon and the loader's first argument, as in ``reasoning:chain_sum?max_terms=3``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_envs.plugins import find
from lm_envs.settings import short

if TYPE_CHECKING:
    from lm_envs.tasks.base import TextTask

__all__ = ["PRETRAINED", "TASKS", "load", "parts_of"]

TASKS: dict[str, str | Callable[..., Any]] = {
    "reviews": "lm_envs.tasks.reviews:load",
    "corpus": "lm_envs.tasks.corpus:load",
    "translation": "lm_envs.tasks.translation:load",
    "custom": "lm_envs.tasks.custom:load",
    "cheerful": "lm_envs.tasks.cheerful:load",
    "instruct": "lm_envs.tasks.instruct:load",
    "concepts": "lm_envs.tasks.concepts:load",
    "dialogue": "lm_envs.tasks.dialogue:load",
    "reasoning": "lm_envs.tasks.reasoning:load",
    "summarise": "lm_envs.tasks.summarise:load",
    "harmless": "lm_envs.tasks.harmless:load",
    "fine-grained": "lm_envs.tasks.fine_grained:load",
    "enumerable": "lm_envs.tasks.enumerable:load",
}
PRETRAINED = ("cheerful", "instruct", "concepts", "dialogue", "reasoning", "summarise", "harmless", "fine-grained")
"""Tasks for a pretrained policy, whose loaders take the options of ``custom`` beside their own."""

_loaded: dict[tuple[Any, tuple[tuple[str, Any], ...]], TextTask] = {}


def parts_of(text: str) -> tuple[str, str | None, dict[str, Any]]:
    """Split the text that names a task into its name, the loader's first argument if it is given behind a colon, and
    the options behind a question mark: numbers, true, false or null as in JSON, or else text.

    ValueError if an option is not written as ``name=value``, or given twice.
    """
    name, mark, written = text.partition("?")
    options: dict[str, Any] = {}
    for item in written.split("&") if mark else ():
        option, equals, value = item.partition("=")
        if not equals or not option.isidentifier() or option in options:
            raise ValueError(f"task {text!r}: expected options as in {name}?name=value&name=value, not {short(item)}")
        try:
            options[option] = json.loads(value)
        except (ValueError, RecursionError):
            options[option] = value
    head, colon, first = name.partition(":")
    return (head, first, options) if colon and head in TASKS else (name, None, options)


def load(name: str, **options: Any) -> TextTask:
    """Load a task. In a process, the same name and options give the same object.

    Args:
        name: a key of :data:`TASKS`, or one of your own as :mod:`lm_envs.plugins` names it: ``my_task.py:load``; with
            options as :func:`parts_of` reads them.
        options: arguments of the task's loader; hashable values, or lists of them. They replace those in the name.

    Raises:
        ValueError: an unknown task (the message suggests names) or option, or a loader that returns no TextTask.
    """
    name, first, given = parts_of(name)
    loader = find(name, "task", TASKS)
    if first is not None:
        given = {next(iter(inspect.signature(loader).parameters)): first, **given}
    options = {**given, **options}
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
