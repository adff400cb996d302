"""Settings that a suite or a command line changes: parsing ``key=value`` and checking names and values before anything
trains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm_envs import settings
from lm_envs.benchmarks.errors import UserError


def parse_settings(items: Sequence[str], option: str = "--set", example: str = "learning_rate=1e-3") -> dict[str, Any]:
    """``["learning_rate=1e-3", "anneal=false"]`` as a dictionary; values are numbers, true, false, none, or else strings.

    ``option`` and ``example`` are for the UserError of an item without "=", or of a name given twice.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UserError(f"{option} takes name=value, as in {option} {example}, not {settings.short(item)}")
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
    except (ValueError, RecursionError):  # text; digits by the thousand; brackets thousands deep
        return text


def check_overrides(algorithm: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of an algorithm's settings with their types put right (an int where a float belongs is one); a
    UserError for an unknown setting, with the near names, or a value of the wrong type or out of range."""
    from lm_envs.algos.policies.language_model import NO_TRUNCATION
    from lm_envs.algos.registry import make_config

    for name in overrides:
        if name in ("top_k", "top_p"):
            raise UserError(f"{algorithm}.{name}: {NO_TRUNCATION}")
        if name == "seed":
            raise UserError(f"{algorithm}.seed: the run's seed decides it: set --seed, --seeds or the suite's seeds")
    try:
        made = make_config(algorithm, **overrides)
    except ValueError as error:
        raise UserError(str(error)) from error
    return {name: getattr(made, name) for name in overrides}
