"""Help as a terminal shows it: tyro breaks an indented docstring's lines where the source does, and shows "None" for
what may be left out."""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from itertools import pairwise
from typing import Annotated, Any

import tyro


def subcommands(commands: Mapping[str, type[Any]], words: Sequence[str]) -> Any:
    """A union of commands for :func:`tyro.cli`: in the list of all each has one sentence, by itself its whole text.

    Args:
        commands: dataclasses by name.
        words: of the command line; the first says which is asked for.
    """
    made = []
    for name, command in commands.items():
        text = inspect.getdoc(command) or ""
        if words[:1] == [name]:
            _join_lines(command)
            text = text.replace("\n\n  ", "\n  ")  # tyro would set two empty lines before the examples
        else:
            text = " ".join(text.partition("\n\n")[0].split())
        made.append(Annotated[command, tyro.conf.subcommand(name, description=text)])
    return typing.Union[tuple(made)]  # noqa: UP007


def _join_lines(command: type[Any]) -> None:
    """Make each field's docstring one paragraph, also in the dataclasses that are its fields."""
    hints = typing.get_type_hints(command, include_extras=True)
    for owner in filter(is_dataclass, command.__mro__):
        for node, behind in pairwise(ast.parse(inspect.getsource(owner)).body[0].body):  # type: ignore[attr-defined]
            match node, behind:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    shown = tyro.conf.arg(help=" ".join(text.split()), help_behavior_hint=_hint)
                    owner.__annotations__[name] = Annotated[hints[name], shown]
    for inner in _dataclasses(*hints.values()):
        _join_lines(inner)


def _dataclasses(*hints: Any) -> list[type[Any]]:
    """Those that types are made of, however deep."""
    found: list[type[Any]] = []
    for hint in hints:
        is_class = isinstance(hint, type) and is_dataclass(hint)
        found += [hint] if is_class else _dataclasses(*typing.get_args(hint))
    return found


def _hint(default: str) -> str:
    """What stands behind an option's help: nothing where leaving it out is no value."""
    return "" if default in ("None", "", "False") else f"(default: {default})"
