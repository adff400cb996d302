"""Run probes: every value of their sweeps, algorithm and seed, several at a time, into a folder that can be continued.

``probes.json`` holds what was asked, ``runs.jsonl`` a line for each run; a kill loses what was under way. A run depends
on its probe, value, algorithm and seed alone, so results do not depend on the number of processes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lm_envs.algos.registry import Unsuited
from lm_envs.benchmarks.errors import UserError, explain
from lm_envs.benchmarks.probes.base import ask, run
from lm_envs.benchmarks.probes.registry import load
from lm_envs.benchmarks.run.compare import check_writable
from lm_envs.benchmarks.run.inputs import fingerprints
from lm_envs.benchmarks.run.one_run import differences, versions
from lm_envs.benchmarks.run.storage import Records, held_files, read_sealed, write_lines, write_sealed
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.benchmarks.run.workers import Event, StopRequest, Workers, several_at_a_time
from lm_envs.files import remove_unfinished, write_atomic

COLUMNS = ("probe", "value", "algorithm", "seed", "score", "return", "start", "optimum", "note")
SETTINGS, RUNS, SCORES = "probes.json", "runs.jsonl", "scores.csv"
Key = tuple[str, float, str, int]


@dataclass(frozen=True)
class Sweep:
    """What is asked: probes and algorithms by name, and seeds."""

    probes: tuple[str, ...]
    algorithms: tuple[str, ...]
    seeds: tuple[int, ...]

    def keys(self) -> Iterator[Key]:
        """Yield the probe, value, algorithm and seed of each run, in the order of tables."""
        for name in self.probes:
            for value in load(name).values:
                for algorithm in self.algorithms:
                    yield from ((name, float(value), algorithm, seed) for seed in self.seeds)

    def joined(self, held: dict[str, Any]) -> Sweep:
        """Return this sweep after one that a folder holds."""
        mine = asdict(self)
        return Sweep(**{name: tuple(dict.fromkeys([*held.get(name, ()), *mine[name]])) for name in mine})


def key_of(record: dict[str, Any]) -> Key:
    """Return the probe, value, algorithm and seed of a run's record."""
    return record["probe"], record["value"], record["algorithm"], record["seed"]


def carry_out(
    sweep: Sweep,
    out: Path,
    *,
    resume: bool = False,
    jobs: int = 1,
    notify: Callable[[int, int], object] = lambda done, of: None,
) -> list[dict[str, Any]]:
    """Run a sweep in ``out``, or the rest of it; return the records of all runs that the folder holds, in order.

    Args:
        resume: continue what ``out`` holds; it may get more probes, algorithms or seeds.
        jobs: processes.
        notify: called with how many runs are done, and of how many.

    Raises:
        UserError: the folder holds something else, or an algorithm fails.
    """
    check_writable(out)
    try:
        with FileLock(out / ".lock", timeout=0):
            return _carry_out(sweep, out, resume, jobs, notify)
    except Timeout as error:
        raise UserError(f"another process is at work in {out}: wait for it, or choose another --out") from error


def _carry_out(
    sweep: Sweep, out: Path, resume: bool, jobs: int, notify: Callable[[int, int], object]
) -> list[dict[str, Any]]:
    whole, records = _begin(sweep, out, resume), Records(out / RUNS)
    found = {key_of(record): record for record in records.read()}
    write_atomic(records.path, "".join(json.dumps(record) + "\n" for record in found.values()))  # without half a line
    keys = list(sweep.keys())
    done = sum(key in found for key in keys)
    notify(done, len(keys))

    def save(finished: list[dict[str, Any]]) -> None:
        nonlocal done
        records.append(*finished)
        found.update({key_of(record): record for record in finished})
        notify(done := done + len(finished), len(keys))

    _do(_jobs(keys, found), jobs, save)
    return write_scores(whole, found, out)


