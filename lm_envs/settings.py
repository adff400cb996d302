"""Validation of user settings from files and command lines: types with limits, one check, hints for unknown names.

A dataclass that inherits from :class:`Settings` checks its fields against their annotations; :func:`make` builds one
from a mapping (TOML or ``name=value``), and :func:`check` checks any other dataclass, such as a command's.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import numbers
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Interval, MinLen
from pydantic import AfterValidator, AllowInfNan, ConfigDict, TypeAdapter, ValidationError

Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
"""A whole number of at least 1."""
Whole = Annotated[int, Interval(ge=0, le=2**31 - 1)]
"""A whole number of at least 0."""
Size = Annotated[int, Interval(ge=1, le=2**20)]
"""A number of items in memory, at least 1."""
Several = Annotated[int, Interval(ge=2, le=2**20)]
"""A number of items in memory, at least 2."""
Rank = Annotated[int, Interval(ge=0, le=2**14)]
"""The rank of a matrix, 0 for none."""
Threads = Annotated[int, Interval(ge=1, le=1024)]
"""A number of threads or processes."""
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
"""A seed for PyTorch and NumPy."""
Finite = Annotated[float, AllowInfNan(False)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NonNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Rate = Annotated[float, Interval(gt=0, le=1)]
"""A learning rate, at most 1."""
Probability = Annotated[float, Interval(ge=0, le=1)]
Share = Annotated[float, Interval(ge=0, lt=1)]
"""A fraction of a whole, below 1."""
Name = Annotated[str, MinLen(1)]


def _unique(found: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(found)) < len(found):
        raise ValueError("a list that names nothing twice")
    return found


Unique = AfterValidator(_unique)
"""Annotation of a tuple whose items must differ."""
Names = Annotated[tuple[Name, ...], MinLen(1)]
Table = dict[str, Any]

T = TypeVar("T")


def field_texts(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the fields of a class, without its bases', that have a docstring below them, each with it in one line."""
    for node, behind in pairwise(ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body):  # type: ignore[attr-defined]
        match node, behind:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


# Messages for pydantic's error types; other types keep pydantic's.
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
    "value_error": "{error}",  # from validators in this package
}


class SettingError(ValueError):
    """An unknown setting or a wrong value; ``name`` is the setting's name."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class Settings:
    """Base of dataclasses that check their fields against their annotations and raise SettingError."""

    def __post_init__(self) -> None:
        """Check the fields, and convert whole floats to ints, lists to tuples, and NumPy's numbers to Python's."""
        for name, value in _checked(type(self), vars(self), f"{type(self).__name__}.{{}}").items():
            object.__setattr__(self, name, value)


def make(kind: type[T], values: Mapping[str, Any], where: str, what: str = "option") -> T:
    """Make a dataclass from a mapping.

    Args:
        where: the owner of the settings in messages, such as "ppo" or "[budget]".
        what: the noun for a setting in messages.

    Raises:
        SettingError: an unknown setting (the message suggests names), a missing one, or a value of the wrong type or
            out of range.
        ValueError: settings that contradict each other.
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
    """Check a dataclass and the dataclasses in its fields; raise SettingError for a wrong value.

    ``name`` formats a field's name for messages; with "--", "-" replaces "_".
    """
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    _checked(type(settings), values, name)
    for value in filter(is_dataclass, values.values()):
        check(value, name)


def near(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Return a hint for an unknown name: similar names; if there are none, ``otherwise`` or all known names."""
    names = sorted(known)
    folded = {n.lower(): n for n in names}
    found = [folded[n] for n in difflib.get_close_matches(str(name).lower(), folded, n=3, cutoff=0.55)]
    if found:
        return f"did you mean {' or '.join(repr(n) for n in found)}?"
    return otherwise or f"there are {', '.join(names) or 'none'}"


def one_of(value: Any, allowed: Iterable[str], where: str) -> None:
    """Raise ValueError if a value is not allowed; ``where`` is its name."""
    if value not in allowed:
        raise ValueError(f"{where} must be one of {', '.join(allowed)}, not {value!r}")


def short(value: Any, width: int = 60) -> str:
    """Return a value's ``repr`` for a message, cut to ``width`` characters."""
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
    """Convert the values of a class's fields to its annotations; dataclasses do not change."""
    return {
        name: value if is_dataclass(value) else _fit(_adapter(kind, name), value, called, name)
        for name, value in values.items()
        if name in _hints(kind)
    }


def _readings(value: Any) -> Iterator[Any]:
    """Yield a value and its other readings: TOML and JSON have no tuples, and 1e4 is a whole number."""
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
