"""Settings that users give, in files and on command lines: limits as types, one check for all, hints for unknown names.

A dataclass that inherits from :class:`Settings` is checked against its annotations when it is made; :func:`make` makes
one from a mapping (TOML or ``name=value``), and :func:`check` takes any other dataclass, such as a command's.
"""

from __future__ import annotations

import difflib
import functools
import numbers
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Interval, MinLen
from pydantic import AfterValidator, AllowInfNan, ConfigDict, TypeAdapter, ValidationError

Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
"""A whole number of at least 1."""
Whole = Annotated[int, Interval(ge=0, le=2**31 - 1)]
"""A whole number of at least 0."""
Size = Annotated[int, Interval(ge=1, le=2**20)]
"""How many of something memory holds at once."""
Several = Annotated[int, Interval(ge=2, le=2**20)]
"""The same, of at least 2."""
Rank = Annotated[int, Interval(ge=0, le=2**14)]
"""Of a low-rank matrix, 0 for none."""
Threads = Annotated[int, Interval(ge=1, le=1024)]
"""Threads or processes."""
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
"""What PyTorch and NumPy take for a seed."""
Finite = Annotated[float, AllowInfNan(False)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NonNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Rate = Annotated[float, Interval(gt=0, le=1)]
"""A learning rate; above 1 nothing converges."""
Probability = Annotated[float, Interval(ge=0, le=1)]
Share = Annotated[float, Interval(ge=0, lt=1)]
"""A part of a whole, never all of it."""
Name = Annotated[str, MinLen(1)]


def _unique(found: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(found)) < len(found):
        raise ValueError("a list that names nothing twice")
    return found


Unique = AfterValidator(_unique)
"""Of a tuple: its items differ."""
Names = Annotated[tuple[Name, ...], MinLen(1)]
Table = dict[str, Any]

T = TypeVar("T")
# What pydantic's kinds of errors mean, in our words; others keep its own.
_ALLOWED = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "path_type": "a path",
    "is_instance_of": "a {class}",
    "none_required": "none",
    "value_error": "{error}",  # of our own validators
}


class SettingError(ValueError):
    """An unknown setting or a wrong value; ``name`` says which."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class Settings:
    """Base of dataclasses that are checked against their annotations; raises SettingError."""

    def __post_init__(self) -> None:
        """Check the fields; whole floats become ints where those belong, lists tuples, NumPy's numbers Python's."""
        for name, value in _checked(type(self), vars(self), f"{type(self).__name__}.{{}}").items():
            object.__setattr__(self, name, value)


def make(kind: type[T], values: Mapping[str, Any], where: str, what: str = "option") -> T:
    """Make a dataclass from a mapping.

    Args:
        where: what the settings are of, for messages: "ppo", "[budget]".
        what: what messages call a setting.

    Raises:
        SettingError: an unknown setting, with near names; a missing one; a value of another type or out of range.
        ValueError: settings that do not fit together.
    """
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise SettingError(f"{where} has no {what} {name!r}: {near(name, known)}", str(name))
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise SettingError(f"{where} needs {name!r}", name)
    checked = _checked(kind, values, f"{where}: {{}}")
    try:
        return kind(**checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check(settings: Any, name: str = "--{}") -> None:
    """Check a dataclass and those in its fields; raises SettingError.

    Args:
        name: how messages write a field's name; with "--", "-" stands for "_".
    """
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    _checked(type(settings), values, name)
    for value in filter(is_dataclass, values.values()):
        check(value, name)


def near(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A hint for an unknown name: the near ones; without any, ``otherwise``, or all known ones."""
    names = sorted(known)
    folded = {n.lower(): n for n in names}
    found = [folded[n] for n in difflib.get_close_matches(str(name).lower(), folded, n=3, cutoff=0.55)]
    if found:
        return f"did you mean {' or '.join(repr(n) for n in found)}?"
    return otherwise or f"there are {', '.join(names) or 'none'}"


def one_of(value: Any, allowed: Iterable[str], where: str) -> None:
    """Raise ValueError if a value is none of those allowed; ``where`` names it."""
    if value not in allowed:
        raise ValueError(f"{where} must be one of {', '.join(allowed)}, not {value!r}")


def short(value: Any, width: int = 60) -> str:
    """A value in a message, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists thousands deep
        return f"this {type(value).__name__}"
    return text if len(text) <= width else f"{text[: width - 3]}..."


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def _adapter(kind: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_hints(kind)[name], config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _checked(kind: type, values: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Fit the values of a class's fields to its annotations; dataclasses stay as they are."""
    return {
        name: value if is_dataclass(value) else _fit(_adapter(kind, name), value, called, name)
        for name, value in values.items()
        if name in _hints(kind)
    }


def _readings(value: Any) -> Iterator[Any]:
    """A value and its other readings: TOML and JSON have no tuples, 1e4 is a whole number."""
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    yield value
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    elif isinstance(value, list):
        yield tuple(value)


@functools.cache
def _takes_none(adapter: TypeAdapter[Any]) -> bool:
    try:
        return adapter.validate_python(None) is None
    except ValidationError:
        return False


def _allowed(error: Any) -> str:
    known = _ALLOWED.get(error["type"])
    limits = {key: next(reversed(list(_readings(limit)))) for key, limit in error.get("ctx", {}).items()}  # 1, not 1.0
    return known.format(**limits) if known else error["msg"].removeprefix("Input should be ")


def _fit(adapter: TypeAdapter[Any], value: Any, called: str, name: str) -> Any:
    failed: ValidationError | None = None
    for reading in _readings(value):
        try:
            return adapter.validate_python(reading)
        except ValidationError as error:
            failed = error
    assert failed is not None
    errors = failed.errors(include_url=False)
    alike = [error for error in errors if len(error["loc"]) == len(errors[0]["loc"])]  # of a union, one for each kind
    allowed = " or ".join(dict.fromkeys(map(_allowed, alike)))
    if _takes_none(adapter):
        allowed += " or none"
    place = "".join(f"[{step}]" for step in errors[0]["loc"] if isinstance(step, int))
    given = errors[0]["input"] if place else value
    title = called.format(name.replace("_", "-") if called.startswith("--") else name)
    raise SettingError(f"{title}{place} must be {allowed}, not {short(given)}", name) from None
