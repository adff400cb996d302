"""Settings that a suite or a command line changes: parsing ``key=value`` and checking names and types before anything
trains.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from lm_envs.benchmarks.errors import UserError
from lm_envs.settings import near


def parse_settings(items: Sequence[str], option: str = "--set", example: str = "learning_rate=1e-3") -> dict[str, Any]:
    """``["learning_rate=1e-3", "anneal=false"]`` as a dictionary.

    Values are numbers, true, false, none, or else strings. ``option`` and ``example`` are for the messages.

    Raises:
        UserError: an item without "=", or a name given twice.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UserError(f"{option} takes name=value, as in {option} {example}, not {item!r}")
        if name in found:
            raise UserError(f"{option} gives {name!r} twice")
        found[name] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_overrides(algorithm: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of an algorithm's settings with their types put right (an int where a float belongs is one).

    Raises:
        UserError: no such setting, with the near names, or a value of the wrong type or out of range.
    """
    from lm_envs.algos.policies.language_model import NO_TRUNCATION
    from lm_envs.algos.registry import load, make_config

    config = load(algorithm).Config
    hints = typing.get_type_hints(config)
    checked = {}
    for name, value in overrides.items():
        if name in ("top_k", "top_p"):
            raise UserError(f"{algorithm}.{name}: {NO_TRUNCATION}")
        if name not in hints:
            raise UserError(f"{algorithm} has no setting {name!r}: {near(name, hints)}")
        checked[name] = _fit(algorithm, name, value, hints[name])
    try:
        make_config(algorithm, **checked)
    except ValueError as error:
        raise UserError(f"settings of {algorithm}: {error}") from error
    return checked


def _fit(algorithm: str, name: str, value: Any, hint: Any) -> Any:
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif kind is float and type(value) is int:
            return float(value)
        elif kind is int and type(value) is float and value.is_integer():  # 1e4 from a command line
            return int(value)
        elif type(value) is kind:
            return value
    raise UserError(f"{algorithm}'s {name!r} must be {describe_type(hint)}, not {value!r}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe_type(hint: Any) -> str:
    """A type hint in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    parts = []
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal:
            parts.append("one of " + ", ".join(map(repr, get_args(kind))))
        else:
            parts.append(words.get(kind, str(kind)))
    return " or ".join(parts)
