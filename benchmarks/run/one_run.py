"""One run: an algorithm on a task with a seed, in a folder of its own, which may be killed at any moment and continued.

.. code-block:: text

    <out>/<task>/<algorithm>/seed-0/
        config.json       everything that decides the run, and the versions it ran with
        metrics.jsonl     a line per iteration, with the learning curve's points in it
        samples.jsonl     sample texts with their scores: of validation on the way, of the test prompts at the end
        checkpoints/      the last two: checkpoint-000040/{tensors.safetensors, state.json}
        tensorboard/      event files
        model/            the tuned language model and its tokenizer, or its adapters, for from_pretrained
        result.json       the row of the results; its presence means that the run is finished
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from filelock import FileLock, Timeout

import lm_envs
from lm_envs.algos.engine import cost
from lm_envs.benchmarks.errors import Interrupted, UserError
from lm_envs.benchmarks.run.problems import ControlProblem, TextProblem, open_problem
from lm_envs.benchmarks.run.storage import Checkpoints, Records, read_json, write_json
from lm_envs.benchmarks.run.suites import RunSpec
from lm_envs.benchmarks.run.tracking import Tracker

if TYPE_CHECKING:
    from lm_envs.benchmarks.run.data_problem import DataProblem, DataSpec

AnySpec: TypeAlias = "RunSpec | DataSpec"
Problem: TypeAlias = "TextProblem | ControlProblem | DataProblem"
Notify = Callable[[dict[str, Any]], None]
_WAIT_FOR_OTHER_S = 20
_RNG = "rng.torch"
LEAST_POINTS = 4  # of a learning curve, where it has any: some algorithms take few, large iterations


def versions() -> dict[str, str]:
    """What the numbers depend on besides the settings."""
    found = {"python": platform.python_version(), "lm-envs": lm_envs.__version__}
    for name in ("torch", "transformers", "gymnasium", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # installed in a way that left no metadata
            found[name] = "unknown"
    return found


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two settings differ, as ``plan.iterations: 40 before, 80 now``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    return [] if old == new else [f"{where}: {old!r} before, {new!r} now"]


def execute(
    spec: AnySpec,
    out: Path,
    *,
    threads: int = 1,
    notify: Notify = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    opener: Callable[[Any], Any] = open_problem,
) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and return its result.

    Args:
        spec: what to run.
        out: the comparison's folder; the run's is ``out / spec.folder``.
        threads: of torch. A run that is continued keeps the number it began with: sums depend on it in their last bits.
        notify: called with events "start", "iteration" and "evaluate", dictionaries in JSON's types.
        should_stop: asked after every iteration.
        opener: makes the problem of a spec.

    Raises:
        Interrupted: ``should_stop`` said so; the iteration is finished and on disk.
        UserError: the folder holds a run with other settings, or another process works in it.
    """
    folder = out / spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=_WAIT_FOR_OTHER_S):
            return _Run(spec, folder, threads, notify, should_stop, opener).execute()
    except Timeout as error:
        raise UserError(f"another process is at work in {folder}: wait for it, or end it") from error


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The ``config.json`` of a run's folder, None if there is none."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else None


def check_same(spec: AnySpec, folder: Path) -> None:
    """Raises UserError if the folder holds a run with other settings."""
    config = settings_of(folder)
    if config is not None:
        found = differences(config["run"], spec.to_json())
        if found:
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(found[:3])}): "
                "choose another --out, or delete that folder"
            )


