"""Strict reading of suites from TOML; docs/getting_started.md lists all keys."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import MinLen

from lm_envs.benchmarks.errors import UserError, one_line
from lm_envs.benchmarks.run.names import ALL, check_algorithm, check_task, expanded
from lm_envs.benchmarks.run.stop_rules import parse_rule
from lm_envs.benchmarks.run.suites import (
    EnvOptions,
    Guards,
    Plan,
    Range,
    Resources,
    Space,
    Suite,
    TaskSettings,
    check_adaptation,
    check_overrides,
    env_options,
)
from lm_envs.files import read_text
from lm_envs.settings import (
    Count,
    Name,
    Positive,
    Seed,
    SettingError,
    Settings,
    Several,
    Size,
    Table,
    Unique,
    Whole,
    make,
    near,
)

BUILT_IN = Path(__file__).resolve().parents[1] / "suites"
_LARGEST = 2**20  # bytes of a suite
Names = Annotated[tuple[Name, ...], MinLen(1), Unique]
T = TypeVar("T")


def load_suite(name_or_path: str | Path) -> Suite:
    """Read a suite: the path of a TOML file, or the name of a built-in one ("demo"). Raise UserError, with file and
    line, for malformed TOML, an unknown key or a value of the wrong type."""
    path = Path(name_or_path)
    if path.suffix != ".toml" and (BUILT_IN / f"{path}.toml").is_file():
        path = BUILT_IN / f"{path}.toml"
    if not path.is_file():
        known = near(str(path), [file.stem for file in BUILT_IN.glob("*.toml")])
        raise UserError(f"no suite {str(name_or_path)!r}: give a TOML file, or a built-in one: {known}")
    if path.stat().st_size > _LARGEST:
        raise UserError(f"{path}: a suite has at most {_LARGEST:,} bytes, and this has {path.stat().st_size:,}")
    return parse_suite(read_text(path), path)


def parse_suite(text: str, path: Path | str) -> Suite:
    """Read a suite from TOML text; ``path`` is for messages and for the default name. Raises as :func:`load_suite`."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also thousands of digits, brackets thousands deep
        line = re.search(r"at line (\d+)", str(error))
        at_end = text.count("\n") + 1 if isinstance(error, tomllib.TOMLDecodeError) else None
        message = re.sub(r" \(at .*\)$", "", str(error))
        raise UserError(one_line(path, int(line.group(1)) if line else at_end, f"not TOML: {message}")) from error
    return _Reader(text, path).suite(data)


@dataclass(frozen=True)
class _Suite(Settings):
    """The keys of a suite's file."""

    tasks: Names
    algorithms: Names
    name: Name | None = None
    description: str = ""
    seeds: Annotated[tuple[Seed, ...], MinLen(1), Unique] = (0,)
    compile: bool = False
    stop: tuple[Name, ...] = ()
    task_seeds: Count = Suite.task_seeds
    budget: Table = field(default_factory=dict)
    evaluation: Table = field(default_factory=dict)
    checkpoints: Table = field(default_factory=dict)
    match: Table = field(default_factory=dict)
    resources: Table = field(default_factory=dict)
    guards: Table = field(default_factory=dict)
    adaptation: Table = field(default_factory=dict)
    algorithm: dict[str, Table] = field(default_factory=dict)
    tune: dict[str, dict[str, list[Any] | Table]] = field(default_factory=dict)
    task: dict[str, Table] = field(default_factory=dict)


@dataclass(frozen=True)
class _Budget(Settings):
    iterations: Count | None = None
    episodes: Count | None = None
    tokens: Count | None = None
    total_tokens: Count | None = None
    reward_calls: Count | None = None
    flops: Positive | None = None
    seconds: Positive | None = None


@dataclass(frozen=True)
class _Evaluation(Settings):
    test_prompts: Several | None = Plan.test_prompts
    validation_prompts: Size = Plan.validation_prompts
    every: Whole = Plan.validate_every


@dataclass(frozen=True)
class _Checkpoints(Settings):
    every: Count = Plan.checkpoint_every
    keep: Whole = Suite.keep


@dataclass(frozen=True)
class _Match(Settings):
    kl: Annotated[tuple[Positive, ...], Unique] = ()


@dataclass(frozen=True)
class _Task(EnvOptions):
    algorithms: Names | None = None
    options: Table = field(default_factory=dict)
    algorithm: dict[str, Table] = field(default_factory=dict)


_ENV = {option.name for option in fields(EnvOptions)}


