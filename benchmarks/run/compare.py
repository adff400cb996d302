"""A comparison: check everything that can be checked before training, carry out the runs, keep the results current."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from lm_envs.benchmarks.errors import Interrupted, RunsFailed, UserError
from lm_envs.benchmarks.run.aggregate import write_aggregate
from lm_envs.benchmarks.run.names import check_algorithm, check_task, is_untrained
from lm_envs.benchmarks.run.progress import Display
from lm_envs.benchmarks.run.results import collect_results, write_csv
from lm_envs.benchmarks.run.silence import Silence
from lm_envs.benchmarks.run.storage import finished, held_files, read_sealed, write_sealed
from lm_envs.benchmarks.run.suites import RunSpec, Service, Suite, check_overrides
from lm_envs.benchmarks.run.tracking import check_services
from lm_envs.benchmarks.run.workers import PATIENCE_S, CarryOut, StopRequest, one_by_one, run_in_workers
from lm_envs.files import TEMPORARY, remove_unfinished, write_atomic
from lm_envs.processes import group

COMPARISON = "comparison.json"


def check_writable(out: Path) -> None:
    """Make ``out`` if it does not exist; raise UserError unless files can be written there."""
    try:
        str(out).encode()
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(probe := out / f"{TEMPORARY}probe", b"x" * 4096)
        probe.unlink(missing_ok=True)  # another process may try the folder too
    except UnicodeEncodeError as error:
        raise UserError(f"cannot write results to {out}: its name is not UTF-8; choose another --out") from error
    except OSError as error:
        why = f"{error.strerror}; choose another folder with --out, or put that right"
        why = "it is a file; choose a folder with --out" if isinstance(error, FileExistsError) else why
        raise UserError(f"cannot write results to {out}: {why}") from error


@contextmanager
def gone_if_refused(out: Path, *ours: str) -> Iterator[None]:
    """Make ``out``; if the block raises before there is a run in it, remove the folders that were made.

    Files and folders named ``ours`` are removed with it. A folder that existed, or that holds anything else, stays."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        check_writable(out)
        yield
    except Exception:
        if made and not (out / "config.json").exists():
            with suppress(OSError):
                for name in ours:
                    shutil.rmtree(out / name, ignore_errors=True)
                    (out / name).unlink(missing_ok=True)
                for path in made:
                    path.rmdir()
        raise


def check_folder(out: Path, suite: Suite, resume: bool, extend: bool = False) -> None:
    """Raise UserError if ``out`` holds a comparison without ``resume``, one with other settings (``extend`` allows a
    larger budget), or other files."""
    from lm_envs.benchmarks.run.one_run import check_same

    begun = any((out / spec.label / "config.json").exists() for spec in suite.runs())
    if (out / COMPARISON).exists() or (resume and begun):
        if not resume:
            raise UserError(
                f"{out} holds the comparison {_held(out).get('name')!r} already: --resume continues it (finished runs "
                "are kept), another --out starts a new comparison"
            )
        for spec in suite.runs():
            check_same(spec, out / spec.label, extend)
    elif strange := held_files(out):
        raise UserError(
            f"{out} is not empty (it holds {strange[0]!r}) and holds no comparison: choose another folder with --out"
        )


def check_runs(runs: Sequence[RunSpec]) -> None:
    """Raise UserError for an unknown task, algorithm or setting, or a setting out of range."""
    for task in dict.fromkeys(run.task for run in runs):
        check_task(task)
    for algorithm in dict.fromkeys(run.algorithm for run in runs):
        check_algorithm(algorithm)
    for run in runs:
        if is_untrained(run.algorithm):
            if run.overrides:
                raise UserError(f"{run.algorithm} is not trained and has no settings, got {', '.join(run.overrides)}")
        else:
            settings = check_overrides(run.algorithm, run.overrides)
            env, own = (given.get("kl_coef") for given in (run.env, settings))
            if env is not None and own is not None and env != own:
                raise UserError(
                    f"{run.label}: kl_coef is {env} in the environment's options and {own} in the settings of "
                    f"{run.algorithm}: set it in one place, or to one number"
                )


