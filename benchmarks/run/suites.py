"""Suites: a TOML file says what a comparison is, and this reads it strictly.

.. code-block:: toml

    name = "mine"
    tasks = ["reviews", "reviews-bandit"]         # -bandit: a whole response is one action
    algorithms = ["sft", "best-of-16", "ppo"]
    seeds = [0, 1, 2]
    compile = false                               # let torch.compile make programs that sample; docs/throughput.md

    [budget]
    episodes = 10_000                             # of training, per run; or: iterations = 80

    [evaluation]
    test_prompts = 256                            # how many; all if left out
    validation_prompts = 64
    every = 8                                     # iterations between validations, 0 for none

    [checkpoints]
    every = 20                                    # iterations

    [adaptation]                                  # of the language model; all of it is trained if left out
    lora_rank = 8                                 # also: lora_alpha, lora_targets, lora_merge, freeze_layers

    [algorithm.ppo]                               # overrides of the algorithm's settings
    learning_rate = 3e-4

    [task.reviews-bandit]
    algorithms = ["ppo"]                          # instead of the suite's
    kl_coef = 0.05                                # of the environment: kl_coef, temperature, min_new_tokens, ...
    options = {}                                  # of the task's loader

    [task.reviews-bandit.algorithm.ppo]           # overrides for this task only
    learning_rate = 1e-4
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_envs.benchmarks.errors import UserError, one_line
from lm_envs.benchmarks.run.names import base_task, check_algorithm, check_task, expanded, folder_name, is_control
from lm_envs.settings import near

BUILT_IN = Path(__file__).resolve().parents[1] / "suites"
ENV_OPTIONS = ("kl_coef", "temperature", "max_new_tokens", "min_new_tokens", "missing_eos")
ADAPTATION = ("freeze_layers", "lora_rank", "lora_alpha", "lora_targets", "lora_merge")


@dataclass(frozen=True)
class Plan:
    """How much to train, and how often to look: the same for every run of a comparison.

    Attributes:
        iterations: of every trained run; None leaves it to ``episodes`` or to the algorithm.
        episodes: training episodes of every run, rounded up to whole iterations. Not with ``iterations``.
        test_prompts: how many test prompts the final evaluation uses; None is all.
        validation_prompts: how many validation prompts a point of the learning curve uses.
        validate_every: iterations between points of the learning curve, 0 for none; fewer where a run has so few
            iterations that the curve would have less than four.
        checkpoint_every: iterations between checkpoints.
    """

    iterations: int | None = None
    episodes: int | None = None
    test_prompts: int | None = 256
    validation_prompts: int = 64
    validate_every: int = 10
    checkpoint_every: int = 20


@dataclass(frozen=True)
class TaskSettings:
    """What a suite says about one of its tasks.

    Attributes:
        name: as results call it: a registered task, one with ``-bandit`` behind it, or the id of a control environment.
        algorithms: None takes the suite's.
        env: options of the environment (:data:`ENV_OPTIONS`).
        options: of the task's loader.
        overrides: settings by algorithm, on top of the suite's.
    """

    name: str
    algorithms: tuple[str, ...] | None = None
    env: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSpec:
    """One cell of a comparison: everything that decides what its run does. In JSON's types throughout."""

    task: str
    algorithm: str
    seed: int
    plan: Plan
    env: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    adaptation: dict[str, Any] = field(default_factory=dict)
    compile: bool = False

    @property
    def label(self) -> str:
        """``task/algorithm/seed-n``, as people and folders call it."""
        return f"{folder_name(self.task)}/{self.algorithm}/seed-{self.seed}"

    @property
    def folder(self) -> str:
        """Where it lies in a comparison's folder."""
        return self.label

    def to_json(self) -> dict[str, Any]:
        """The settings as nested dictionaries; what is adapted, and compiled, only where something is."""
        found = asdict(self)
        for name in ("adaptation", "compile"):
            if not found[name]:
                del found[name]
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSpec:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "plan": Plan(**data["plan"])})


