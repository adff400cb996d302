"""Tokens a second and peak memory of every way through the env and the agents, beside ``generate`` and bare forwards.

The ways take turns in one process, so that what slows the machine slows them all; medians over rounds. A round during
which other processes took more than a tenth of the machine is measured again, and marked if that does not help. Peak
memory is measured apart, each way in a process of its own.
"""

from __future__ import annotations

import csv
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lm_envs.benchmarks.run.storage import write_lines
from lm_envs.benchmarks.speed.kernels import RESULTS, child, machine, ratio
from lm_envs.benchmarks.speed.settings import Throughput as Settings
from lm_envs.benchmarks.speed.shared_work import LiveMemory
from lm_envs.benchmarks.speed.throughput_peers import PEERS, RIVALS, Peer, installed
from lm_envs.benchmarks.speed.throughput_work import COMPILED, WAYS, Size, Work
from lm_envs.model.compiled import check_tools
from lm_envs.settings import check as check_types

FOREIGN = 0.1  # share of the machine's time that others may take in a round
RETRIES = 2
# The floor of a way as a sum of bare ways: the models it must run, and on how much.
FLOORS = {
    "step": ("bare forwards",),
    "step + reference": ("bare forwards",) * 2,
    "step + reference + reward": ("bare forwards",) * 2 + ("bare forward",),
    "bulk + reference + reward": ("bare forwards",) + ("bare forward",) * 2,
    "ppo 1 epoch": ("bare forwards", "bare forward+backward"),
    "ppo 4 epochs": ("bare forwards",) + ("bare forward+backward",) * 4,
    "grpo": ("bare forwards", "bare forward+backward"),
    "rloo": ("bare forwards", "bare forward+backward"),
}
# The ways that are measured over response lengths, rows and vocabularies.
SCALING: tuple[str, ...] = ("generate", "bare forwards", "our forwards", "step", "step + reference")
SCALING += ("bulk + reference + reward", "ppo 1 epoch")
KEY = ("table", "shape", "vocabulary", "rows", "prompt", "new_tokens", "way")  # identifies a line


def check(settings: Settings) -> None:
    """Raise ValueError for a value out of range, or ways or a device that are not here."""
    check_types(settings, "{}")
    if missing := [way for way in settings.ways if way in PEERS and way not in installed()]:
        raise ValueError(f"{', '.join(missing)}: not installed here; `make peers` does that")
    if unknown := sorted(set(settings.ways) - {*WAYS, *PEERS}):
        raise ValueError(f"no way {', '.join(unknown)}; there are {', '.join({**WAYS, **PEERS})}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")


def sizes(settings: Settings) -> Iterator[tuple[str, Size, tuple[str, ...]]]:
    """Yield table, size and ways of everything that is measured."""
    ways = settings.ways or (*(way for way in WAYS if way not in COMPILED or _compiles(settings.device)), *installed())
    chosen = tuple(way for way in SCALING if way in ways)
    first = settings.shapes[0]
    every = {
        "fixed work": [Size(shape, rows=settings.rows, new_tokens=settings.new_tokens) for shape in settings.shapes],
        "response length": [Size(first, rows=8, new_tokens=count) for count in (32, 64, 128, 256, 512)],
        "rows": [Size(first, rows=rows) for rows in (1, 4, 16, 64, 256)],
        "vocabulary": [Size(first, rows=8, vocabulary=count) for count in (1_000, 8_192, 32_768, 131_072)],
    }
    for table in settings.tables:
        for size in every[table]:
            here = ways if table == "fixed work" else chosen
            yield table, size, tuple(way for way in here if way not in PEERS or not size.model.kv_heads)  # GPT-2 alone


def _compiles(device: str) -> bool:
    try:
        check_tools(device)
    except ValueError as missing:
        print(f"without the compiled ways: {missing}", flush=True)
        return False
    return True


class Load:
    """The share of the machine that other processes take, from Linux's counters; 0 without them.

    Args:
        peers: processes that count as ours, with ``cpu_seconds``.
    """

    def __init__(self, peers: Sequence[Any] = ()) -> None:
        self._peers = peers
        self._ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        self._stat = Path("/proc/stat")
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        busy = 0.0
        if self._stat.exists():
            user, nice, system, _, _, irq, softirq, *_ = map(int, self._stat.read_text().split("\n")[0].split()[1:])
            busy = (user + nice + system + irq + softirq) / self._ticks
        own = time.process_time() + sum(peer.cpu_seconds for peer in self._peers)
        return busy, own, time.perf_counter()

    def foreign(self) -> float:
        """Return the share of all cores' time that went to others since this was made."""
        busy, own, wall = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1)) if self._stat.exists() else 0.0