class _Run:
    def __init__(
        self,
        spec: AnySpec,
        folder: Path,
        threads: int,
        notify: Notify,
        should_stop: Callable[[], bool],
        opener: Callable[[Any], Any],
    ) -> None:
        self.spec, self.folder, self.threads = spec, folder, threads
        self.notify, self.should_stop, self.opener = notify, should_stop, opener
        self.metrics, self.samples = Records(folder / "metrics.jsonl"), Records(folder / "samples.jsonl")
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.wall_s = 0.0

    def execute(self) -> dict[str, Any]:
        check_same(self.spec, self.folder)
        if (self.folder / "result.json").exists():
            return read_json(self.folder / "result.json")
        config = settings_of(self.folder)
        torch.set_num_threads(self.threads if config is None else config["threads"])
        # Our own code draws by counting; this is for a reward or an algorithm of the user's that takes torch's
        # generator.
        torch.manual_seed(self.spec.seed)
        problem = self.opener(self.spec)
        if config is None:
            self._write_config(problem)
        self.notify({"event": "start", "run": self.spec.label, "iteration": 0, "of": self._total(problem)})
        if problem.agent is not None:
            self._train(problem)
        return self._finish(problem)

    def _write_config(self, problem: Problem) -> None:
        config = {"run": self.spec.to_json(), "threads": self.threads, **problem.settings(), "versions": versions()}
        write_json(self.folder / "config.json", config)

    def _total(self, problem: Problem) -> int:
        return 0 if problem.agent is None else problem.agent.config.iterations

    def _train(self, problem: Problem) -> None:
        agent = problem.agent
        assert agent is not None
        self._resume(problem)
        done, total = agent.iterations_done, agent.config.iterations
        tracker = Tracker(self.folder / "tensorboard", resumed_at=done)
        saved = done if self.checkpoints.paths() else -1
        try:
            if done == 0:
                nothing = dict.fromkeys(("iteration", "tokens", "reward_calls", "trained_tokens"), 0)
                self._record(problem, tracker, {**nothing, "wall_s": 0.0})
            while agent.iterations_done < total:
                start = time.perf_counter()
                traj, metrics = agent.iteration(problem.env)
                self.wall_s += time.perf_counter() - start
                done = agent.iterations_done
                tracker.scalars(metrics, done)
                self._record(problem, tracker, {**metrics, "iteration": done, "wall_s": self.wall_s})
                if done % self.spec.plan.checkpoint_every == 0 or done == total:
                    tracker.texts(problem.texts(traj), done, "training")
                    self._save(problem)
                    saved = done
                if self.should_stop():
                    # A checkpoint restarts the episodes of an agent that samples steps, so an extra one would make this
                    # run differ from one that was left alone: such a run goes back to its last regular checkpoint.
                    if saved != done and agent.config.steps is None:
                        self._save(problem)
                    raise Interrupted(self.spec.label)
        finally:
            tracker.close()

    def _record(self, problem: Problem, tracker: Tracker, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl, with a point of the learning curve where one is due."""
        assert problem.agent is not None
        done, total = metrics["iteration"], problem.agent.config.iterations
        every = min(self.spec.plan.validate_every, max(1, total // LEAST_POINTS))
        if every and (done % every == 0 or done == total):
            found, samples = problem.validate()
            metrics = metrics | {f"validation_{name}": value for name, value in found.items()}
            self.samples.append(*({"iteration": done, "split": "validation", **sample} for sample in samples))
            tracker.scalars(found, done, "validation")
            texts = [
                f"{s['prompt']} | {s['response']}  (gold {s['gold']:.2f}, proxy {s['proxy']:.2f})" for s in samples
            ]
            tracker.texts(texts, done, "validation")
        self.metrics.append(metrics)
        self.notify({"event": "iteration", "run": self.spec.label, "of": total, "metrics": metrics})

    def _save(self, problem: Problem) -> None:
        """A checkpoint; the records up to it are on disk first, so it never vouches for what a crash could lose."""
        assert problem.agent is not None
        self.metrics.sync()
        self.samples.sync()
        tensors, counters = problem.agent.checkpoint()
        tensors[_RNG] = torch.get_rng_state()
        self.checkpoints.save(problem.agent.iterations_done, tensors, {"agent": counters, "wall_s": self.wall_s})

    def _resume(self, problem: Problem) -> None:
        """Continue from the newest whole checkpoint, or start anew; what was recorded after it is forgotten."""
        agent, found = problem.agent, self.checkpoints.newest()
        assert agent is not None
        if found is not None:
            tensors = dict(found.tensors)
            torch.set_rng_state(tensors.pop(_RNG))
            agent.restore(tensors, found.state["agent"])
            self.wall_s = found.state["wall_s"]
        done = agent.iterations_done
        # A fresh start records iteration 0 itself; a resumed one has it already.
        last = done if found is not None else -1
        self.metrics.keep(lambda record: record["iteration"] <= last)
        self.samples.keep(lambda record: record["iteration"] <= last)
        self.notify({"event": "start", "run": self.spec.label, "iteration": done, "of": agent.config.iterations})

    def _finish(self, problem: Problem) -> dict[str, Any]:
        """Measure on the test prompts and write the result."""
        self.notify({"event": "evaluate", "run": self.spec.label})
        measured, samples = problem.evaluate()
        done = 0 if problem.agent is None else problem.agent.iterations_done
        self.samples.keep(lambda record: record["split"] != "test")  # of a process that was killed about here
        self.samples.append(*({"iteration": done, "split": "test", **sample} for sample in samples))
        self.samples.sync()
        problem.save_model(self.folder / "model")
        run = {"task": self.spec.task, "algorithm": self.spec.algorithm, "seed": self.spec.seed}
        result = {**run, **measured, **self._cost(problem, measured)}
        write_json(self.folder / "result.json", result)
        return read_json(self.folder / "result.json")

    def _cost(self, problem: Problem, measured: dict[str, Any]) -> dict[str, Any]:
        """What training and measuring took."""
        wall_s = {"wall_s": self.wall_s + measured.get("inference_s", 0.0)}
        if isinstance(problem, (TextProblem, ControlProblem)):
            return cost.total(problem.agent, problem.given, measured) | wall_s
        return {"trained_tokens": problem.agent.trained_tokens} | wall_s  # nothing is sampled
