"""Parameters of a test that are too many for the quick suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(quick: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Return the values as parameters of a test; those that are not ``quick`` are marked slow."""

    def parameter(value: Any) -> Any:
        marks = () if quick(value) else pytest.mark.slow
        return pytest.param(*value, marks=marks) if isinstance(value, tuple) else pytest.param(value, marks=marks)

    return [parameter(value) for value in values]
