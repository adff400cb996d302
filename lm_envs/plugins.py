"""What others plug in: the object that a text names.

A text is ``FILE.py:NAME`` (relative to the working folder; the file is run), ``package.module:NAME``, or the name of an
entry point of an installed package in the group ``lm_envs.algorithms``, ``lm_envs.tasks`` or ``lm_envs.rewards``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from lm_envs.printable import one_line
from lm_envs.settings import near

TEXT = re.compile(r"(?P<place>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")
USER = "lm_envs_user_"
"""The names of modules made from files begin with it."""
_NONE: Mapping[str, Any] = MappingProxyType({})


@functools.cache
def installed(what: str) -> dict[str, str]:
    """Return the entry points of installed packages, as ``module:NAME`` by name; ``what`` is "algorithm", "task" or
    "reward"."""
    return {point.name: f"{point.module}:{point.attr}" for point in entry_points(group=f"lm_envs.{what}s")}


def place_of(text: str, what: str, known: Mapping[str, Any] = _NONE) -> str:
    """Return the file or module that holds what a text names, "" if the text names nothing."""
    target = known.get(text) or installed(what).get(text, text)
    return target.rpartition(":")[0] if isinstance(target, str) else str(getattr(target, "__module__", ""))


def find(
    text: str,
    what: str,
    known: Mapping[str, Any] = _NONE,
    fits: Callable[[Any], bool] = callable,
    kind: str = "callable",
) -> Any:
    """Return the object that a text names.

    Args:
        what: "algorithm", "task" or "reward".
        known: this package's own, by name: texts, or the objects themselves.
        fits: whether an object is of the right kind.
        kind: that kind in words.

    Raises:
        ValueError: there is no such name, file or module, its code fails, or the object is of another kind.
    """
    target, where = known.get(text) or installed(what).get(text, text), f"{what} {text}"
    if not isinstance(target, str):
        return target
    match = TEXT.fullmatch(target)
    if match is None:
        if target.endswith(".py") and Path(target).expanduser().is_file():
            raise ValueError(f"no {what} {text!r}: say which of the file's names is meant, as in {text}:NAME")
        hint = near(text, [*known, *installed(what)])
        raise ValueError(f"no {what} {text!r}: {hint} (one of your own is FILE.py:NAME or module:NAME)")
    module = _run_file(match["place"], where) if match["place"].endswith(".py") else _import(match["place"], where)
    found = getattr(module, match["name"], None)
    if not fits(found):
        state = f"is not {kind}" if hasattr(module, match["name"]) else "does not exist"
        others = [name for name, value in vars(module).items() if fits(value) and not name.startswith("_")]
        raise ValueError(f"{where}: that name {state}: {near(match['name'], others)}")
    return found


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (name + ".").startswith(error.name + "."):
            file = name.replace(".", "/") + ".py"
            hint = f"; a file is named {file}:NAME" if Path(file).is_file() else ""
            raise ValueError(
                f"{where}: there is no module {error.name!r} on the import path (PYTHONPATH adds folders){hint}"
            ) from None
        raise ValueError(f"{where}: the module cannot be imported: {told(error)}") from error


def told(error: BaseException, file: str | None = None) -> str:
    """Return one line with the error of a user's code and its place, the last in ``file`` if given."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if file in (None, frame.filename)]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    place = f"{frames[-1].filename if file is None else file}, line {line}: " if line else f"{file}: " if file else ""
    what = "it calls sys.exit" if isinstance(error, SystemExit) else type(error).__name__
    return place + one_line(f"{what}: {error}", 1000)


def _run_file(place: str, where: str) -> ModuleType:
    """Import a Python file, with its folder on the import path as for a script; a file that changed runs again."""
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        hint = near(path.name, [file.name for file in path.parent.glob("*.py")], f"looked in {path.parent}")
        raise ValueError(f"{where}: there is no file {place!r}: {hint}")
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"{USER}{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # its name ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(told(error, str(path))) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have removed it
            sys.path.remove(str(path.parent))
    return module
