"""A griffe extension: docstrings' Sphinx roles become links of the Markdown reference.

``:func:`~lm_envs.env.report.report``` becomes a link to that function if the reference has it, and code otherwise.
Names without a package are looked up where the docstring stands. ``.. math::`` blocks become display mathematics.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|obj):`(?P<name>[^`]+)`")
MATH = re.compile(r"^\.\. math::\n\n?(?P<body>(?:[ ]{2,}\S.*\n?|\n(?=[ ]{2,}\S))+)", flags=re.MULTILINE)
CODE = re.compile(r"(`+)(?:.+?)\1|\$\$.*?\$\$", flags=re.DOTALL)


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package once all of its modules are read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all of them."""
        self._walk(pkg, set())

    def _walk(self, obj: griffe.Object, seen: set[str]) -> None:
        if obj.path in seen:
            return
        seen.add(obj.path)
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)
        for member in obj.members.values():
            if not member.is_alias:
                self._walk(member, seen)


def as_markdown(text: str, obj: griffe.Object) -> str:
    """A docstring with its roles, mathematics and literal blocks in Markdown."""
    text = MATH.sub(lambda match: "$$\n" + " ".join(match["body"].split()) + "\n$$\n", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    parts, last = [], 0
    for code in CODE.finditer(text):
        parts += [_escaped(text[last : code.start()]), code[0]]
        last = code.end()
    text = "".join([*parts, _escaped(text[last:])])
    return ROLE.sub(lambda match: _link(match["name"], obj), text)


def _escaped(text: str) -> str:
    """Prose without what Markdown would take for HTML or a reference."""
    return text.replace("<", "&lt;").replace("][", "]\\[")


def _link(name: str, obj: griffe.Object) -> str:
    label = name.removeprefix("~").rpartition(".")[2] if name.startswith("~") else name
    target = _find(name.removeprefix("~"), obj)
    return f"[`{label}`][{target.path}]" if target is not None and _shown(target) else f"`{label}`"


def _find(name: str, obj: griffe.Object) -> griffe.Object | None:
    """The object that a name means where ``obj`` is documented."""
    scope: Any = obj
    while scope is not None:
        for path in (name, f"{scope.path}.{name}"):
            try:
                found = scope.modules_collection[path]
                return found.final_target if found.is_alias else found
            except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
                continue
        scope = scope.parent
    return None


def _shown(obj: griffe.Object | None) -> bool:
    """Whether the reference shows an object: it and all around it are public and have docstrings."""
    while obj is not None:
        if obj.name.startswith("_") or not (obj.docstring or obj.name in ("algos", "benchmarks", "kernels")):
            return False
        if obj.is_module:
            return bool(obj.docstring)
        obj = obj.parent
    return True