def prepare(
    suite: Suite, runs: Sequence[RunSpec], opened: Callable[[Any], object] = lambda problem: None
) -> dict[tuple[str, str], str]:
    """Open every kind of run once, and let each task's reward and judge score two samples.

    Errors show now, not in an hour, and workers find tasks that are built from the user's own text in the cache.

    Args:
        opened: called with each problem.

    Returns:
        For a suite of all algorithms: why the task and algorithm of a key cannot be run.
    """
    from transformers.utils.logging import disable_progress_bar

    from lm_envs.algos.registry import Unsuited
    from lm_envs.benchmarks.run.problems import TextProblem, open_problem

    disable_progress_bar()  # of reading and writing files: ours show what takes time
    unsuited: dict[tuple[str, str], str] = {}
    tried: set[str] = set()
    kinds = {(run.task, run.algorithm): run for run in reversed(runs)}  # the first run of each
    for key, run in reversed(kinds.items()):
        try:
            problem = open_problem(run)
        except Unsuited as error:
            if not suite.every:
                raise
            unsuited[key] = str(error)
            continue
        opened(problem)
        if isinstance(problem, TextProblem) and run.task not in tried:
            tried.add(run.task)
            problem.try_out()
    suited = [run for run in runs if run.task_seed and (run.task, run.algorithm) not in unsuited]
    for run in {(run.task, run.task_seed): run for run in suited}.values():  # other models are built now
        problem = open_problem(run)
        if isinstance(problem, TextProblem):
            problem.try_out()
    return unsuited


def compare(
    suite: Suite,
    out: Path,
    *,
    resume: bool = False,
    extend: bool = False,
    track: Sequence[Service] = (),
    show: int = 0,
    jobs: int = 1,
    threads: int = 1,
    ray: str | None = None,
    console: Console | None = None,
    prepared: bool = False,
) -> list[dict[str, Any]]:
    """Carry out a comparison in ``out``, or the rest of it; return the results of all finished runs.

    Args:
        resume: continue what ``out`` holds; it may get more tasks, algorithms or seeds than it began with.
        extend: with ``resume``, runs with a smaller budget go on to the suite's.
        track: services that follow the runs, beside TensorBoard.
        show: iterations between sampled texts on the screen, 0 for none.
        jobs: runs at a time, each in a process of its own if more than one.
        threads: torch threads per run. The last bits of sums depend on it, so it must not depend on ``jobs``.
        ray: address of a Ray cluster that carries out the runs, instead of this process or ``jobs`` others.
        prepared: whether :func:`prepare` has opened these kinds of runs before.

    Raises:
        UserError: the user can put it right; raised before any training where possible.
        Interrupted: Ctrl-C; everything is on disk.
    """
    from lm_envs.benchmarks.run.planning import RunPlan, announcement, plan_of

    console = console or Console(emoji=False, stderr=True)
    runs = suite.runs()
    check_runs(runs)
    check_services(track)
    with ExitStack() as ending:
        with gone_if_refused(out):
            check_folder(out, suite, resume, extend)
            open_runs = [run for run in runs if finished(out / run.label) is None or not _same(run, out)]
            if open_runs:
                console.print(_heading(suite, runs, open_runs), highlight=False)
                plans: list[RunPlan] = []
                unsuited: dict[tuple[str, str], str] = {}
                # Building a task from the user's text shows a bar of its own.
                if not prepared:
                    with Silence(partial(console.print, highlight=False, markup=False), "opening each task and model"):
                        planned = partial(plan_of, keep=suite.keep, processes=group.count(), fsdp=group.shares() > 1)
                        unsuited = prepare(suite, open_runs, lambda problem: plans.append(planned(problem)))
                tell_left_out(unsuited, console)
                open_runs = [run for run in open_runs if (run.task, run.algorithm) not in unsuited]
                if plans and ray is None:  # a cluster's nodes have memory of their own
                    for line in announcement(plans, open_runs, min(jobs, len(open_runs)) * group.count()):
                        console.print(line, highlight=False, markup=False, soft_wrap=True)
            carry_out: CarryOut = one_by_one if jobs == 1 else partial(run_in_workers, jobs=jobs)
            if ray is not None and open_runs:
                from lm_envs.benchmarks.run.cluster import joined

                carry_out = ending.enter_context(joined(ray, out, open_runs, suite.resources, threads))
        # From here on the folder belongs to this comparison; an error above leaves it as it was.
        write_sealed(out / COMPARISON, _merged(out, suite))
        write_results(out)
        if open_runs:
            options = {"threads": threads, "keep": suite.keep, "extend": extend, "track": track, "show": show}
            _carry_out(carry_out, open_runs, out, console, **options)
    return write_results(out)