class _Reader:
    """Turns parsed TOML into a suite; its errors point to a line."""

    def __init__(self, text: str, path: Path | str) -> None:
        self.lines, self.path = text.split("\n"), path

    def fail(self, what: str, key: str, table: str = "") -> UserError:
        """Make an error at the line of a key, searched behind the header of its table if there is one."""
        where = re.compile(rf"(^|[\[.{{,]\s*)[\"']?{re.escape(key)}[\"']?\s*(=|\]|\.)")
        start = next((i for i, line in enumerate(self.lines) if line.strip().startswith(table or "\0")), 0)
        found = (i for i, line in enumerate(self.lines[start:], start + 1) if where.search(line.strip()))
        return UserError(one_line(self.path, next(found, None), what))

    def make(self, kind: type[T], table: Mapping[str, Any], where: str) -> T:
        try:
            return make(kind, table, where, "key")
        except SettingError as error:
            raise self.fail(str(error), error.name, where) from error

    def task(self, name: str, table: Mapping[str, Any]) -> TaskSettings:
        where = f"[task.{name}]"
        found = self.make(_Task, table, where)
        env = env_options({key: table[key] for key in table if key in _ENV}, where)
        return TaskSettings(name, found.algorithms, env, found.options, found.algorithm)

    def space(self, algorithm: str, table: Mapping[str, Any]) -> Space:
        """What is tried of an algorithm's settings, each checked as a setting."""
        found: Space = {}
        for name, part in table.items():
            where = f"[tune.{algorithm}] {name}"
            try:
                found[name] = self.make(Range, part, where) if isinstance(part, dict) else tuple(part)
            except ValueError as error:
                raise self.fail(str(error), name) from error
            ends = (part["low"], part["high"]) if isinstance(part, dict) else part
            if not ends:
                raise self.fail(f"{where}: a list of values, or {{ low = ..., high = ... }}", name)
            for value in ends:
                try:
                    check_overrides(algorithm, {name: value})
                except UserError as error:
                    raise self.fail(f"{where}: {error}", name) from error
        return found

    def resources(self, table: Mapping[str, Any]) -> Resources:
        try:
            return self.make(Resources, table, "[resources]")
        except ValueError as error:  # a fraction of several GPUs
            raise self.fail(str(error), "gpus" if "gpus" in table else "fsdp", "[resources]") from error

    def stop(self, rules: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(dict.fromkeys(str(parse_rule(rule, "stop")) for rule in rules))
        except UserError as error:
            raise self.fail(str(error), "stop") from error

    def plan(self, data: _Suite) -> Plan:
        budget = self.make(_Budget, data.budget, "[budget]")
        given = [name for name, amount in vars(budget).items() if amount is not None]
        if len(given) > 1:
            raise self.fail(f"[budget] takes one of {', '.join(vars(budget))}, not {' and '.join(given)}", "budget")
        evaluation = self.make(_Evaluation, data.evaluation, "[evaluation]")
        every = self.make(_Checkpoints, data.checkpoints, "[checkpoints]").every
        return Plan(
            **vars(budget),
            test_prompts=evaluation.test_prompts,
            validation_prompts=evaluation.validation_prompts,
            validate_every=evaluation.every,
            checkpoint_every=every,
        )

    def suite(self, table: Mapping[str, Any]) -> Suite:
        data = self.make(_Suite, table, "the suite")
        try:
            check_adaptation(data.adaptation)
        except (UserError, ValueError) as error:
            raise self.fail(str(error), error.name if isinstance(error, SettingError) else "adaptation") from error
        for name in data.task:
            if name not in data.tasks:
                raise self.fail(f"[task.{name}] is about no task of this suite: {near(name, data.tasks)}", name)
        suite = Suite(
            name=data.name or Path(self.path).stem,
            description=data.description,
            tasks=tuple(self.task(name, data.task.get(name, {})) for name in data.tasks),
            algorithms=expanded(data.algorithms),
            seeds=data.seeds,
            plan=self.plan(data),
            overrides=data.algorithm,
            adaptation=data.adaptation,
            compile=data.compile,
            every=ALL in data.algorithms,
            match_kl=self.make(_Match, data.match, "[match]").kl,
            keep=self.make(_Checkpoints, data.checkpoints, "[checkpoints]").keep,
            resources=self.resources(data.resources),
            stop=self.stop(data.stop),
            task_seeds=data.task_seeds,
            guards={name: getattr(self.make(Guards, data.guards, "[guards]"), name) for name in data.guards},
            tune={name: self.space(name, table) for name, table in data.tune.items()},
        )
        used = dict.fromkeys(run.algorithm for run in suite.runs())
        for name in [*data.algorithm, *data.tune, *(name for task in suite.tasks for name in task.overrides)]:
            if name not in used:
                raise self.fail(f"settings for {name!r}, which this suite does not run: {near(name, used)}", name)
        for name in data.tasks:
            self.named(name, check_task)
        for name in used:
            self.named(name, check_algorithm)
        return suite

    def named(self, name: str, check: Callable[[str], None]) -> None:
        """Check a name; an error points to the line that has it in quotes."""
        try:
            check(name)
        except (UserError, ValueError) as error:
            quoted = (f'"{name}"', f"'{name}'")
            line = next((i for i, line in enumerate(self.lines, 1) if any(text in line for text in quoted)), None)
            raise UserError(one_line(self.path, line, str(error))) from error