def timed(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    gc.collect()
    wait()
    if isinstance(call, Peer):
        return call.ask("go")
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def in_rounds(ways: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Measure ways in turns; every second round goes the other way round.

    Returns:
        By way: ``times`` (seconds by round), ``seconds`` (their median), ``first`` (seconds of the first call, which
        allocates, compiles and fills caches), ``foreign`` (the largest share of others in a round that counted).
    """
    first = {name: timed(call, device) for name, call in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    worst = 0.0
    for turn in range(rounds):
        for _ in range(RETRIES):
            load = Load([call for call in ways.values() if isinstance(call, Peer)])
            found = {name: timed(ways[name], device) for name in list(ways)[:: -1 if turn % 2 else 1]}
            share = load.foreign()
            if share <= FOREIGN:
                break
        worst = max(worst, share)
        for name, seconds in found.items():
            times[name].append(seconds)
    return {
        name: {"times": own, "seconds": statistics.median(own), "first": first[name], "foreign": worst}
        for name, own in times.items()
    }


def measure(size: Size, names: Sequence[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """Return :func:`in_rounds` with ``of_generate`` and ``of_peer``: the median over rounds of the time of generate, or
    of the rival, divided by the way's own; None where that was not measured."""
    with ExitStack() as stack:
        work = Work(size, settings.device)
        ways: dict[str, Callable[[], object]] = {}
        for name in names:
            if name in PEERS:
                ways[name] = stack.enter_context(closing(Peer(name, size, settings.device, settings.threads)))
            else:
                ways[name] = work.way(name)
        found = in_rounds(ways, settings.rounds, settings.device)
    for name, own in found.items():
        for key, base in (("of_generate", "generate"), ("of_peer", RIVALS.get(name, ""))):
            own[key] = ratio(found[base]["times"], own["times"]) if base in found else None
    return found


def peak(size: Size, name: str, settings: Settings) -> int:
    """Return the most bytes beyond the models' that tensors hold in the second call, in a process of its own."""
    if name in PEERS:
        with closing(Peer(name, size, settings.device, settings.threads)) as peer:
            return int(peer.ask("peak"))
    job = {"size": asdict(size), "way": name, "device": settings.device, "threads": settings.threads}
    return int(child(["-m", "lm_envs.benchmarks.speed.throughput"], job, settings.threads))


def _be_child(job: dict[str, Any]) -> int:
    torch.set_num_threads(job["threads"])
    call = Work(Size(**job["size"]), job["device"]).way(job["way"])
    call()
    gc.collect()
    memory = LiveMemory(job["device"])
    memory.start()
    call()
    return memory.stop()


def lines(settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """Yield the CSV's lines, a size at a time."""
    about = machine(settings.device) | {"threads": settings.threads, "rounds": settings.rounds}
    about |= {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default")}
    for table, size, names in sizes(settings):
        names = tuple(dict.fromkeys(("generate", *names)))
        found = measure(size, names, settings)
        several = []
        for name, one in found.items():
            parts = FLOORS.get(name, ())
            floor = sum(found[part]["seconds"] for part in parts) if all(part in found for part in parts) else 0.0
            line = {"table": table, "shape": size.shape, "vocabulary": size.model.vocabulary, "rows": size.rows}
            line |= {"prompt": size.prompt_length, "new_tokens": size.new_tokens, "way": name}
            line |= {"seconds": round(one["seconds"], 5), "tokens_per_s": round(size.tokens / one["seconds"], 1)}
            line |= {"of_generate": round(one["of_generate"], 3), "first_s": round(one["first"], 3)}
            line |= {"of_peer": "" if one["of_peer"] is None else round(one["of_peer"], 3)}
            line |= {"times_floor": round(one["seconds"] / floor, 3) if floor else ""}
            line |= {"peak_MB": "", "foreign_load": round(one["foreign"], 3)}
            if settings.peaks and table == "fixed work":
                line["peak_MB"] = round(peak(size, name, settings) / 1e6, 1)
            several.append(line | about)
        yield several


def record(
    out: Path, batches: Iterable[list[dict[str, Any]]], text: Callable[[dict[str, Any]], str], held: Any = None
) -> None:
    """Print each line, and write the CSV after every batch.

    Args:
        text: gives a line's text for the terminal.
        held: a dictionary whose values are the lines before them.
    """
    everything: list[dict[str, Any]] = []
    for batch in batches:
        everything += batch
        for line in batch:
            print(text(line), flush=True)
        write_lines(out, [*(held or {}).values(), *everything], list(batch[0]))
    print(out)


def run(settings: Settings) -> None:
    """Measure, print, and write the CSV after every size.

    Raises:
        ValueError: a way or a device that is not there.
    """
    check(settings)
    torch.set_num_threads(settings.threads)
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()  # of idle threads, on which times depend
    out = settings.out or RESULTS / f"throughput-{settings.device}{policy and f'-{policy}'}.csv"
    old: dict[tuple[str, ...], dict[str, Any]] = {}
    if settings.add and out.exists():
        with out.open(newline="", encoding="utf-8") as stream:
            old = {_key(line): line for line in csv.DictReader(stream)}

    def batches() -> Iterator[list[dict[str, Any]]]:
        for batch in lines(settings):
            for line in batch:
                known = old.pop(_key(line), None)
                if known is not None and not settings.peaks:  # other load changes times, and not memory
                    line["peak_MB"] = known["peak_MB"]
            yield batch

    def text(line: dict[str, Any]) -> str:
        rival = f", {line['of_peer']} x {RIVALS[line['way']]}" if line["of_peer"] != "" else ""
        floor = f", {line['times_floor']} x its floor" if line["times_floor"] else ""
        first = f", the first call {float(line['first_s']):.3g} s" if line["way"] in COMPILED else ""
        return (
            f"{line['table']}: {line['shape']} V={line['vocabulary']} {line['rows']}x{line['new_tokens']}  "
            f"{line['way']}: {line['seconds']:.4g} s, {line['of_generate']} x generate{rival}{floor}{first}"
            f"{' [other load]' if line['foreign_load'] > FOREIGN else ''}"
        )

    record(out, batches(), text, old)


def _key(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(line[name]) for name in KEY)


if __name__ == "__main__":
    print(json.dumps(_be_child(json.loads(sys.argv[1]))))
