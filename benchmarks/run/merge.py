"""One comparison from several folders: a run that stands in two of them counts once, and contradictions are refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.compare import COMPARISON, check_writable
from lm_envs.benchmarks.run.one_run import differences, settings_of
from lm_envs.benchmarks.run.results import collect_results, run_folder
from lm_envs.benchmarks.run.storage import held_files, read_sealed, write_sealed
from lm_envs.benchmarks.run.suites import Suite
from lm_envs.files import TEMPORARY, replacing_folder, sha256

_LEFT = ("checkpoints", ".lock", f"{TEMPORARY}*")  # what a finished run does not need
_MEASURED_ON = ("test_prompts", "validation_prompts", "split")


@dataclass(frozen=True)
class _Finished:
    folder: Path
    label: str
    config: dict[str, Any]

    @cached_property
    def content(self) -> tuple[Any, ...]:
        """What two runs have in common only if they are one."""
        return self.config["run"]["seed"], str(self.config.get("agent")), sha256(self.folder / "samples.jsonl")

    @property
    def measured(self) -> dict[str, Any]:
        """What has to be the same in all runs of a task, so that their results are paired by prompts."""
        run, inputs = self.config["run"], self.config.get("inputs", {})
        return {
            "env": run["env"],
            "options": run["options"],
            "plan": {name: run["plan"].get(name) for name in _MEASURED_ON},
            "inputs": {name: value for name, value in inputs.items() if not name.startswith("algorithm ")},
        }

    @property
    def conditions(self) -> dict[str, Any]:
        """What should be the same in all runs of a task."""
        plan = self.config["run"]["plan"]
        rest = {name: value for name, value in plan.items() if name not in _MEASURED_ON}
        return {"plan": rest, "versions": self.config.get("versions"), "threads": self.config.get("threads")}


def merge(sources: Sequence[Path], out: Path) -> list[str]:
    """Make ``out`` a comparison of all finished runs of other folders, their checkpoints left out; files are linked
    where the file system can do it.

    Returns:
        what a reader has to know: runs that were left out as doubles, and tasks whose runs differ in budget, versions
        or threads.

    Raises:
        UserError: a folder holds no finished run, ``out`` holds something, two runs with the same name differ, or the
            runs of a task were measured on other prompts or with other models.
    """
    runs: dict[str, _Finished] = {}
    notes, again = [], 0
    for run in (run for source in sources for run in _finished(source)):
        twin = next((other for other in runs.values() if _same(run, other)), None)
        if twin is not None and twin.label != run.label:
            notes.append(f"{run.folder} is the same run as {twin.folder}, and counts once")
        elif twin is not None:
            again += 1
        elif (other := runs.get(run.label)) is not None:
            why = _contradiction(run, other)
            raise UserError(f"{other.folder} and {run.folder} are different runs of one name: {why}")
        else:
            runs[run.label] = run
    notes += [f"{again} run{'s' * (again > 1)} that an earlier folder holds too: counted once"] * bool(again)
    notes += _checked(list(runs.values()))
    if out.is_dir() and (held := held_files(out)):
        raise UserError(f"{out} is not empty (it holds {held[0]!r}): choose a new folder for the merged comparison")
    held_suites = [read_sealed(source / COMPARISON) for source in sources if (source / COMPARISON).exists()]
    check_writable(out)
    with replacing_folder(out) as whole:
        for run in runs.values():
            left_out = shutil.ignore_patterns(*_LEFT)
            shutil.copytree(run.folder, whole / run.label, copy_function=_linked, ignore=left_out)
        write_sealed(whole / COMPARISON, _suite(held_suites))
    return notes


def _finished(source: Path) -> Iterator[_Finished]:
    if not source.is_dir():
        raise UserError(f"no such folder: {source}")
    rows = collect_results(source)
    if not rows:
        raise UserError(f"{source} holds no finished run")
    for row in rows:
        label = run_folder(row)
        config = settings_of(source / label)
        assert config is not None  # of a finished run
        yield _Finished(source / label, label, config)


def _same(run: _Finished, other: _Finished) -> bool:
    """Whether two folders hold one run, perhaps under two names of its algorithm."""
    renamed = run.label != other.label
    if run.config["run"]["task"] != other.config["run"]["task"] or (renamed and run.config.get("agent") is None):
        return False
    return run.measured == other.measured and run.content == other.content


def _contradiction(run: _Finished, other: _Finished) -> str:
    pairs = [(one.config["run"] | {"inputs": one.config.get("inputs", {})}, one.conditions) for one in (other, run)]
    found = [text for old, new in zip(*pairs, strict=True) for text in differences(old, new)]
    texts = [text.replace(" before, ", " and ").removesuffix(" now") for text in found[:3]]
    return f"{'; '.join(texts) or 'equal settings, other results'}; merge only one of them"


def _checked(runs: Sequence[_Finished]) -> list[str]:
    """Notes on tasks whose runs differ in their conditions; UserError where they were measured otherwise."""
    notes: dict[tuple[str, str], str] = {}
    first: dict[str, _Finished] = {}
    for run in runs:
        task = run.config["run"]["task"]
        one = first.setdefault(task, run)
        if found := differences(one.measured, run.measured):
            text = found[0].replace(" before, ", f" in {one.folder}, ").removesuffix(" now")
            raise UserError(f"runs of {task} were measured differently: {text} in {run.folder}")
        for text in differences(one.conditions, run.conditions):
            what = text.partition(":")[0]
            told = text.replace(" before, ", f" in {one.folder}, ").removesuffix(" now") + f" in {run.folder}"
            notes.setdefault((task, what), f"runs of {task} differ, so numbers may too: {told}")
    return list(notes.values())


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _suite(held: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``comparison.json``: the parts of all, in their order."""

    def every(key: str) -> list[Any]:
        return list(dict.fromkeys(item for one in held for item in one.get(key, [])))

    tasks = {task["name"]: task for one in reversed(held) for task in one.get("tasks", [])}
    names = dict.fromkeys(task["name"] for one in held for task in one.get("tasks", []))
    name = " + ".join(dict.fromkeys(one["name"] for one in held))
    made = Suite(name, (), tuple(every("algorithms")), tuple(every("seeds")))
    return asdict(made) | {"tasks": [tasks[name] for name in names], "match_kl": sorted(every("match_kl"))}