@dataclass(frozen=True)
class Suite:
    """A comparison: tasks x algorithms x seeds, how much to train, and what differs from the defaults.

    Attributes:
        adaptation: which part of the language models is trained, see
        :class:`lm_envs.algos.policies.adaptation.Adaptation`.
        compile: let the language models that are trained sample by programs, see :mod:`lm_envs.model.compiled`.
    """

    name: str
    tasks: tuple[TaskSettings, ...]
    algorithms: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    plan: Plan = Plan()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    description: str = ""
    adaptation: dict[str, Any] = field(default_factory=dict)
    compile: bool = False

    def runs(self) -> list[RunSpec]:
        """The cells: for each task all algorithms with the first seed, then with the next, so that early results say
        most.
        """
        found = []
        for task in self.tasks:
            for seed in self.seeds:
                for algorithm in task.algorithms or self.algorithms:
                    overrides = {**self.overrides.get(algorithm, {}), **task.overrides.get(algorithm, {})}
                    text = not is_control(task.name)
                    found.append(
                        RunSpec(
                            task.name,
                            algorithm,
                            seed,
                            self.plan,
                            task.env,
                            task.options,
                            overrides,
                            adaptation=self.adaptation if text else {},
                            compile=self.compile and text,
                        )
                    )
        return found

    def with_task_options(self, name: str, **options: Any) -> Suite:
        """The same with more options for the loader of the tasks called ``name`` (and of their bandit face)."""
        tasks = tuple(
            replace(task, options={**task.options, **options}) if base_task(task.name)[0] == name else task
            for task in self.tasks
        )
        return replace(self, tasks=tasks)


def check_adaptation(settings: Mapping[str, Any]) -> None:
    """Raises UserError unless these make an :class:`~lm_envs.algos.policies.adaptation.Adaptation` that can be carried
    out."""
    if not settings:
        return
    from lm_envs.algos.policies.adaptation import Adaptation

    try:
        adaptation = Adaptation(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"adaptation: {error}") from error
    if adaptation.lora_rank and find_spec("peft") is None:
        raise UserError("lora_rank needs peft: pip install 'lm-envs[lora]'")


def load_suite(name_or_path: str | Path) -> Suite:
    """Read a suite: the path of a TOML file, or the name of a built-in one ("demo").

    Raises:
        UserError: no such file, malformed TOML, an unknown key or a value of the wrong type; with file and line.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and (BUILT_IN / f"{path}.toml").is_file():
        path = BUILT_IN / f"{path}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        known = [file.stem for file in BUILT_IN.glob("*.toml")]
        raise UserError(
            f"no suite {str(name_or_path)!r}: give a TOML file, or a built-in one: {near(str(path), known)}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a suite is UTF-8 text, and this is not ({error.reason})") from error
    return parse_suite(text, path)


def parse_suite(text: str, path: Path | str) -> Suite:
    """Read a suite from TOML text; ``path`` is for messages and for the default name. Raises as :func:`load_suite`."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        at_end = text.count("\n") + 1
        message = re.sub(r" \(at .*\)$", "", str(error))
        raise UserError(one_line(path, int(line.group(1)) if line else at_end, f"not TOML: {message}")) from error
    return _Reader(text, path).suite(data)


