"""Where the time of an iteration of PPO goes over many processes, with copies of the weights: a cost model.

    python -m lm_envs.benchmarks.speed.forecast

prints the tables of docs/scale.md. What a process of this machine does a second comes from the files of
``lm-envs bench scale`` and ``bench scale --parts``; what a GPU does, and its links, is assumed, in :data:`GPU`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TIMES, PARTS = (Path("benchmarks") / "results" / f"{name}-cpu.csv" for name in ("scale", "scale-parts"))
Lines = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Work:
    """An iteration: ``rows`` texts of ``tokens`` tokens behind prompts, ``passes`` epochs with ``steps`` of Adam."""

    parameters: float
    rows: int
    prompt: int
    tokens: int
    passes: int = 4
    steps: int = 8


@dataclass(frozen=True)
class Process:
    """What a process does a second, and what it costs.

    Attributes:
        sampling: operations while sampling and scoring, which is two forwards of the prompt and response.
        update: operations of forward and backward.
        weights: bytes of weights read from its memory; each token of a text needs all of them once.
        weight: bytes of a weight there.
        adam: parameters that Adam steps.
        link: bytes sent while gradients are summed.
        prepare: seconds for each token of the batch, on every process: advantages, metrics.
        disk: bytes of a checkpoint written.
    """

    sampling: float
    update: float
    weights: float
    weight: float
    adam: float
    link: float
    prepare: float
    disk: float = 1e9


CHECKPOINT_EVERY = 20  # iterations
# A GPU of the H100's kind at 40 % of its bfloat16 peak, with 3 TB/s of memory; eight in a machine joined by 400 GB/s
# each, and machines by 50 GB/s a GPU. Adam reads and writes 28 bytes a parameter. ``prepare`` is this machine's.
GPU = Process(400e12, 400e12, 3e12, 2, 3e12 / 28, 400e9, math.nan)
BETWEEN_MACHINES, GPUS_A_MACHINE = 50e9, 8
EXAMPLE = Work(1.5e9, rows=1024, prompt=256, tokens=1024)


def seconds(work: Work, process: Process, processes: int) -> dict[str, float]:
    """Return the seconds that each part of an iteration takes with this number of processes."""
    w, n, share = work.parameters, processes, math.ceil(work.rows / processes)
    whole = share * (work.prompt + work.tokens)  # tokens of a process, with prompts
    alone = 2 * w * share * work.tokens / process.sampling
    reading = work.tokens * process.weight * w / process.weights
    summed = 2 * (n - 1) / n * 4 * w / process.link
    return {
        "sampling": max(alone, reading),
        "scoring": 2 * 2 * w * whole / process.sampling,
        "update": work.passes * 6 * w * whole / process.update,
        "gradients": work.steps * summed,
        "gather": 40 * work.rows * work.tokens / process.link if n > 1 else 0.0,
        "Adam": work.steps * w / process.adam,
        "prepare": process.prepare * work.rows * work.tokens,
        "checkpoint": 12 * w / process.disk / CHECKPOINT_EVERY,
    }


def measured(times: Lines, parts: Lines) -> tuple[Work, Process]:
    """Return the work of the CSVs of ``lm-envs bench scale`` and a process of the machine that made them."""
    alone = {**_copies(parts)[0], **_copies(times)[0]}
    one = {name: float(alone[name]) for name in _READ}
    two = _copies(parts)[1]
    work = Work(float(alone["parameters"]), *(int(alone[name]) for name in _READ[4:]))
    w, n, whole = work.parameters, float(two["processes"]), work.rows * (work.prompt + work.tokens)
    return work, Process(
        sampling=2 * w * (work.rows * work.tokens + 2 * whole) / one["sample_s"],
        update=work.passes * 6 * w * whole / (one["update_s"] - work.steps * one["adam_s"] - one["prepare_s"]),
        weights=math.inf,
        weight=4,
        adam=w / one["adam_s"],
        link=2 * (n - 1) / n * 4 * w / float(two["sum_s"]),
        prepare=one["prepare_s"] / (work.rows * work.tokens),
    )


_READ = ("sample_s", "update_s", "prepare_s", "adam_s", "rows", "prompt_tokens", "new_tokens", "passes", "steps")


def _copies(lines: Lines) -> list[Mapping[str, str]]:
    """The lines of one process and of the fewest others with copies."""
    copies = [line for line in lines if line.get("weights", "ddp") == "ddp"]
    return sorted(copies, key=lambda line: int(line["processes"]))[:2]


def tables(times: Lines, parts: Lines) -> str:
    """Return the forecast for this machine beside what was measured on it, and that for GPUs, in Markdown."""
    work, process = measured(times, parts)
    told = {int(line["processes"]): float(line["seconds"]) for line in _copies(times)}
    # The measurement writes no checkpoint.
    here = {n: seconds(work, process, n) | {"checkpoint": 0.0} for n in told}
    gpus = {}
    for n in (8, 64, 1024):
        link = GPU.link if n <= GPUS_A_MACHINE else BETWEEN_MACHINES
        gpus[n] = seconds(EXAMPLE, replace(GPU, link=link, prepare=process.prepare), n)
    binds = {n: max(found, key=found.__getitem__) for n, found in gpus.items()}
    return f"{_table('processes', here, {'measured': told})}\n{_table('GPUs', gpus, {'binds': binds})}"


def _table(what: str, parts: Mapping[int, Mapping[str, float]], more: Mapping[str, Mapping[int, object]]) -> str:
    names = [name for name in next(iter(parts.values())) if any(found[name] >= 0.005 for found in parts.values())]
    rows = [[what, *names, "sum", *more], ["---"] * (len(names) + 2 + len(more))]
    for n, found in parts.items():
        beside = [f"{x:.2f}" if isinstance(x := column[n], float) else str(x) for column in more.values()]
        rows.append([f"{n:,}", *(f"{found[name]:.2f}" for name in names), f"{sum(found.values()):.2f}", *beside])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    print(tables(read(TIMES), read(PARTS)), end="")