def write_scores(whole: Sweep, found: dict[Key, dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Write ``scores.csv`` from the records by key; return them in the order of tables."""
    lines = [found[key] for key in whole.keys() if key in found]
    write_lines(out / SCORES, lines, COLUMNS)
    return lines


def held(out: Path) -> tuple[Sweep, list[dict[str, Any]]]:
    """Return the sweep and the records of a folder, for a report of what is finished."""
    settings = read_sealed(out / SETTINGS)
    whole = Sweep((), (), ()).joined(settings)
    found = {key_of(record): record for record in Records(out / RUNS).read()}
    return whole, write_scores(whole, found, out)


def _begin(sweep: Sweep, out: Path, resume: bool) -> Sweep:
    """Check and write the folder's settings; return the sweep with what the folder holds."""
    remove_unfinished(out)
    names = {text: fingerprints(RunSpec("enumerable", text, 0, Plan())) for text in sweep.algorithms}
    inputs = {name: value for found in names.values() for name, value in found.items()}
    before: dict[str, Any] = {}
    if (out / SETTINGS).exists():
        if not resume:
            raise UserError(f"{out} holds probes already: --resume continues them, another --out starts a new sweep")
        before = read_sealed(out / SETTINGS)
        changed = [name for name, value in before["inputs"].items() if inputs.get(name, value) != value]
        if changed:
            raise UserError(
                f"{out} began with other contents of {changed[0]}: restore them to continue, or choose another --out"
            )
        if others := differences(before["versions"], versions()):
            warnings.warn(f"continued with other versions, so numbers may differ ({'; '.join(others)})", stacklevel=1)
    elif strange := held_files(out, [".lock"]):
        raise UserError(f"{out} is not empty (it holds {strange[0]!r}) and holds no probes: choose another --out")
    whole = sweep.joined(before)
    inputs = {**before.get("inputs", {}), **inputs}
    write_sealed(out / SETTINGS, {**asdict(whole), "inputs": inputs, "versions": before.get("versions", versions())})
    return whole


Job = tuple[str, float, int, tuple[str, ...]]


def _jobs(keys: Sequence[Key], found: dict[Key, dict[str, Any]]) -> list[Job]:
    """Return what is left to do: a probe, a value, a seed, and the algorithms, which share the solution."""
    jobs: dict[tuple[str, float, int], list[str]] = {}
    for name, value, algorithm, seed in keys:
        if (name, value, algorithm, seed) not in found:
            jobs.setdefault((name, value, seed), []).append(algorithm)
    return [(*where, tuple(algorithms)) for where, algorithms in jobs.items()]


def _do(jobs: Sequence[Job], processes: int, save: Callable[[list[dict[str, Any]]], None]) -> None:
    """Give the records of each job to ``save`` as it is done."""
    if processes == 1:
        torch.set_num_threads(1)
        for job in jobs:
            save(work(job))
        return

    def notify(event: Event) -> None:
        if event["event"] != "done":
            raise UserError(event["message"])
        save(event["result"])

    with Workers(processes, _attempt, _killed) as pool:
        several_at_a_time(pool, jobs, notify=notify, stop=StopRequest())


def _killed(job: Job, how: str) -> Event:
    return {"event": "failed", "message": f"a process {how}; --resume goes on"}


def _attempt(job: Job, tell: object, stop: object) -> Event:
    """Do a job in a worker; bugs end it."""
    torch.set_num_threads(1)
    try:
        return {"event": "done", "result": work(job)}
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        return {"event": "failed", "message": message}


def work(job: Job) -> list[dict[str, Any]]:
    """Run the algorithms of a job, and return a record for each.

    An algorithm that the probe does not suit has no score, and one whose loss becomes infinite a score of 0.
    """
    name, value, seed, algorithms = job
    question, records = ask(load(name).case(value, seed)), []
    for algorithm in algorithms:
        record = {"probe": name, "value": value, "algorithm": algorithm, "seed": seed}
        known = {"start": question.start, "optimum": question.optimum, "note": ""}
        torch.manual_seed(seed)  # for algorithms of others, which may take torch's generator
        reached: float | None
        try:
            score, reached = run(question, algorithm, seed)
        except Unsuited as error:
            records.append({**record, "score": None, "return": None, **known, "note": f"left out: {error}"})
            continue
        except FloatingPointError as error:
            score, reached, known["note"] = 0.0, None, f"diverged: {error}"
        records.append({**record, "score": score, "return": reached, **known})
    return records
