"""What the numbers of a run depend on: versions, and hashes of the files that it reads, which are models, data, and the
code of rewards and tasks."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_envs
from lm_envs.algos.registry import ALGORITHMS
from lm_envs.benchmarks.run.names import base_task, saved
from lm_envs.data import sources
from lm_envs.files import code_hash, sha256
from lm_envs.model.adapters import base_of, is_adapter
from lm_envs.model.gguf import gguf_file
from lm_envs.model.hub import commit_of
from lm_envs.plugins import place_of
from lm_envs.reward.specs import Source, Spec, is_spec, parse_reward
from lm_envs.tasks import TASKS, parts_of

if TYPE_CHECKING:
    from lm_envs.benchmarks.run.data_problem import DataSpec
    from lm_envs.benchmarks.run.suites import RunSpec

_OF_MODELS = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that numbers depend on; for this package with a hash of its files."""
    beside = [import_module(f"{lm_envs.__name__}.{name}") for name in ("kernels", "algos", "benchmarks")]
    folders = [Path(path) for module in (lm_envs, *beside) for path in module.__path__]
    ours = sorted({file for folder in folders for file in folder.rglob("*.py")})
    found = {"python": platform.python_version(), "lm-envs": f"{lm_envs.__version__} ({code_hash(ours)})"}
    for name in ("torch", "transformers", "gymnasium", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # installed in a way that left no metadata
            found[name] = "unknown"
    return found


def flat(value: Any, where: str = "") -> dict[str, str]:
    """Settings as text by their place, so that two NaN are the same, and so are two roundings."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{where}.{key}" if where else str(key)).items()}
    return {where: f"{value:.6g}" if isinstance(value, float) else repr(value)}


def fingerprints(spec: RunSpec | DataSpec) -> dict[str, str]:
    """Return a hash of each input of a run, by its name in messages: of the bytes of files, of the commit of models and
    data on the hub. Unknown ones, such as a hub name without a network, are left out."""
    settings = spec.to_json()
    options = settings.get("options") or {name: settings[name] for name in ("model", "data") if name in settings}
    if "options" in settings:
        task, first, given = parts_of(base_task(spec.task)[0])
        options = {**given, **options, "argument": first, "task": task, "algorithm": spec.algorithm}
    found: dict[str, str | None] = {}
    for name, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                found |= {f"{name} {place!r}": hashed(place) for place, hashed in _places(name, text)}
    return {name: known for name, known in sorted(found.items()) if known is not None}


def _places(name: str, text: str) -> Iterator[tuple[str, Callable[[str], str | None]]]:
    """The files and folders that an option names, and the function that hashes each."""
    if name in ("reward", "judge") and is_spec(text):
        kinds = {"model": _model, "judge": _file, "function": _module}
        yield from ((part.place, kinds[part.kind]) for part in sources_of(parse_reward(text)) if part.kind in kinds)
    elif name == "algorithm" and (place := saved(text)) is not None:
        yield place, _model
    elif name in ("task", "algorithm"):
        yield place_of(text, name, TASKS if name == "task" else ALGORITHMS), _module
    elif name in ("model", "policy", "reference", "reward_model", "judge"):
        if (name, text) != ("reference", "base"):  # the model under adapters, which is hashed with them
            yield text, _model
    else:
        yield text, _rows if name in ("data", "prompts") or (name == "path" and os.path.isdir(text)) else _file


def sources_of(spec: Spec) -> Iterator[Source]:
    """Yield the single rewards of a reward."""
    if isinstance(spec, Source):
        yield spec
    else:
        for part in spec.parts:
            yield from sources_of(part)


def _model(place: str) -> str | None:
    """Hash weights, config and tokenizer; for adapters also those of their base."""
    if (file := gguf_file(place, "model")) is not None:
        return _file(file)
    folder = Path(os.path.expanduser(place))
    if not os.path.isdir(folder):
        return commit_of(place)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _OF_MODELS and path.is_file():
            digest.update(f"{path.name} {_file(path)} ".encode())
    if is_adapter(folder):
        digest.update(str(_model(base_of(folder))).encode())
    return digest.hexdigest()


def _rows(place: str) -> str | None:
    try:
        return sources.fingerprint(place)
    except ConnectionError:
        return None


def _module(name: str) -> str | None:
    """Hash a Python file or a module; None where there is none, or it is in this package, whose hash is a version."""
    if name.startswith("lm_envs."):
        return None
    if name.endswith(".py"):
        return _file(name)
    try:
        found = find_spec(name) if name else None
    except (ImportError, ValueError):
        return None
    return None if found is None or found.origin is None else _file(found.origin)


def _file(place: str | Path) -> str | None:
    path = os.path.abspath(os.path.expanduser(place))
    if not os.path.isfile(path):
        return None
    about = os.stat(path)
    return _hash_once(path, about.st_size, about.st_mtime_ns, about.st_ino)


@functools.cache
def _hash_once(path: str, *about: Any) -> str:
    """Hash a large file once in a process, as long as its size, time and number stay the same."""
    return sha256(Path(path))