def tell_left_out(unsuited: Mapping[tuple[str, str], str], console: Console) -> None:
    """Say which of all algorithms do not suit a task, and why."""
    for why in unsuited.values():
        console.print(f"left out: {why}", highlight=False, markup=False)


def _same(run: RunSpec, out: Path) -> bool:
    """Whether the folder's run is this one, and not one with a smaller budget."""
    from lm_envs.benchmarks.run.one_run import settings_of

    config = settings_of(out / run.label)
    return config is not None and bool(config["run"] == run.to_json())


def _heading(suite: Suite, runs: Sequence[RunSpec], open_runs: Sequence[RunSpec]) -> str:
    tasks = len({run.task for run in runs})
    done = f", {len(runs) - len(open_runs)} of them finished already" if len(open_runs) < len(runs) else ""
    count = f"{len(runs)} run{'s' * (len(runs) > 1)} on {tasks} task{'s' * (tasks > 1)}{done}"
    text = f"[bold]{escape(suite.name)}[/]: {count}"
    return text + (f"\n{escape(suite.description)}" if suite.description else "")


def _merged(out: Path, suite: Suite) -> dict[str, Any]:
    """The suite for the folder's file, with the names of an earlier, smaller one kept."""
    new = json.loads(json.dumps(asdict(suite)))
    old = _held(out)
    for key in ("algorithms", "seeds"):
        new[key] = list(dict.fromkeys([*old.get(key, []), *new[key]]))
    names = [task["name"] for task in new["tasks"]]
    new["tasks"] = [task for task in old.get("tasks", []) if task["name"] not in names] + new["tasks"]
    return new


def _held(out: Path) -> dict[str, Any]:
    """The content of the folder's file; nothing if there is none, or if it is damaged, with a warning."""
    try:
        return read_sealed(out / COMPARISON) if (out / COMPARISON).exists() else {}
    except UserError:
        warnings.warn(f"{out / COMPARISON} is damaged; --resume writes it again", stacklevel=1)
        return {}


def write_results(out: Path) -> list[dict[str, Any]]:
    """Collect the finished runs of a folder, in the suite's order, into ``results.csv`` and ``aggregate.csv``."""
    for folder in (out, out / "plots"):
        remove_unfinished(folder)
    held = _held(out)
    rows = collect_results(out, [task["name"] for task in held.get("tasks", [])], held.get("algorithms", []))
    write_csv(rows, out / "results.csv")
    write_aggregate(rows, out, held.get("match_kl", ()))
    return rows


def _carry_out(do: CarryOut, runs: Sequence[RunSpec], out: Path, console: Console, **options: Any) -> None:
    done, failed = 0, []
    with Display(console, len(runs)) as shown:

        def notify(event: dict[str, Any]) -> None:
            nonlocal done
            shown(event)
            if event["event"] == "done":
                done += 1
                write_results(out)
            elif event["event"] == "failed":
                failed.append(event)

        alone = do is one_by_one and group.count() == 1  # workers have a patience of their own
        with StopRequest(shown.say, PATIENCE_S if alone else None).listening() as stop:
            do(runs, out, notify=notify, stop=stop, **options)
    if failed:
        raise RunsFailed(_failures(failed, len(runs)), len(collect_results(out)))
    if done < len(runs):
        raise Interrupted(str(out))


def _failures(failed: Sequence[dict[str, Any]], total: int) -> str:
    messages = dict.fromkeys(event["message"] for event in failed)
    if len(failed) == 1:
        return f"{failed[0]['run']}: {failed[0]['message']}"
    where = ", ".join(event["run"] for event in failed[:4]) + (", ..." if len(failed) > 4 else "")
    return f"{len(failed)} of {total} runs failed ({where}): {'; '.join(messages)}"
