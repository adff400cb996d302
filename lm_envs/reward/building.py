"""Rewards made from the text form that :mod:`lm_envs.reward.specs` parses."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from lm_envs.model.loading import HOST, Placement
from lm_envs.printable import one_line
from lm_envs.reward.base import AnyReward, Clip, Conversational, WeightedSum
from lm_envs.reward.judge import load_judge, make_judge
from lm_envs.reward.learned import load_reward_model
from lm_envs.reward.metrics import make_metric
from lm_envs.reward.specs import Source, Spec
from lm_envs.reward.units import Samples, in_units_of, standardised
from lm_envs.settings import near

__all__ = ["build_reward"]


def build_reward(
    spec: Spec,
    *,
    samples: Callable[[], Samples] | None = None,
    batch_size: int = 64,
    conversational: bool = False,
    what: str = "reward model",
    placement: Placement = HOST,
) -> AnyReward:
    """Load a reward's models, run its files, and compose it.

    Args:
        spec: from :func:`~lm_envs.reward.specs.parse_reward`.
        samples: makes samples of the reference, for ``standardise`` without numbers; called at most once.
        batch_size: texts per forward of a learned model.
        conversational: prompts are chat messages, which the user's functions receive as from TRL.
        what: a learned model's name in messages.
        placement: device and precision of learned models.

    Raises:
        ImportError: a metric's library is not installed.
        ValueError: a model cannot be loaded, a file fails or has no such function, a setting does not exist, or a
            standardized part gives every sample the same score.
    """
    make_samples = None if samples is None else functools.cache(samples)

    def build(spec: Spec) -> AnyReward:
        if isinstance(spec, Source):
            return source(spec)
        parts = [build(part) for part in spec.parts]
        reward = parts[0]
        if spec.how == "sum":
            return WeightedSum(list(zip(spec.numbers, parts, strict=True)))
        if spec.how == "clip":
            return Clip(reward, *spec.numbers)
        if spec.how == "chat":
            return reward if isinstance(reward, Conversational) else Conversational(reward)
        if spec.numbers:
            return standardised(reward, *spec.numbers)
        if make_samples is None:
            raise ValueError("standardise needs mean and std here: there are no samples of a reference to take them of")
        return in_units_of(reward, make_samples())

    def source(spec: Source) -> AnyReward:
        if spec.kind == "metric":
            return make_metric(spec.place, **spec.settings)
        if spec.kind == "judge":
            return make_judge(spec.place, spec.name, **spec.settings) if spec.name else load_judge(spec.place)
        if spec.kind == "model":
            if wrong := [name for name in spec.settings if name not in ("label", "output", "template", "batch_size")]:
                raise ValueError(f"reward model:{spec.place} takes label, output and template, not {', '.join(wrong)}")
            return load_reward_model(spec.place, what, placement, **{"batch_size": batch_size, **spec.settings})
        found = _function(spec, f"reward {spec.place}:{spec.name}")
        return Conversational(found) if conversational else found

    return build(spec)


def _function(spec: Source, where: str) -> AnyReward:
    module = _run_file(Path(spec.place).expanduser()) if spec.kind == "file" else _import(spec.place, where)
    found = getattr(module, spec.name, None)
    if not callable(found):
        callables = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        state = "is not callable" if hasattr(module, spec.name) else "does not exist"
        raise ValueError(f"{where}: that name {state}: {near(spec.name, callables)}")
    if isinstance(found, type):
        try:
            found = found(**spec.settings)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{where}: the class cannot be made: {_told(error)}") from error
        if not callable(found):
            raise ValueError(f"{where}: the class has no method __call__, which scores completions")
    elif spec.settings:
        try:
            inspect.signature(found).bind_partial(**spec.settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: its settings: {_told(error)}") from error
        found = functools.partial(found, **spec.settings)
    return found


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (name + ".").startswith(error.name + "."):
            raise ValueError(
                f"{where}: there is no module {error.name!r} on the import path (PYTHONPATH adds folders)"
            ) from None
        raise ValueError(f"{where}: the module cannot be imported: {_told(error)}") from error


def _told(error: BaseException, file: str | None = None) -> str:
    """Return one line with the error of the user's code and its place."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if file in (None, frame.filename)]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    place = f"{frames[-1].filename if file is None else file}, line {line}: " if line else f"{file}: " if file else ""
    what = "it calls sys.exit" if isinstance(error, SystemExit) else type(error).__name__
    return place + one_line(f"{what}: {error}", 1000)


def _run_file(path: Path) -> ModuleType:
    """Import a Python file, with its folder on the import path as for a script."""
    path = path.absolute()
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]  # a file that changed runs again
    name = f"lm_envs_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward file {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(_told(error, str(path))) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have removed it
            sys.path.remove(str(path.parent))
    return module
