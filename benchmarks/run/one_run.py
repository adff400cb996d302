"""One run: an algorithm on a task with a seed, in a folder of its own; it may be killed at any moment and continued.

docs/getting_started.md lists the files. ``manifest.json`` is the last: sizes and hashes of config, records, model and
result; its presence means that the run is finished.
"""

from __future__ import annotations

import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from filelock import FileLock, Timeout

from lm_envs.benchmarks.errors import Interrupted, UserError
from lm_envs.benchmarks.run import stopping
from lm_envs.benchmarks.run.budgets import LEAST_POINTS, Budget
from lm_envs.benchmarks.run.inputs import fingerprints, flat, versions
from lm_envs.benchmarks.run.many_processes import check_shares
from lm_envs.benchmarks.run.problems import Problem, open_problem
from lm_envs.benchmarks.run.storage import (
    KEEP,
    SEAL,
    Checkpoints,
    Records,
    finished,
    held_files,
    read_json,
    read_sealed,
    write_json,
    write_sealed,
)
from lm_envs.benchmarks.run.suites import Plan, RunSpec, Service, only_larger
from lm_envs.benchmarks.run.tracking import Followers, TensorBoard, Untracked
from lm_envs.files import MANIFEST, TEMPORARY, remove, write_manifest
from lm_envs.processes import group
from lm_envs.processes.group import call, called

if TYPE_CHECKING:
    from lm_envs.benchmarks.run.data_problem import DataSpec

AnySpec: TypeAlias = "RunSpec | DataSpec"
Notify = Callable[[dict[str, Any]], None]
_WAIT_FOR_OTHER_S = 20
_RNG = "rng.torch"
_FOLDERS = ("checkpoints", "data", "model", "tensorboard")
BEFORE_CONFIG = (".lock", "data", "log.txt")  # what may lie in a folder without a config.json
CHECKPOINT_S = 30.0  # seconds of training after which there is a checkpoint in any case


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return where two settings differ, as ``plan.iterations: 40 before, 80 now``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    return [] if old == new else [f"{where}: {old!r} before, {new!r} now"]


def execute(
    spec: AnySpec,
    out: Path,
    *,
    threads: int = 1,
    keep: int = 0,
    extend: bool = False,
    track: Sequence[Service] = (),
    show: int = 0,
    notify: Notify = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    opener: Callable[[Any], Any] = open_problem,
) -> dict[str, Any]:
    """Carry out a run, or the rest of it, in ``out / spec.folder``; return its result.

    Args:
        threads: torch threads. A run that is continued keeps its number: the last bits of sums depend on it.
        keep: checkpoints that stay when the run is finished.
        extend: a run with a smaller budget goes on to this one, from its last checkpoint.
        track: services that follow the run, beside TensorBoard.
        show: iterations between events "texts" with samples of a training batch, 0 for none.
        notify: called with events "start", "iteration" and "evaluate", dictionaries in JSON's types.
        should_stop: called after every iteration.
        opener: makes the problem of a spec.

    Raises:
        Interrupted: ``should_stop`` returned True; the iteration is finished and on disk.
        UserError: the folder holds a run with other settings, or another process works in it.
    """
    folder = out / spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    try:
        with FileLock(lock, timeout=_WAIT_FOR_OTHER_S):
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            return _Run(spec, folder, threads, keep, extend, notify, should_stop, track, show).execute(opener)
    except Timeout as error:
        who = lock.read_text(errors="replace") or "another process"
        raise UserError(f"{who} is at work in {folder}: wait for it, or end it") from error


def settings_of(folder: Path) -> dict[str, Any] | None:
    """Return the ``config.json`` of a run's folder, None if there is no run in it; raise UserError if it is damaged, or
    missing beside a run."""
    path = folder / "config.json"
    if path.exists():
        config = read_sealed(path)
        plan = {**asdict(Plan()), **config["run"]["plan"]}  # an older version knew fewer settings
        return config | {"run": config["run"] | {"plan": plan}}
    if folder.is_dir() and (held := held_files(folder, BEFORE_CONFIG)):
        raise UserError(
            f"{folder} is not empty (it holds {held[0]!r}) and has no config.json: restore it, or choose another --out"
        )
    return None