class _Reader:
    """Turns parsed TOML into a suite and remembers where complaints have to point."""

    def __init__(self, text: str, path: Path | str) -> None:
        self.lines, self.path = text.split("\n"), path

    def fail(self, key: str, what: str) -> UserError:
        where = re.compile(rf"(^|[\[.{{,]\s*)[\"']?{re.escape(key)}[\"']?\s*(=|\]|\.)")
        line = next((i for i, content in enumerate(self.lines, 1) if where.search(content.strip())), None)
        return UserError(one_line(self.path, line, what))

    def keys(self, table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
        for key in table:
            if key not in (known := tuple(known)):
                raise self.fail(key, f"unknown key {key!r} in {where}: {near(key, known)}")

    def table(self, data: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = data.get(key, {})
        if not isinstance(value, dict):
            raise self.fail(key, f"{key!r} must be a table, [{key}], not {value!r}")
        return value

    def tables(self, data: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
        return {name: self.table(self.table(data, key), name) for name in self.table(data, key)}

    def names(self, data: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
        value = data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.fail(key, f"{key!r} must be a list of at least one string, not {value!r}")
        return self.unique(key, value)

    def unique(self, key: str, value: Sequence[Any]) -> tuple[Any, ...]:
        twice = [item for i, item in enumerate(value) if item in value[:i]]
        if twice:
            raise self.fail(key, f"{key!r} names {twice[0]!r} twice")
        return tuple(value)

    def integer(self, table: Mapping[str, Any], key: str, default: Any, least: int) -> Any:
        value = table.get(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(key, f"{key!r} must be a whole number of at least {least}, not {value!r}")
        return value

    def string(self, data: Mapping[str, Any], key: str, default: str) -> str:
        value = data.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"{key!r} must be a string, not {value!r}")
        return value

    def plan(self, data: Mapping[str, Any]) -> Plan:
        budget, evaluation = self.table(data, "budget"), self.table(data, "evaluation")
        checkpoints = self.table(data, "checkpoints")
        self.keys(budget, ("iterations", "episodes"), "[budget]")
        self.keys(evaluation, ("test_prompts", "validation_prompts", "every"), "[evaluation]")
        self.keys(checkpoints, ("every",), "[checkpoints]")
        if len(budget) > 1:
            raise self.fail("budget", "[budget] takes iterations or episodes, not both")
        return Plan(
            iterations=self.integer(budget, "iterations", None, 1),
            episodes=self.integer(budget, "episodes", None, 1),
            test_prompts=self.integer(evaluation, "test_prompts", Plan.test_prompts, 2),
            validation_prompts=self.integer(evaluation, "validation_prompts", Plan.validation_prompts, 2),
            validate_every=self.integer(evaluation, "every", Plan.validate_every, 0),
            checkpoint_every=self.integer(checkpoints, "every", Plan.checkpoint_every, 1),
        )

    def task(self, name: str, table: Mapping[str, Any]) -> TaskSettings:
        self.keys(table, ("algorithms", "options", "algorithm", *ENV_OPTIONS), f"[task.{name}]")
        return TaskSettings(
            name=name,
            algorithms=self.names(table, "algorithms"),
            env={key: table[key] for key in ENV_OPTIONS if key in table},
            options=self.table(table, "options"),
            overrides=self.tables(table, "algorithm"),
        )

    def adaptation(self, data: Mapping[str, Any]) -> dict[str, Any]:
        table = self.table(data, "adaptation")
        self.keys(table, ADAPTATION, "[adaptation]")
        try:
            check_adaptation(table)
        except UserError as error:
            raise self.fail("adaptation", str(error)) from error
        return table

    def suite(self, data: Mapping[str, Any]) -> Suite:
        top = (
            "name",
            "description",
            "tasks",
            "algorithms",
            "seeds",
            "compile",
            "budget",
            "evaluation",
            "checkpoints",
            "adaptation",
            "algorithm",
            "task",
        )
        self.keys(data, top, "a suite")
        tasks, algorithms = self.names(data, "tasks"), self.names(data, "algorithms")
        for key, value in (("tasks", tasks), ("algorithms", algorithms)):
            if value is None:
                raise UserError(f"{self.path}: a suite needs {key!r}, a list of names")
        assert tasks is not None and algorithms is not None
        seeds = data.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise self.fail("seeds", f"'seeds' must be a list of whole numbers of at least 0, not {seeds!r}")
        if not isinstance(data.get("compile", False), bool):
            raise self.fail("compile", f"'compile' must be true or false, not {data['compile']!r}")
        settings, overrides = self.tables(data, "task"), self.tables(data, "algorithm")
        for name in settings:
            if name not in tasks:
                raise self.fail(name, f"[task.{name}] is about no task of this suite: {near(name, tasks)}")
        suite = Suite(
            name=self.string(data, "name", Path(self.path).stem),
            description=self.string(data, "description", ""),
            tasks=tuple(self.task(name, settings.get(name, {})) for name in tasks),
            algorithms=expanded(algorithms),
            seeds=self.unique("seeds", seeds),
            plan=self.plan(data),
            overrides=overrides,
            adaptation=self.adaptation(data),
            compile=data.get("compile", False),
        )
        used = {run.algorithm for run in suite.runs()}
        for name in [*overrides, *(name for task in suite.tasks for name in task.overrides)]:
            if name not in used:
                raise self.fail(name, f"settings for {name!r}, which this suite does not run: {near(name, used)}")
        return self.checked(suite)

    def checked(self, suite: Suite) -> Suite:
        for name, check in [
            *((task.name, check_task) for task in suite.tasks),
            *((run.algorithm, check_algorithm) for run in suite.runs()),
        ]:
            try:
                check(name)
            except UserError as error:
                raise UserError(one_line(self.path, self.line_naming(name), str(error))) from error
        return suite

    def line_naming(self, name: str) -> int | None:
        """The line where a quoted name stands."""
        return next((i for i, line in enumerate(self.lines, 1) if f'"{name}"' in line or f"'{name}'" in line), None)
