"""Equal tuning: every trained method of a suite gets the same number of trials, which are measured on validation
prompts; then the suite runs once, with the best settings, on the test prompts.

A trial is a comparison of its own, ``OUT/trials/trial-007``, of all methods, each with settings that its own sampler
suggested: the tree-structured Parzen estimator (Bergstra et al. 2011) of Optuna, seeded, so that a tuning that was
stopped suggests the same again. Trial 0 has the suite's own settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lm_envs.algos.registry import make_config
from lm_envs.benchmarks.errors import RunsFailed, UserError
from lm_envs.benchmarks.run.aggregate import measure_of
from lm_envs.benchmarks.run.compare import check_runs, compare, prepare, tell_left_out, write_results
from lm_envs.benchmarks.run.names import is_untrained
from lm_envs.benchmarks.run.results import number, written
from lm_envs.benchmarks.run.silence import Silence
from lm_envs.benchmarks.run.storage import write_lines
from lm_envs.benchmarks.run.suites import Range, RunSpec, Space, Suite

Key = tuple[str, str]  # a task and an algorithm
_COLUMNS = ("task", "algorithm", "trial", "seeds", "measure", "value", "kl", "collapsed", "best", "settings")
_CHOICES: dict[str, tuple[float, ...]] = {"epochs": (1, 2, 4), "clip": (0.1, 0.2, 0.3), "lam": (0.9, 0.95, 1.0)}
_FACTOR = 10.0  # of learning_rate and beta, to both sides


def default_space(algorithm: str, overrides: Mapping[str, Any]) -> Space:
    """Return what is tried of an algorithm's settings if a suite does not say: the learning rate and DPO's ``beta``
    over two decades; three usual values of ``clip``, ``lam``, and ``epochs`` where the algorithm makes several. The KL
    coefficient is part of the objective, and is tuned only if a suite asks for it."""
    config = make_config(algorithm, **overrides)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    found: Space = {}
    for name in ("learning_rate", "beta"):
        if isinstance(value := values.get(name), float) and value > 0:
            most = 1.0 if name == "learning_rate" else math.inf
            found[name] = Range(value / _FACTOR, min(value * _FACTOR, most), log=True)
    for name, choices in _CHOICES.items():
        if (value := values.get(name)) is not None and (name, value) != ("epochs", 1):
            found[name] = tuple(sorted({*choices, value}))
    return found


def tune(suite: Suite, out: Path, *, trials: int, seeds: int, resume: bool = False, **options: Any) -> Suite:
    """Tune the methods of a suite in ``out / "trials"``, or the rest of it; return the suite with the best settings.

    ``trials.csv`` lists all trials: the mean of the judge's scores on validation prompts (of the proxy's without a
    judge), over the seeds of a trial, none of which is the suite's. A trial in which a run failed has no value, and one
    in which a policy collapsed is not chosen.

    Args:
        trials: per method.
        seeds: training seeds of a trial.
        options: those of :func:`~lm_envs.benchmarks.run.compare.compare`.

    Raises:
        UserError: Optuna is not installed, nothing of the suite is trained, or ``out`` holds another tuning.
    """
    if find_spec("optuna") is None:
        raise UserError("tune needs Optuna: pip install 'lm-envs[tune]'")
    runs = _tuned(suite)
    if not runs:
        raise UserError(f"nothing to tune: {', '.join(suite.algorithms)} are not trained")
    folders = [out / "trials" / f"trial-{number:03d}" for number in range(trials)]
    if not resume and folders[0].exists():
        raise UserError(f"{out} holds a tuning already: --resume continues it, another --out starts a new one")
    first = max(suite.seeds) + 1
    plan = replace(suite.plan, split="validation")
    tried = replace(suite, seeds=tuple(range(first, first + seeds)), plan=plan, keep=0, match_kl=(), task_seeds=1)
    tried = replace(tried, description="")
    check_runs(runs)
    console = options.get("console") or Console(stderr=True)
    with Silence(partial(console.print, highlight=False, markup=False), "opening each task and model"):
        unsuited = prepare(suite, runs)  # once, not in each trial
    tell_left_out(unsuited, console)
    studies = [_Study(run, suite.tune.get(run.algorithm)) for run in runs if (run.task, run.algorithm) not in unsuited]
    for trial, folder in enumerate(folders):
        named = replace(tried, name=f"trial {trial + 1} of {trials}")
        asked = {study.key: study.ask() for study in studies}
        try:
            rows = compare(_with(named, asked, only=True), folder, resume=folder.exists(), prepared=True, **options)
        except RunsFailed:
            rows = write_results(folder)
        for study in studies:
            mine = [row for row in rows if (row["task"], row["algorithm"]) == study.key]
            study.tell(mine if len(mine) == seeds else [])
        lines = [line for study in studies for line in study.lines(seeds)]
        write_lines(out / "trials.csv", lines, _COLUMNS)
    best = {study.key: study.best() for study in studies}
    found = "; ".join(f"{algorithm} {_text(settings)}" for (_, algorithm), settings in best.items())
    told = f"{suite.description} Tuned on validation prompts, {trials} trials a method: {found}."
    return replace(_with(suite, best), description=told.strip())


def _tuned(suite: Suite) -> list[RunSpec]:
    """A run of each method that is trained."""
    runs = {(run.task, run.algorithm): run for run in suite.runs()}
    return [run for run in runs.values() if not is_untrained(run.algorithm)]


def _with(suite: Suite, settings: Mapping[Key, dict[str, Any]], only: bool = False) -> Suite:
    """The suite with other settings of its methods; ``only`` leaves out methods without."""
    tasks = []
    for task in suite.tasks:
        mine = {name: values for (where, name), values in settings.items() if where == task.name}
        overrides = {name: {**task.overrides.get(name, {}), **values} for name, values in mine.items()}
        kept = tuple(name for name in task.algorithms or suite.algorithms if name in mine or not only)
        tasks += [replace(task, algorithms=kept, overrides={**task.overrides, **overrides})] if kept else []
    return replace(suite, tasks=tuple(tasks))


def _text(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={written(value)}" for name, value in settings.items())


class _Study:
    """The trials of one method on one task."""

    def __init__(self, run: RunSpec, space: Space | None) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.key = run.task, run.algorithm
        self.space = default_space(run.algorithm, run.overrides) if space is None else space
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
        config = make_config(run.algorithm, **run.overrides)
        start = {name: getattr(config, name) for name in self.space}
        self._study.enqueue_trial({name: value for name, value in start.items() if _holds(self.space[name], value)})
        self._asked: Any = None
        self._settings: dict[str, Any] = {}
        self._told: list[dict[str, Any]] = []

    def ask(self) -> dict[str, Any]:
        """Return the settings of the next trial, at first those of the suite."""
        self._asked = self._study.ask()
        self._settings = {name: self._suggest(name, part) for name, part in self.space.items()}
        return self._settings

    def _suggest(self, name: str, part: Range | tuple[Any, ...]) -> Any:
        if not isinstance(part, Range):
            return self._asked.suggest_categorical(name, part)
        if isinstance(part.low, int) and isinstance(part.high, int):
            return self._asked.suggest_int(name, part.low, part.high, log=part.log)
        return float(f"{self._asked.suggest_float(name, part.low, part.high, log=part.log):.4g}")

    def tell(self, rows: Sequence[dict[str, Any]]) -> None:
        """Record the results of the trial's seeds; of none if one failed."""
        import optuna

        measure = measure_of(rows) if rows else ""
        means = {name: float(np.mean([number(row[name]) for row in rows])) for name in (measure, "kl") if rows}
        value = means.get(measure, math.nan)
        fallen = any(row.get("collapsed") for row in rows)  # its score may be the highest of all
        state = optuna.trial.TrialState.FAIL if fallen or math.isnan(value) else optuna.trial.TrialState.COMPLETE
        self._study.tell(self._asked, value if state == optuna.trial.TrialState.COMPLETE else None, state=state)
        told = {"measure": measure, "value": value, "kl": means.get("kl", math.nan), "set": self._settings}
        self._told.append(told | {"collapsed": fallen})

    def _best(self) -> int | None:
        known = [i for i, told in enumerate(self._told) if not (told["collapsed"] or math.isnan(told["value"]))]
        return max(known, key=lambda i: (self._told[i]["value"], -i), default=None)

    def best(self) -> dict[str, Any]:
        """Return the settings of the best trial; UserError if all failed."""
        if (best := self._best()) is None:
            task, algorithm = self.key
            raise UserError(
                f"all {len(self._told)} trials of {algorithm} on {task} failed or collapsed: see their log.txt"
            )
        settings: dict[str, Any] = self._told[best]["set"]
        return settings

    def lines(self, seeds: int) -> Iterator[dict[str, Any]]:
        """Yield the lines of ``trials.csv``."""
        task, algorithm = self.key
        for trial, told in enumerate(self._told):
            line = {"task": task, "algorithm": algorithm, "trial": trial, "seeds": seeds, "measure": told["measure"]}
            numbers = {name: written(told[name]) for name in ("value", "kl")}
            line |= numbers | {"collapsed": int(told["collapsed"])}
            yield line | {"best": int(trial == self._best()), "settings": _text(told["set"])}


def _holds(part: Range | tuple[Any, ...], value: Any) -> bool:
    return value is not None and part.low <= value <= part.high if isinstance(part, Range) else value in part