def check_same(spec: AnySpec, folder: Path, extend: bool = False) -> dict[str, Any] | None:
    """Return the ``config.json`` of a folder in which a run continues, None if it begins there; warn of other versions.

    Args:
        extend: the run may have had a smaller budget, if it has a checkpoint to go on from.

    Raises:
        UserError: the folder holds a run with other settings, or one whose inputs had other contents.
    """
    config = settings_of(folder)
    if config is None:
        return None
    found = differences(config["run"], spec.to_json())
    if found and extend and only_larger(config, spec.to_json()):
        if config["agent"] is not None and not Checkpoints(folder / "checkpoints").paths():
            raise UserError(f"{folder} holds no checkpoint to go on from: a run that is to be extended needs --keep 1")
    elif found:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(found[:3])}): "
            "choose another --out, or delete that folder"
        )
    now = fingerprints(spec)
    if changed := [name for name, before in config["inputs"].items() if now.get(name) != before]:
        raise UserError(
            f"{folder} began with other contents of {changed[0]}: restore them to continue, or choose another --out"
        )
    if others := differences(config["versions"], versions()):
        warnings.warn(f"continued with other versions, so numbers may differ ({'; '.join(others)})", stacklevel=1)
    return config


@dataclass
class _Run:
    spec: AnySpec
    folder: Path
    threads: int
    keep: int
    extend: bool
    notify: Notify
    should_stop: Callable[[], bool]
    track: Sequence[Service] = ()
    show: int = 0
    wall_s: float = 0.0
    ended: stopping.Ended | None = None  # before its budget

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return group.number() == 0

    def __post_init__(self) -> None:
        self.metrics, self.samples = Records(self.folder / "metrics.jsonl"), Records(self.folder / "samples.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=max(KEEP, self.keep))

    def execute(self, opener: Callable[[Any], Any]) -> dict[str, Any]:
        config = check_same(self.spec, self.folder, self.extend)
        extended = config is not None and config["run"] != self.spec.to_json()
        if not extended and (result := finished(self.folder)) is not None:
            self.checkpoints.prune(self.keep)  # a kill may have left more
            return result
        unfinished = sorted(self.folder.rglob(f"{TEMPORARY}*"))  # what killed writes left
        no_folders = [path for name in _FOLDERS if not (path := self.folder / name).is_dir()]
        for path in (*unfinished, *no_folders):
            remove(path)
        self.threads = self.threads if config is None else config["threads"]
        call(partial(_help, self.spec, self.folder, self.threads))
        with group.together():
            return self._carry_out(opener, config)

    def follow(self) -> None:
        """Take part in the run that process 0 leads; it alone writes files."""
        with group.together():
            self._carry_out(_opener(self.spec, self.folder), None)

    def _carry_out(self, opener: Callable[[Any], Any], config: dict[str, Any] | None) -> dict[str, Any]:
        torch.set_num_threads(self.threads)
        # Our own code counts its random numbers; a user's reward or algorithm may take torch's generator.
        torch.manual_seed(self.spec.seed)
        problem: Problem = opener(self.spec)
        found = {"run": self.spec.to_json(), "threads": self.threads, **problem.settings(), "versions": versions()}
        found |= {"inputs": fingerprints(self.spec)}
        group.check_same(flat({**found, "--fsdp": group.sharded()}), "what the run is made of")
        if self.leads:
            if config is None:
                config = write_sealed(self.folder / "config.json", found)
            elif config["run"] != found["run"]:
                config = self._extended(config, problem)
            self.checkpoints.runs = (*config.get("extends", ()), config[SEAL])
        self.budget = Budget(self.spec.plan, problem.agent)
        total = 0 if problem.agent is None else self.budget.total(self.wall_s)
        self.notify({"event": "start", "run": self.spec.label, "iteration": 0, "of": total})
        with Followers(self.track, self.folder, self.spec.label, config or found) as self.followers:
            if problem.agent is not None:
                check_shares(problem.agent)
                self._train(problem)
            elif self.leads:
                self.samples.cut(0)
            result = self._finish(problem)
            self.followers.finish(result)
        return result

    def _extended(self, config: dict[str, Any], problem: Problem) -> dict[str, Any]:
        """Make the run an unfinished one with the larger budget, whose checkpoints are those of the smaller one too."""
        for name in (MANIFEST, "result.json"):
            remove(self.folder / name)
        content = {name: value for name, value in config.items() if name != SEAL}
        seals = [*config.get("extends", ()), config[SEAL]]
        new = {"run": self.spec.to_json(), **problem.settings(), "extends": seals}
        return write_sealed(self.folder / "config.json", content | new)

    def _train(self, problem: Problem) -> None:
        agent = problem.agent
        self.watch = stopping.Watch(problem.stops, problem.guards)
        saved = done = self._resume(agent)
        saved_s = self.wall_s
        self._watch(*(self.metrics.read() if self.leads else ()))
        tracker = TensorBoard(self.folder / "tensorboard", resumed_at=done) if self.leads else Untracked()
        try:
            if done == 0:
                nothing = dict.fromkeys(("iteration", "tokens", "reward_calls", "scored_tokens", "trained_tokens"), 0)
                self._record(problem, tracker, {**nothing, "wall_s": 0.0})
            while not (self._over or self.ended):
                agent.progress = self.budget.spent(self.wall_s)
                start = time.perf_counter()
                traj, metrics = agent.iteration(problem.env)
                self.wall_s += time.perf_counter() - start
                done = agent.iterations_done
                if problem.guards is not None and traj.response is not None and not agent.needs_data:
                    metrics["distinct_2"] = stopping.variety(traj)
                stop = self._agree(agent, metrics)
                self._record(problem, tracker, {**metrics, "iteration": done, "wall_s": self.wall_s})
                if self.show and done % self.show == 0 and (texts := problem.samples(traj)):
                    self.notify({"event": "texts", "run": self.spec.label, "iteration": done, "texts": texts})
                regular = done % self.spec.plan.checkpoint_every == 0 or self._over or self.ended
                # Slow iterations are not lost by the dozen. For an agent that samples steps see below.
                if regular or (self.wall_s - saved_s > CHECKPOINT_S and agent.config.steps is None):
                    tracker.texts(problem.texts(traj), done, "training")
                    self._save(problem)
                    saved, saved_s = done, self.wall_s
                if stop:
                    # A checkpoint restarts the episodes of an agent that samples steps, so an extra one would change
                    # the run: such a run goes back to its last regular checkpoint.
                    if saved != done and agent.config.steps is None:
                        self._save(problem)
                    raise Interrupted(self.spec.label)
        finally:
            tracker.close()

    def _watch(self, *records: Mapping[str, Any]) -> None:
        """Note whether these records end the run early; the first process has them, and decides for all."""
        if self.ended or self.watch.idle:
            return
        found = group.first(lambda: [end for each in records if (end := self.watch.see(each))], "what ends a run")
        if found and not (self._over and found[-1][0] == stopping.RULE):  # at the end of its budget nothing is cut off
            self.ended = stopping.Ended(*found[-1])
            self.notify({"event": "ended", "run": self.spec.label, **self.ended._asdict()})

    def _agree(self, agent: Any, metrics: Mapping[str, Any]) -> bool:
        """Whether to stop after this iteration, as any process was asked to, with the time of process 0 on all."""
        mine = self.should_stop(), self.wall_s, (agent.tokens_done, agent.trained_tokens), metrics.get("grad_norm", 0.0)
        all_stop, all_wall_s, counts, norms = zip(*group.exchange(mine, "the end of an iteration"), strict=True)
        if len(set(counts)) > 1 or not all(math.isclose(norm, norms[0], rel_tol=1e-3) for norm in norms):
            raise UserError(
                f"the processes have drifted apart by iteration {agent.iterations_done} (norms of the gradient "
                f"{', '.join(f'{norm:.6g}' for norm in norms)}): a reward or an environment gave them different numbers"
            )
        self.wall_s = all_wall_s[0]
        return any(all_stop)

    @property
    def _over(self) -> bool:
        return self.budget.over(self.wall_s)

    def _record(self, problem: Problem, tracker: TensorBoard | Untracked, metrics: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, with a point of the learning curve where one is due."""
        done, total = metrics["iteration"], self.budget.total(self.wall_s)
        every = min(self.spec.plan.validate_every, max(1, total // LEAST_POINTS))
        self._watch(metrics)
        if every and (done % every == 0 or self._over or self.ended):
            found, samples = problem.validate()
            point = {f"validation_{name}": value for name, value in found.items()}
            self._watch({"iteration": done, **point})
            metrics = metrics | point
            if self.leads:
                self.samples.append(*({"iteration": done, "split": "validation", **sample} for sample in samples))
            text = "{prompt} | {response}  (gold {gold:.2f}, proxy {proxy:.2f})"
            tracker.texts([text.format(**sample) for sample in samples], done, "validation")
        tracker.scalars(metrics, done)
        if self.leads:
            self.metrics.append(metrics)
        self.notify({"event": "iteration", "run": self.spec.label, "of": total, "metrics": metrics})

    def _save(self, problem: Problem) -> None:
        """Write a checkpoint, after its records are on disk, so that it never counts on what a crash could lose."""
        tensors, counters = problem.agent.checkpoint()
        tensors[_RNG] = torch.get_rng_state()
        group.first(lambda: self._write(problem.agent.iterations_done, tensors, counters), "a checkpoint")

    def _write(self, iteration: int, tensors: dict[str, Any], counters: dict[str, Any]) -> None:
        records = {each.path.name: each.seal() for each in (self.metrics, self.samples)}
        state = {"agent": counters, "wall_s": self.wall_s, "records": records}
        self.checkpoints.save(iteration, tensors, state)
        if self.track:
            self.followers.send(self.metrics.read())

    def _resume(self, agent: Any) -> int:
        """Continue from the newest whole checkpoint, or start from scratch; drop the records after it. Returns the
        iterations done."""
        records = (self.metrics, self.samples)
        found = group.first(lambda: self.checkpoints.newest(records), "the newest checkpoint")
        if found is not None:
            tensors = dict(found.tensors)
            torch.set_rng_state(tensors.pop(_RNG))
            agent.restore(tensors, found.state["agent"])
            self.wall_s = found.state["wall_s"]
        for each in records if self.leads else ():
            each.cut(0 if found is None else found.state["records"][each.path.name][0])
        start = {"iteration": agent.iterations_done, "of": self.budget.total(self.wall_s)}
        self.notify({"event": "start", "run": self.spec.label, **start})
        return int(agent.iterations_done)

    def _finish(self, problem: Problem) -> dict[str, Any]:
        self.notify({"event": "evaluate", "run": self.spec.label})
        measured, found = problem.evaluate()
        return group.first(lambda: self._write_result(problem, measured, found), "the result")

    def _write_result(
        self, problem: Problem, measured: dict[str, Any], found: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        done = 0 if problem.agent is None else problem.agent.iterations_done
        self.samples.append(*({"iteration": done, "split": self.spec.plan.split, **sample} for sample in found))
        self.samples.seal()
        remove(self.folder / "model")  # a process that was killed here left half of it
        problem.save_model(self.folder / "model")
        run = {"task": self.spec.task, "algorithm": self.spec.algorithm, "seed": self.spec.seed}
        run |= {"task_seed": self.spec.task_seed} if self.spec.task_seed else {}
        wall_s = self.wall_s + measured.get("inference_s", 0.0)
        result = {**run, **measured, **problem.costs(measured), "wall_s": wall_s}
        if problem.guards is not None and problem.agent is not None:
            if why := stopping.of_result(problem.guards, measured):
                result["collapsed"] = why
        result |= {self.ended.kind: self.ended.why} if self.ended else {}
        write_json(self.folder / "result.json", result)
        files = [self.folder / name for name in ("config.json", "metrics.jsonl", "samples.jsonl", "result.json")]
        write_manifest(self.folder, {}, [*files, *(self.folder / "model").rglob("*")])
        self.checkpoints.prune(self.keep)  # last: until here a kill goes on from them
        return read_json(self.folder / "result.json")


def _opener(spec: AnySpec, folder: Path) -> Callable[[Any], Any]:
    """What opens the problem of a spec on the processes that process 0 called."""
    if isinstance(spec, RunSpec):
        return open_problem
    from lm_envs.benchmarks.run.data_problem import DataProblem

    return lambda spec: DataProblem(spec, folder)


def _help(spec: AnySpec, folder: Path, threads: int, should_stop: Callable[[], bool]) -> None:
    _Run(spec, folder, threads, 0, False, lambda event: None, should_stop).follow()


def follow(should_stop: Callable[[], bool]) -> None:
    """On the processes after the first: take part in what process 0 calls them to, until it ends."""
    while (job := called()) is not None:
        job(should_stop)
