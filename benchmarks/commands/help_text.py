"""Help as a terminal shows it: each field's docstring as one paragraph, and examples as they are written."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
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
            join_lines(command)
            text = text.replace("\n\n  ", "\n  ")  # tyro would set two empty lines before the examples
        else:
            text = " ".join(text.partition("\n\n")[0].split())
        made.append(Annotated[Any, tyro.conf.subcommand(name, constructor=command, description=text)])
    return typing.Union[tuple(made)]  # noqa: UP007


def join_lines(command: type[Any]) -> None:
    """Let tyro show each field's docstring as one paragraph, also those of the dataclasses that are its fields."""
    hints = typing.get_type_hints(command, include_extras=True)
    for owner in command.__mro__:
        docs = _docstrings(owner) if is_dataclass(owner) else {}
        for name, text in docs.items():
            joined = tyro.conf.arg(help=" ".join(text.split()), help_behavior_hint=_hint)
            owner.__annotations__[name] = Annotated[hints[name], joined]
    for hint in hints.values():
        for inner in _dataclasses(hint):
            join_lines(inner)


def _dataclasses(hint: Any) -> list[type[Any]]:
    if is_dataclass(hint):
        return [hint] if isinstance(hint, type) else []
    return [found for part in typing.get_args(hint) for found in _dataclasses(part)]


def _docstrings(command: type[Any]) -> dict[str, str]:
    """The string behind each field of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(command))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, behind in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(behind, ast.Expr):
            value = getattr(behind.value, "value", None)
            if isinstance(value, str):
                found[node.target.id] = value
    return found


def _hint(default: str) -> str:
    """What stands behind an option's help: nothing where leaving it out is no value."""
    return "" if default in ("None", "", "False") else f"(default: {default})"
